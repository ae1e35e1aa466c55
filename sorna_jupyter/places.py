"""Where things lie on this machine. Used by `app`, the command line and the clients."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from jupyter_core.paths import jupyter_data_dir


def data_dir() -> Path:
    """Registry, keys, credentials: in Jupyter's data directory; `JUPYTER_DATA_DIR` moves it."""
    return Path(jupyter_data_dir()) / "sorna"


def runtime_dir(data: Path) -> Path:
    """Sockets: a short path, as `ipc` addresses have 107 bytes; one for each data directory.

    `SORNA_RUNTIME_DIR` sets it; else it lies in `XDG_RUNTIME_DIR` or `/tmp`.
    """
    if chosen := os.environ.get("SORNA_RUNTIME_DIR"):
        return Path(chosen)
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")
    digest = hashlib.sha256(str(data.absolute()).encode()).hexdigest()[:8]
    return parent / f"sorna-{os.getuid()}-{digest}"


def make_private(directory: Path) -> Path:
    """Create `directory` for this user alone. Raises `PermissionError` if it is someone else's.

    In `/tmp` anyone could have made it first, to read along.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if directory.is_symlink() or found.st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to someone else: remove it or set another")
    if found.st_mode & 0o077:
        directory.chmod(0o700)
    return directory


def write_private(path: Path, text: str) -> None:
    """Replace `path` at once with a file that only its owner can read."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    part.rename(path)

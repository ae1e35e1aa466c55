"""Kernelspecs on this machine that stand for kernels on a server.

A spec's `argv` starts the local proxy kernel, so whatever can start a kernel can use it. It names
the server but holds no token; the proxy looks that up. A spec that is not ours is never replaced
or removed. Used by `jupyter sorna kernelspec`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from jupyter_client.kernelspec import KernelSpecManager

from sorna_jupyter.exceptions import Conflict, NotFound, SornaError, UnknownKernelspec
from sorna_jupyter.remote.server import Server

PREFIX = "sorna-"


@dataclass(frozen=True, slots=True)
class RemoteKernelspec:
    """One that a server offers."""

    name: str
    spec: dict[str, Any]
    resources: dict[str, str]

    @property
    def display_name(self) -> str:
        return str(self.spec.get("display_name") or self.name)


@dataclass(frozen=True, slots=True)
class InstalledKernelspec:
    """One of ours on this machine: `name` here, `remote_name` on `url`."""

    name: str
    display_name: str
    url: str
    remote_name: str
    directory: Path


def offered(server: Server) -> dict[str, RemoteKernelspec]:
    """What the server offers, by name. Raises `SornaError` if it is no Jupyter server."""
    answer = server.get("/api/kernelspecs")
    try:
        return {
            name: RemoteKernelspec(name, model["spec"], model.get("resources") or {})
            for name, model in sorted(answer["kernelspecs"].items())
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise SornaError(f"{server.url} is not a Jupyter server") from error


def pick(known: dict[str, RemoteKernelspec], names: list[str]) -> list[RemoteKernelspec]:
    """Those with these names. Raises `UnknownKernelspec` before anything is done."""
    for name in names:
        if name not in known:
            raise UnknownKernelspec(name, list(known))
    return [known[name] for name in names]


def installed() -> list[InstalledKernelspec]:
    """Ours, wherever Jupyter looks for kernelspecs."""
    found = KernelSpecManager().find_kernel_specs()
    return [
        ours for name in sorted(found) if (ours := _read_ours(name, Path(found[name]))) is not None
    ]


def install(
    server: Server,
    remote: RemoteKernelspec,
    *,
    prefix: str | None = None,
    pass_env: list[str] | None = None,
) -> InstalledKernelspec:
    """Write the spec below `prefix`, or for this user. Safe to repeat: ours is replaced."""
    name, directory = _free_place(server.url, remote.name, prefix)
    display_name = _display_name(remote, server.url)
    with TemporaryDirectory() as scratch:
        content = kernel_json(remote, server.url, display_name, pass_env or [])
        (Path(scratch) / "kernel.json").write_text(json.dumps(content, indent=1) + "\n")
        _fetch_logos(server, remote, Path(scratch))
        Path(scratch).chmod(0o755)
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            shutil.rmtree(directory)
        shutil.copytree(scratch, directory)
    return InstalledKernelspec(name, display_name, server.url, remote.name, directory)


def remove(name: str) -> InstalledKernelspec:
    """Remove the spec that is installed as `name`. Raises `NotFound`, `Conflict` if not ours."""
    found = KernelSpecManager().find_kernel_specs()
    if name not in found:
        raise NotFound(f"No kernelspec is installed as {name!r}")
    directory = Path(found[name])
    ours = _read_ours(name, directory)
    if ours is None:
        raise Conflict(f"{directory} was not installed by Sorna; it is left alone")
    shutil.rmtree(directory)
    return ours


def kernel_json(
    remote: RemoteKernelspec, url: str, display_name: str, pass_env: list[str]
) -> dict[str, Any]:
    metadata = remote.spec.get("metadata") or {}
    return {
        # -P: a notebook's own directory must not stand in for our modules.
        "argv": [
            *(sys.executable, "-P", "-m", "sorna_jupyter.remote.proxy"),
            *("--url", url, "--kernel-name", remote.name),
            *(word for name in pass_env for word in ("--pass-env", name)),
            *("-f", "{connection_file}"),
        ],
        "display_name": display_name,
        "language": remote.spec.get("language") or "",
        # The proxy understands a signal as well, for those who send one all the same; a message
        # arrives everywhere, also where there are no signals.
        "interrupt_mode": "message",
        "metadata": {
            "debugger": bool(metadata.get("debugger")),
            "supported_encryption": ["curve"],
            "sorna": {"url": url, "name": remote.name},
        },
    }


def _display_name(remote: RemoteKernelspec, url: str) -> str:
    # Which library runs the kernel is no news to whom wants it on another machine.
    return f"{remote.display_name.removesuffix(' (ipykernel)')} (Sorna: {urlsplit(url).hostname})"


def _free_place(url: str, remote_name: str, prefix: str | None) -> tuple[str, Path]:
    """The name and directory for a spec: `sorna-NAME`, with the host where that is taken."""
    kernels = _kernels_directory(prefix)
    found = {name: Path(path) for name, path in KernelSpecManager().find_kernel_specs().items()}
    place = re.sub(r"[^a-z0-9._-]+", "-", url.partition("://")[2].lower()).strip("-")
    short = PREFIX + re.sub(r"[^a-z0-9._-]+", "-", remote_name.lower())
    for name in (short, f"{short}-{place}"):
        # Another directory's spec of the same name would hide ours, or be hidden.
        candidates = {kernels / name, found.get(name, kernels / name)}
        if all(_is_free_for(path, url, remote_name) for path in candidates):
            return name, kernels / name
    raise Conflict(f"{kernels / name} is someone else's; remove or rename it first")


def _is_free_for(directory: Path, url: str, remote_name: str) -> bool:
    if not directory.exists():
        return True
    ours = _read_ours(directory.name, directory)
    return ours is not None and (ours.url, ours.remote_name) == (url, remote_name)


def _kernels_directory(prefix: str | None) -> Path:
    if prefix is None:
        return Path(KernelSpecManager().user_kernel_dir)
    return Path(prefix).absolute() / "share" / "jupyter" / "kernels"


def _read_ours(name: str, directory: Path) -> InstalledKernelspec | None:
    try:
        spec = json.loads((directory / "kernel.json").read_bytes())
        mark = spec["metadata"]["sorna"]
        return InstalledKernelspec(
            name, str(spec["display_name"]), str(mark["url"]), str(mark["name"]), directory
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fetch_logos(server: Server, remote: RemoteKernelspec, into: Path) -> None:
    """Those that can be had: a kernel works without one."""
    for resource, path in remote.resources.items():
        file_name = PurePosixPath(urlsplit(path).path).name
        if not re.fullmatch(r"logo-\w+(\.\w+)?", file_name):
            continue
        try:
            (into / file_name).write_bytes(server.fetch(urlsplit(path).path))
        except SornaError:
            print(f"no {resource} for {remote.name}", file=sys.stderr)

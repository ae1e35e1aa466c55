"""How an agent starts kernels: the contract of a runtime, and what all runtimes share.

A runtime starts a kernel's process in some sandbox with its `ipc` sockets in a host directory, says
when and why it died, and cleans up after it. It never speaks to the kernel: that is the relay's
work. Used by `agent`; `docker.py` and `local.py` are the runtimes there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sorna_jupyter.exceptions import InvalidRequest, RuntimeUnavailable
from sorna_jupyter.protocol import ImageStatus, Limits

DEFAULT_LIMITS = Limits(memory=2 << 30, cpus=None, pids=256, disk=256 << 20)
"""Where a launch says nothing. cpus None: all that the machine has."""

MIN_MEMORY = 64 << 20

PORTS = {
    "shell_port": 1,
    "iopub_port": 2,
    "stdin_port": 3,
    "control_port": 4,
    "hb_port": 5,
}
"""Over ipc, a port is a suffix of the socket's name: `{address}-1` is shell."""

INSIDE = "/run/sorna"
"""where a kernel that has its own view of the disk finds its launch's directory"""
HOME = "/home/sorna"
"""and its home"""
CONNECTION_FILE = "kernel.json"
SOCKET_PREFIX = "k"
LOGO = "logo-64x64.png"
"""beside a kernel.json"""

DeathCallback = Callable[[str, str], None]


@dataclass(frozen=True)
class Launch:
    """Everything that makes a kernel what it is, by value."""

    kernel_id: str
    image: str
    """an `ImageStatus.name`"""
    owner: str
    directory: Path
    """on the host, made by the agent, short; the runtime puts the sockets there and removes it in
    `destroy`"""
    key: str
    """signs the messages"""
    env: dict[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    path: str = ""
    """working directory, relative to the kernel's home"""


@dataclass(frozen=True)
class Started:
    """Where a started kernel listens. It need not have bound its sockets yet."""

    transport: str
    address: str
    """host-side prefix of the five sockets: `{address}-{port}`, ports as in `PORTS`"""
    handle: str
    """what the runtime calls it: container id, process id"""
    interrupt_mode: str
    """`message`: by the relay; `signal`: by `Runtime.interrupt`"""


class Runtime(ABC):
    """Starts and stops kernels. One an agent; every method is for the agent's event loop.

    Order of calls: `on_death`, `start_up`, `adopt`, then the others in any order, `close` last.
    `close` leaves kernels running: who wants them gone destroys them first.
    """

    name: str
    isolation: str
    """One honest sentence on how far kernels are kept from the machine and from each other."""

    _die: DeathCallback | None = None

    def on_death(self, callback: DeathCallback) -> None:
        """`callback(kernel_id, reason)` runs in the event loop for each kernel that dies by itself:
        never for those that `relaunch` or `destroy` stopped, nor twice for one life."""
        self._die = callback

    def report_death(self, kernel_id: str, reason: str) -> None:
        if self._die is not None:
            self._die(kernel_id, reason)

    @abstractmethod
    async def start_up(self) -> None:
        """Look for the engine and its images. An engine that is away is no error here."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    def images(self) -> list[ImageStatus]:
        """What there is and what could be built, from memory."""

    @abstractmethod
    async def build(self, names: list[str], on_change: Callable[[], None]) -> None:
        """Build what is missing of these (all, if empty), one after another.

        A failed build shows as `FAILED` in `images`, it raises nothing. `on_change` runs in the
        event loop when progress shows in `images`. Safe to repeat: a running build is joined.
        """

    @abstractmethod
    async def launch(self, launch: Launch) -> Started:
        """Start the kernel; nothing stays behind if that fails or is cancelled.

        Raises UnknownKernelspec, ImageUnavailable, RuntimeUnavailable, InvalidRequest or
        KernelStartFailed.
        """

    @abstractmethod
    async def relaunch(self, kernel_id: str) -> Started:
        """A new process with the same everything; the old one, if alive, is killed first."""

    @abstractmethod
    async def interrupt(self, kernel_id: str) -> None:
        """The SIGINT way."""

    @abstractmethod
    async def destroy(self, kernel_id: str) -> None:
        """Kill it and remove all it had. Safe to repeat; an unknown id is already done.

        Raises RuntimeUnavailable while the engine is away; it is then done when that is back.
        """

    @abstractmethod
    async def adopt(self, launches: dict[str, Launch]) -> dict[str, Started]:
        """Which of these kernels of an earlier agent process still run.

        All of them are ours from now on: for each that died meanwhile `on_death` is called with
        the reason before this returns, and `destroy` removes what it left. What else carries this
        agent's id is destroyed. While the engine is away all count as running; deaths are then
        reported when it is back.
        """

    @abstractmethod
    async def logs(self, kernel_id: str, lines: int = 200) -> str:
        """The last lines that the kernel's process wrote to its own stdout and stderr."""


async def choose_runtime(
    kind: str,
    *,
    agent_id: str,
    base_image: str | None = None,
    image_folders: Sequence[Path] = (),
    defaults: Limits = DEFAULT_LIMITS,
) -> Runtime:
    """The runtime for `kind`: `docker`, `local`, or `auto`: docker if an engine answers now.

    Asked for by name, docker is taken even while its engine is away.
    """
    if kind not in ("auto", "docker", "local"):
        raise InvalidRequest(f"no runtime is named {kind!r}; there are: auto, docker, local")
    if kind != "local":
        from sorna_agent.runtimes.docker import DockerRuntime

        runtime = DockerRuntime(
            agent_id=agent_id,
            base_image=base_image,
            image_folders=image_folders,
            defaults=defaults,
        )
        try:
            await runtime.ping()
        except RuntimeUnavailable:
            if kind == "auto":
                await runtime.close()
            else:
                return runtime
        else:
            return runtime
    from sorna_agent.runtimes.local import LocalRuntime

    return LocalRuntime(agent_id=agent_id, defaults=defaults)


def fill_limits(limits: Limits, defaults: Limits) -> Limits:
    """`limits`, where it says nothing `defaults`, and there `DEFAULT_LIMITS`."""

    def pick(name: str) -> int | float | None:
        for source in (limits, defaults, DEFAULT_LIMITS):
            value: int | float | None = getattr(source, name)
            if value is not None:
                return value
        return None

    return Limits(**{name: pick(name) for name in Limits.__struct_fields__})  # type: ignore[arg-type]  # each picked from a field of that type


def check_limits(limits: Limits) -> Limits:
    """`limits` if a kernel can live with them; raises InvalidRequest otherwise."""
    least = {"memory": MIN_MEMORY, "cpus": 0.01, "pids": 16, "disk": 1 << 20}
    for name, smallest in least.items():
        value = getattr(limits, name)
        # Written so that NaN is refused too.
        if value is not None and not value >= smallest:
            raise InvalidRequest(f"a kernel needs {name} of at least {smallest}, not {value}")
    return limits


def check_path(path: str) -> str:
    """`path` as a plain relative path (`.` for home itself); raises InvalidRequest otherwise."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or not _is_clean(path):
        raise InvalidRequest(f"path must be relative and stay within the kernel's home: {path!r}")
    return str(PurePosixPath(*parts))


def check_env(env: Mapping[str, str]) -> dict[str, str]:
    """`env` if a process can have it; raises InvalidRequest otherwise. Never tells the values."""
    for name, value in env.items():
        if not name or "=" in name or not _is_clean(name) or not _is_clean(value):
            raise InvalidRequest(f"not a possible environment variable: {name!r}")
    return dict(env)


def _is_clean(text: str) -> bool:
    """No NUL and no lone surrogates: neither fits into argv, environment or a file's name."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def expand_env(spec_env: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """A kernelspec's env with `${NAME}` filled in from `base`, as Jupyter does."""
    return {name: string.Template(text).safe_substitute(base) for name, text in spec_env.items()}


def expand_argv(argv: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """A kernelspec's argv with `{connection_file}` and its like filled in."""
    pattern = re.compile(r"\{([A-Za-z0-9_]+)\}")
    return [pattern.sub(lambda m: values.get(m[1], m[0]), argument) for argument in argv]


def write_connection_file(
    launch: Launch, ip: str, kernel_name: str, directory: Path | None = None
) -> Path:
    """The connection file, 0600, in the launch's directory or this one; `ip` as the kernel sees
    it."""
    path = (directory or launch.directory) / CONNECTION_FILE
    content = {
        "transport": "ipc",
        "ip": ip,
        **PORTS,
        "key": launch.key,
        "signature_scheme": "hmac-sha256",
        "kernel_name": kernel_name,
    }
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w") as file:
        json.dump(content, file)
    return path


def death_reason(
    exit_code: int, *, out_of_memory: bool = False, memory: int | None = None, last_line: str = ""
) -> str:
    """Why a process ended, in words. Its exit code as a shell tells it: 128 + n is signal n."""
    number = exit_code - 128
    if out_of_memory and number == signal.SIGKILL:
        limit = f" (limit {memory >> 20} MiB)" if memory else ""
        return f"killed: out of memory{limit}"
    if number > 0:
        try:
            return f"killed by signal {number} ({signal.Signals(number).name})"
        except ValueError:
            pass  # an ordinary, large exit code
    if exit_code == 0 or not last_line:
        return f"exit code {exit_code}"
    return f"exit code {exit_code}: {last_line[:500]}"


def remove_sockets(directory: Path) -> None:
    """Before a new process binds the same names."""
    for port in PORTS.values():
        (directory / f"{SOCKET_PREFIX}-{port}").unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """All of it, whoever owns the files. The kernel may have planted symlinks: none is followed."""
    if directory.is_symlink():
        directory.unlink()
        return
    # An unreadable folder would stop rmtree where we are not root.
    for parent, folders, _ in os.walk(directory):
        for folder in folders:
            path = os.path.join(parent, folder)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(directory, ignore_errors=True)

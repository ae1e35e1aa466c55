"""Kernels as processes of the agent's own user, for one person's machine without Docker.

Under bubblewrap where that works, else under Landlock, always with limits on memory, files and
processes (see `sorna_agent.sandbox`). A kernel's directory holds:

    s/            what it shares with the kernel: connection file and sockets
    home/ tmp/    its scratch folders; they outlive a restart and go with the kernel
    log           what it wrote to stdout and stderr
    process.json  process id and start time, by which a restarted agent knows it again

Kernelspecs are the agent's own Python and whatever Jupyter finds installed, except those that lead
back to Sorna. Processes carry the kernel's and the agent's id in their environment: so stragglers
of a kernel that is destroyed are found, even those that left its process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sorna_agent import sandbox
from sorna_agent.runtimes import (
    CONNECTION_FILE,
    DEFAULT_LIMITS,
    HOME,
    INSIDE,
    LOGO,
    PORTS,
    SOCKET_PREFIX,
    Launch,
    Runtime,
    Started,
    check_env,
    check_limits,
    check_path,
    death_reason,
    expand_argv,
    expand_env,
    fill_limits,
    remove_directory,
    remove_sockets,
    write_connection_file,
)
from sorna_agent.runtimes.processes import (
    AGENT_MARK,
    KERNEL_MARK,
    innermost,
    kill,
    kill_stragglers,
    marked_processes,
    own_threads,
    recorded_pid,
    start_time,
)
from sorna_jupyter.exceptions import (
    KernelNotFound,
    KernelStartFailed,
    RuntimeUnavailable,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import ImageState, ImageStatus, Limits

log = logging.getLogger(__name__)

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/nix/store")
# Not all of /etc: an agent that is root could read the shadow file there.
ETC = (
    "alternatives ca-certificates debian_version fonts gai.conf group host.conf hosts ipython "
    "java-17-openjdk java-21-openjdk jupyter ld.so.cache ld.so.conf ld.so.conf.d locale.alias "
    "localtime machine-id magic mime.types nsswitch.conf os-release passwd pki protocols R "
    "resolv.conf services ssl terminfo timezone"
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")
OUTPUT_WAITS = (
    "--IPKernelApp.exec_lines=(lambda output: output.schedule(lambda: output.socket."
    "setsockopt(23, 0)))(get_ipython().kernel.iopub_thread)"
)
"""Sets ZMQ_SNDHWM of the kernel's output socket to 0, in the thread that it belongs to: else what
it says while the relay gets no processor is dropped above 1000 messages, and nobody can know. Holds
for connections that are there, not for that of a later relay: ZeroMQ gives those what held when the
socket was bound. The image has the same in its `kernel.json`."""
OUR_ENV = ("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ")

GET_DOCKER = "for containers, install Docker and start `jupyter sorna` again."
ISOLATION = {
    "bubblewrap": (
        "Each kernel is a process of your user under bubblewrap: without network and without your "
        f"files, but sharing memory and processors with everything else here; {GET_DOCKER}"
    ),
    "landlock": (
        "Each kernel is a process of your user that Landlock keeps from your files, but not from "
        f"the network or from programs that listen on this machine; {GET_DOCKER}"
    ),
    "none": (
        "Kernels are not isolated: they are ordinary processes of your user and can read and "
        f"change all your files; {GET_DOCKER}"
    ),
}


@dataclass
class _Kernel:
    launch: Launch
    interrupt_mode: str
    pid: int = 0
    process: subprocess.Popen[bytes] | None = None
    """None: adopted, not our child"""
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    is_stopping: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def shared(self) -> Path:
        return self.launch.directory / "s"


class LocalRuntime(Runtime):
    name = "local"

    def __init__(
        self, *, agent_id: str, defaults: Limits = DEFAULT_LIMITS, confinement: str | None = None
    ) -> None:
        """`confinement`: a key of ISOLATION; None: the best that works here."""
        if not hasattr(os, "pidfd_open"):
            raise RuntimeUnavailable("The local runtime needs Linux 5.3 or newer; install Docker")
        self.agent_id = agent_id
        self.defaults = defaults
        self.confinement = confinement or find_confinement()
        self.isolation = ISOLATION[self.confinement]
        self._specs: dict[str, _Spec] = {}
        self._kernels: dict[str, _Kernel] = {}

    async def start_up(self) -> None:
        self._specs = await asyncio.to_thread(find_specs)

    async def close(self) -> None:
        """Kernels run on; their deaths are no longer watched."""
        for kernel in self._kernels.values():
            kernel.is_stopping = True

    def images(self) -> list[ImageStatus]:
        return [spec.status for spec in self._specs.values()]

    async def build(self, names: list[str], on_change: Callable[[], None]) -> None:
        """Nothing is ever built here."""

    async def launch(self, launch: Launch) -> Started:
        self._spec(launch.image)
        check_limits(fill_limits(launch.limits, self.defaults))
        check_env(launch.env)
        path = check_path(launch.path)
        kernel = _Kernel(launch, self._spec(launch.image).interrupt_mode)
        self._kernels[launch.kernel_id] = kernel
        try:
            for folder in ("s", "tmp", f"home/{path}"):
                (launch.directory / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._start(kernel)
        except BaseException:  # cancelled too: nothing stays behind
            await self.destroy(launch.kernel_id)
            raise
        return self._started(kernel)

    async def relaunch(self, kernel_id: str) -> Started:
        kernel = self._kernel(kernel_id)
        async with kernel.lock:
            await self._stop(kernel)
            remove_sockets(kernel.shared)
            self._start(kernel)
        return self._started(kernel)

    async def interrupt(self, kernel_id: str) -> None:
        kernel = self._kernel(kernel_id)
        with contextlib.suppress(ProcessLookupError):
            os.kill(innermost(kernel.pid), signal.SIGINT)

    async def destroy(self, kernel_id: str) -> None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            return
        async with kernel.lock:
            await self._stop(kernel)
            await asyncio.to_thread(remove_directory, kernel.launch.directory)
            if self._kernels.get(kernel_id) is kernel:
                del self._kernels[kernel_id]
        log.info("kernel %s is gone", kernel_id)

    async def adopt(self, launches: dict[str, Launch]) -> dict[str, Started]:
        adopted: dict[str, Started] = {}
        for kernel_id, launch in launches.items():
            spec = self._specs.get(launch.image)
            kernel = _Kernel(launch, spec.interrupt_mode if spec else "message")
            kernel.exited.set()
            self._kernels[kernel_id] = kernel
            pid = recorded_pid(launch.directory)
            if pid is not None and self._watch(kernel, pid):
                adopted[kernel_id] = self._started(kernel)
            else:
                self.report_death(kernel_id, "ended while its agent was away")
        for pid, kernel_id in list(marked_processes(AGENT_MARK, self.agent_id)):
            if kernel_id not in self._kernels:
                log.info("killing process %d of unknown kernel %s", pid, kernel_id)
                kill(pid)
        return adopted

    async def logs(self, kernel_id: str, lines: int = 200) -> str:
        return _tail(self._kernel(kernel_id).launch.directory / "log", lines)

    def _kernel(self, kernel_id: str) -> _Kernel:
        try:
            return self._kernels[kernel_id]
        except KeyError:
            raise KernelNotFound(kernel_id) from None

    def _spec(self, name: str) -> _Spec:
        try:
            return self._specs[name]
        except KeyError:
            raise UnknownKernelspec(name, sorted(self._specs)) from None

    def _started(self, kernel: _Kernel) -> Started:
        return Started(
            transport="ipc",
            address=str(kernel.shared / SOCKET_PREFIX),
            handle=str(kernel.pid),
            interrupt_mode=kernel.interrupt_mode,
        )

    def _start(self, kernel: _Kernel) -> None:
        launch = kernel.launch
        spec = self._spec(launch.image)
        is_bubble = self.confinement == "bubblewrap"
        shared = INSIDE if is_bubble else str(kernel.shared)
        write_connection_file(launch, f"{shared}/{SOCKET_PREFIX}", launch.image, kernel.shared)
        order = make_order(
            spec,
            launch,
            fill_limits(launch.limits, self.defaults),
            confinement=self.confinement,
            connection_file=f"{shared}/{CONNECTION_FILE}",
        )
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            KERNEL_MARK: launch.kernel_id,
            AGENT_MARK: self.agent_id,
        }
        # A file, since a pipe would block on an environment of more than 64 KiB.
        with (
            tempfile.TemporaryFile() as stdin,
            open(launch.directory / "log", "ab", opener=_private) as output,
        ):
            stdin.write(json.dumps(order).encode())
            stdin.seek(0)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", sandbox.__file__],
                    stdin=stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                raise KernelStartFailed(f"no process could be started: {error}") from error
        kernel.process = process
        kernel.is_stopping = False
        record = {"pid": process.pid, "started": start_time(process.pid)}
        (launch.directory / "process.json").write_text(json.dumps(record))
        self._watch(kernel, process.pid)
        log.info("kernel %s started as process %d", launch.kernel_id, process.pid)

    def _watch(self, kernel: _Kernel, pid: int) -> bool:
        """Have its end noticed; False if it is over already and can't be watched."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        kernel.pid = pid
        kernel.exited.clear()
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._note_end(kernel)

        loop.add_reader(descriptor, ended)
        return True

    def _note_end(self, kernel: _Kernel) -> None:
        reason = "ended; its agent had been restarted and could not see how"
        if kernel.process is not None:
            code = kernel.process.wait()
            came_up = (kernel.shared / f"{SOCKET_PREFIX}-{PORTS['hb_port']}").exists()
            last_line = "" if came_up else _tail(kernel.launch.directory / "log", 1).strip()
            reason = death_reason(128 - code if code < 0 else code, last_line=last_line)
        kernel.exited.set()
        if not kernel.is_stopping:
            kernel_id = kernel.launch.kernel_id
            log.info("kernel %s died: %s", kernel_id, reason)
            kill_stragglers(kernel_id)
            self.report_death(kernel_id, reason)

    async def _stop(self, kernel: _Kernel) -> None:
        kernel.is_stopping = True
        if kernel.pid and not kernel.exited.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(kernel.pid, signal.SIGKILL)
            await asyncio.wait_for(kernel.exited.wait(), 30)
        await asyncio.to_thread(kill_stragglers, kernel.launch.kernel_id)


# -- what a kernel's process may do --


def find_confinement() -> str:
    """The best that works here; bubblewrap may be installed and yet not allowed to do its work."""
    if shutil.which("bwrap"):
        trial = ["bwrap", *_bubble_base(), "--chdir", "/", "true"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(trial, capture_output=True, timeout=10, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                return "bubblewrap"
    try:
        from landlock import landlock_abi_version

        return "landlock" if landlock_abi_version() >= 1 else "none"
    except (ImportError, OSError):
        return "none"


def make_order(
    spec: _Spec, launch: Launch, limits: Limits, *, confinement: str, connection_file: str
) -> sandbox.Order:
    directory = launch.directory
    is_bubble = confinement == "bubblewrap"
    home, tmp = (HOME, "/tmp") if is_bubble else (f"{directory}/home", f"{directory}/tmp")
    cwd = os.path.normpath(f"{home}/{check_path(launch.path)}")
    base = {name: os.environ[name] for name in OUR_ENV if name in os.environ}
    base |= {"HOME": home, "TMPDIR": tmp, "USER": "sorna", "LOGNAME": "sorna"}
    base.setdefault("PATH", os.defpath)
    if site.ENABLE_USER_SITE:
        # HOME is another one now, but what is installed with `pip install --user` stays.
        base["PYTHONUSERBASE"] = site.getuserbase()
    env = {**base, **expand_env(spec.spec.get("env", {}), base), **check_env(launch.env)}
    readable = [*SYSTEM, *(f"/etc/{name}" for name in ETC.split()), *spec.folders]
    bwrap: list[str] = []
    if is_bubble:
        bwrap = _bubble_base()
        bwrap += ["--bind", f"{directory}/tmp", "/tmp", "--bind", f"{directory}/home", HOME]
        bwrap += ["--bind", f"{directory}/s", INSIDE]
        for folder in spec.folders:
            bwrap += ["--ro-bind-try", folder, folder]
        bwrap += ["--remount-ro", "/", "--chdir", cwd, "--clearenv"]
        for name, value in env.items():
            bwrap += ["--setenv", name, value]
    return sandbox.Order(
        argv=expand_argv(
            spec.argv, {"connection_file": connection_file, "resource_dir": spec.resource_dir}
        ),
        env=env,
        cwd=cwd,
        rlimits=_rlimits(limits),
        landlock=confinement == "landlock",
        read=[*readable, "/proc", "/sys/devices/system/cpu", "/sys/fs/cgroup"],
        write=[f"{directory}/{name}" for name in ("s", "home", "tmp")] + [*DEVICES],
        bwrap=bwrap,
    )


def _bubble_base() -> list[str]:
    """No network, own process ids, nothing of the disk but the system; no capabilities."""
    # Not --die-with-parent: kernels outlive an agent that is killed, and the next one adopts them.
    arguments = ["--unshare-all", "--new-session", "--cap-drop", "ALL"]
    arguments += ["--hostname", "sorna"]
    for folder in SYSTEM:
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        else:
            arguments += ["--ro-bind-try", folder, folder]
    for name in ETC.split():
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return [*arguments, "--proc", "/proc", "--dev", "/dev"]


def _rlimits(limits: Limits) -> dict[str, int]:
    assert limits.memory and limits.disk and limits.pids
    rlimits = {
        # Not RLIMIT_AS: address space that is only reserved, by thread pools or V8, costs nothing.
        "RLIMIT_DATA": limits.memory,
        "RLIMIT_FSIZE": limits.disk,
        "RLIMIT_NOFILE": 4096,
        "RLIMIT_CORE": 0,
    }
    if os.geteuid() != 0:
        # It counts everything that this user runs, browsers too: a bound for bombs, not a quota.
        # For root it counts nothing.
        rlimits["RLIMIT_NPROC"] = own_threads() + 4 * limits.pids
    return rlimits


# -- kernelspecs --


@dataclass(frozen=True)
class _Spec:
    name: str
    spec: dict[str, Any]
    argv: list[str]
    resource_dir: str = ""
    folders: tuple[str, ...] = ()
    """what it must read beside the system's folders"""

    @property
    def interrupt_mode(self) -> str:
        return str(self.spec.get("interrupt_mode", "signal"))

    @functools.cached_property
    def status(self) -> ImageStatus:
        logo = Path(self.resource_dir) / LOGO
        return ImageStatus(
            name=self.name,
            reference=self.argv[0],
            state=ImageState.READY,
            spec=self.spec,
            progress=1.0,
            logo=logo.read_bytes() if self.resource_dir and logo.is_file() else b"",
        )


def find_specs() -> dict[str, _Spec]:
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().get_all_specs()
    specs = {}
    for name, entry in found.items():
        spec, resource_dir = dict(entry["spec"]), str(entry["resource_dir"])
        if name != "python3" and _runs_here(spec):
            specs[name] = _make_spec(name, spec, resource_dir)
    native = found.get("python3", {}).get("resource_dir", "")
    return {"python3": _our_python(str(native)), **specs}


def _our_python(resource_dir: str) -> _Spec:
    spec = {
        "argv": [
            sys.executable,
            "-Xfrozen_modules=off",
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            OUTPUT_WAITS,
        ],
        "display_name": "Python 3",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {"debugger": True},
    }
    return _make_spec("python3", spec, resource_dir)


def _make_spec(name: str, spec: dict[str, Any], resource_dir: str) -> _Spec:
    argv = [str(argument) for argument in spec["argv"]]
    if argv[0] in ("python", "python3", f"python3.{sys.version_info[1]}"):
        argv[0] = sys.executable  # as Jupyter does
    folders = [resource_dir] if resource_dir else []
    if argv[0] == sys.executable:
        folders += [sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))]
        if site.ENABLE_USER_SITE:
            folders.append(site.getusersitepackages())
    elif program := shutil.which(argv[0]):
        folders += _program_folders(program)
    return _Spec(name, spec, argv, resource_dir, tuple(folders))


def _program_folders(program: str) -> Iterator[str]:
    """Where a program and what belongs to it lie: `/opt/x` for `/opt/x/bin/program`."""
    for path in {Path(program), Path(program).resolve()}:
        prefix = path.parent.parent
        # ~/bin/program must not open all of the home.
        is_wide = prefix in (Path("/"), Path.home()) or prefix in Path.home().parents
        yield str(path.parent if is_wide else prefix)


def _runs_here(spec: Mapping[str, Any]) -> bool:
    """Not those that lead back to us, for ever, nor those that another provisioner runs."""
    metadata = spec.get("metadata") or {}
    provisioner = metadata.get("kernel_provisioner", {}).get(
        "provisioner_name", "local-provisioner"
    )
    is_ours = "sorna" in metadata
    return bool(spec.get("argv")) and not is_ours and provisioner == "local-provisioner"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _tail(path: Path, lines: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 1_000_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:]) + "\n"
    except OSError:
        return ""

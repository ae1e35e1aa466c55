"""The container contract: what a kernel's container may do, who it is, and where it lives.

`ipc` sockets in a directory of the host mounted at /run/sorna; an ordinary uid, no capabilities, no
new privileges, our own seccomp profile; a read-only root with small tmpfs for home and /tmp; limits
on memory, cpu, processes, files and log. A kernel's home starts as a copy of the image's /etc/skel,
and anew with every restart.

No engine here; used by `docker`, which hands these options to the SDK.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorna_agent.runtimes import (
    CONNECTION_FILE,
    HOME,
    INSIDE,
    PORTS,
    SOCKET_PREFIX,
    Launch,
    check_env,
    check_path,
    expand_argv,
    expand_env,
    remove_directory,
)
from sorna_jupyter.protocol import ImageStatus, Limits

KERNEL_LABEL = "sorna.kernel-id"
AGENT_LABEL = "sorna.agent-id"
OWNER_LABEL = "sorna.owner"

UID = 1000
CPU_PERIOD = 100_000  # microseconds

# argv follows as positional parameters, so nothing of it is ever parsed by the shell.
LAUNCHER = """\
cp -R /etc/skel/. "$HOME"/ 2>/dev/null
mkdir -p -- "$HOME/$1" && cd -- "$HOME/$1" && shift && exec "$@"
"""

SECCOMP = (Path(__file__).parent / "seccomp.json").read_text()


def container_name(kernel_id: str) -> str:
    return f"sorna-kernel-{kernel_id}"


def container_options(
    launch: Launch,
    image: ImageStatus,
    limits: Limits,
    cores: float,
    identity: Identity,
    agent_id: str,
) -> dict[str, Any]:
    """The container contract, as arguments of the SDK's `create`."""
    assert limits.memory and limits.disk
    # Everything on a tmpfs counts as memory: home, /tmp and shm together must fit in below it.
    disk = min(limits.disk, limits.memory // 3)
    shm = min(64 << 20, limits.memory // 8)
    base_env = {"HOME": HOME, "USER": "sorna", "LOGNAME": "sorna", "LANG": "C.UTF-8"}
    tmpfs = f"rw,nosuid,nodev,exec,size={disk}"
    return {
        "entrypoint": ["/bin/sh", "-c", LAUNCHER, "sh", check_path(launch.path)],
        "command": expand_argv(
            image.spec["argv"], {"connection_file": f"{INSIDE}/{CONNECTION_FILE}"}
        ),
        "environment": {
            **base_env,
            **expand_env(image.spec.get("env", {}), base_env),
            **check_env(launch.env),
        },
        "labels": {
            KERNEL_LABEL: launch.kernel_id,
            AGENT_LABEL: agent_id,
            OWNER_LABEL: launch.owner,
        },
        "working_dir": HOME,
        "user": f"{identity.uid}:{identity.gid}",
        "mounts": [{"Target": INSIDE, "Source": str(launch.directory), "Type": "bind"}],
        "network_mode": "none",
        "read_only": True,
        "tmpfs": {
            HOME: f"{tmpfs},mode=0700,uid={identity.uid},gid={identity.gid}",
            "/tmp": f"{tmpfs},mode=1777",
        },
        "ipc_mode": "private",
        "shm_size": shm,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges", f"seccomp={SECCOMP}"],
        "init": True,
        "mem_limit": limits.memory,
        "memswap_limit": limits.memory,
        "cpu_period": CPU_PERIOD,
        "cpu_quota": max(1000, int(cores * CPU_PERIOD)),
        "pids_limit": limits.pids,
        "ulimits": [
            {"Name": "nofile", "Soft": 4096, "Hard": 16384},
            {"Name": "fsize", "Soft": limits.disk, "Hard": limits.disk},
            {"Name": "core", "Soft": 0, "Hard": 0},
        ],
        "log_config": {"type": "json-file", "config": {"max-size": "1m", "max-file": "2"}},
        "healthcheck": {"test": ["NONE"]},
        "restart_policy": {"Name": "no"},
    }


@dataclass(frozen=True)
class Identity:
    """Who the kernel is, in the container and seen from the host."""

    uid: int
    gid: int
    host_uid: int
    host_gid: int


def choose_identity(info: dict[str, Any], agent_uid: int, agent_gid: int) -> Identity:
    """An ordinary user whose files the agent can reach: uid 1000 for an agent that is root, and
    may therefore hand over the directory; otherwise the agent's own user."""
    options = [str(option) for option in info.get("SecurityOptions") or ()]
    if any("rootless" in option for option in options):
        # Root of a rootless engine's containers *is* the unprivileged user who runs the engine.
        return Identity(0, 0, agent_uid, agent_gid)
    if agent_uid != 0:
        return Identity(agent_uid, agent_gid, agent_uid, agent_gid)
    shift_uid = shift_gid = 0
    if any("userns" in option for option in options):
        # The engine names its root folder after the first uid and gid of its mapping.
        uid, dot, gid = Path(info.get("DockerRootDir", "")).name.partition(".")
        if dot and uid.isdigit() and gid.isdigit():
            shift_uid, shift_gid = int(uid), int(gid)
    return Identity(UID, UID, shift_uid + UID, shift_gid + UID)


def hand_over(directory: Path, connection_file: Path, identity: Identity) -> None:
    """The kernel's directory to the kernel, and to nobody else."""
    directory.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(directory, identity.host_uid, identity.host_gid)
        os.chown(connection_file, identity.host_uid, identity.host_gid, follow_symlinks=False)


async def seal_when_bound(directory: Path) -> None:
    """Once its sockets are there, the kernel may write no more into a directory of the host, where
    no limit on disk holds. Works for an agent that is root; others share the kernel's uid."""
    sockets = {f"{SOCKET_PREFIX}-{port}" for port in PORTS.values()}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if sockets <= set(os.listdir(directory)):
                await asyncio.to_thread(seal, directory, sockets)
                return
        await asyncio.sleep(0.05)


async def wait_until_overfull(directory: Path) -> None:
    """Where the directory can't be sealed: returns once the kernel abuses it as a disk."""
    while not await asyncio.to_thread(_is_overfull, directory):
        await asyncio.sleep(2)


def _is_overfull(directory: Path, most_bytes: int = 16 << 20, most_entries: int = 100) -> bool:
    size = entries = 0
    for parent, folders, files in os.walk(directory):
        entries += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_blocks * 512
        if size > most_bytes or entries > most_entries:
            return True
    return False


def seal(directory: Path, sockets: set[str]) -> None:
    """Take the directory back from its kernel, and remove what should not be in it."""
    gid = directory.stat().st_gid
    os.chown(directory, 0, gid)
    directory.chmod(0o750)
    for entry in os.scandir(directory):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            remove_directory(path)
        elif entry.name == CONNECTION_FILE and entry.is_file(follow_symlinks=False):
            os.chown(path, 0, gid, follow_symlinks=False)
            path.chmod(0o640)
        elif entry.name not in sockets:
            path.unlink()

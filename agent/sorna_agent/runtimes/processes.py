"""Processes as /proc shows them: finding a kernel's again, and everything that it left behind.

Used by `local`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

KERNEL_MARK = "SORNA_KERNEL_ID"
AGENT_MARK = "SORNA_AGENT_ID"
"""Stand in the environment of every process that a kernel starts, unless one hides on purpose."""


def recorded_pid(directory: Path) -> int | None:
    """Its process id, if that is still the same process."""
    try:
        record = json.loads((directory / "process.json").read_text())
        pid = int(record["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    started = start_time(pid)
    return pid if started and started == record.get("started") else None


def start_time(pid: int) -> str:
    """Clock ticks since boot; empty if there is no such process or only its remains."""
    try:
        # The second field, the name, may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def innermost(pid: int) -> int:
    """The kernel itself: bubblewrap stands before it twice, outside and inside."""
    while True:
        try:
            is_bubble = Path(f"/proc/{pid}/comm").read_text().strip() == "bwrap"
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return pid
        if not is_bubble or not children:
            return pid
        pid = int(children[0])


def marked_processes(mark: str, value: str) -> Iterator[tuple[int, str]]:
    """Process and kernel id of everything that was started with this mark in its environment."""
    wanted = f"{mark}={value}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables:
            prefix = f"{KERNEL_MARK}=".encode()
            ids = [v[len(prefix) :].decode() for v in variables if v.startswith(prefix)]
            yield int(process.name), ids[0] if ids else ""


def kill_stragglers(kernel_id: str) -> None:
    for pid, _ in list(marked_processes(KERNEL_MARK, kernel_id)):
        kill(pid)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def own_threads() -> int:
    uid = os.geteuid()
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == uid:
                count += len(os.listdir(process / "task"))
    return count

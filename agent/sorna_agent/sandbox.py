"""Turns its own process into a kernel's, with less rights: a program that `runtimes.local` starts.

Reads one `Order` as JSON from stdin, which keeps the kernel's environment out of `ps` and away from
this program (an LD_PRELOAD in it takes effect only where the kernel is locked up already). Then it
gives up what the order says, for good, and executes the kernel in its own place. Imports nothing
of the agent, so that it starts fast and runs as a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Iterable
from typing import TypedDict

PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38


class Order(TypedDict):
    argv: list[str]
    env: dict[str, str]
    cwd: str
    rlimits: dict[str, int]
    """by the names of `resource`: RLIMIT_DATA, RLIMIT_FSIZE, …"""
    landlock: bool
    read: list[str]
    """with Landlock: what may be read and executed"""
    write: list[str]
    """with Landlock: what may be changed"""
    bwrap: list[str]
    """arguments for bubblewrap, which then starts the kernel; empty: without it"""


def main() -> None:
    order: Order = json.load(sys.stdin.buffer)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    set_limits(order["rlimits"])
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    if order["bwrap"]:
        # It drops what it needed itself; and its arguments hold the environment: not for `ps`.
        arguments = _memory_file("\0".join(order["bwrap"]))
        os.execvpe("bwrap", ["bwrap", "--args", str(arguments), "--", *order["argv"]], os.environ)
    drop_capabilities()
    try:
        os.chdir(order["cwd"])
    except OSError:
        os.chdir(order["env"]["HOME"])
    if order["landlock"]:
        restrict_files(order["read"], order["write"])
    # What this process was given itself are only the marks by which stragglers are found.
    os.execvpe(order["argv"][0], order["argv"], {**order["env"], **_marks()})


def set_limits(limits: dict[str, int]) -> None:
    """None of these is above what this process has itself."""
    for name, value in limits.items():
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(number, (value, value))


def drop_capabilities() -> None:
    """Matters for root only: what it executes next has no capabilities left to get."""
    if os.geteuid() == 0:
        for capability in range(64):
            _prctl(PR_CAPBSET_DROP, capability)


def restrict_files(read: Iterable[str], write: Iterable[str]) -> None:
    from landlock import FSAccess, Ruleset

    everything: FSAccess = FSAccess.all()  # type: ignore[no-untyped-call]  # the package has no types
    files: FSAccess = FSAccess.all_file()  # type: ignore[no-untyped-call]
    readable = FSAccess.READ_FILE | FSAccess.READ_DIR | FSAccess.EXECUTE
    rules = Ruleset()
    for access, paths in ((readable, read), (everything, write)):
        for path in paths:
            if os.path.exists(path):
                rules.allow(path, rules=access if os.path.isdir(path) else access & files)
    rules.apply()  # type: ignore[no-untyped-call]


def _marks() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name.startswith("SORNA_")}


def _memory_file(text: str) -> int:
    descriptor = os.memfd_create("arguments", 0)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # goes to the kernel's log, of which its death tells the last line
        sys.exit(f"the kernel could not be started: {error}")

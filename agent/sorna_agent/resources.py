"""What this machine has to give, as far as this process may use it."""

from __future__ import annotations

import os
from pathlib import Path

from sorna_jupyter.protocol import Slots

MEMORY_A_KERNEL = 256 << 20
"""bytes; how many kernels an agent offers, where nobody says"""
FEWEST_KERNELS = 4


def find_slots(max_kernels: int | None = None, overcommit: float = 1.0) -> Slots:
    """`overcommit`: how many times over the memory may be promised to kernels."""
    memory = usable_memory()
    kernels = max_kernels or max(FEWEST_KERNELS, memory // MEMORY_A_KERNEL)
    return Slots(cpus=usable_cpus(), memory=int(memory * overcommit), kernels=kernels)


def usable_cpus() -> float:
    """Cores: the affinity mask, cut by a cgroup's quota."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, period = _cpu_quota()
    return min(cores, quota / period) if quota > 0 and period > 0 else cores


def usable_memory() -> int:
    """Bytes: physical memory, cut by a cgroup's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (
        _read_number("/sys/fs/cgroup/memory.max"),
        _read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    )
    return min(physical, *(limit for limit in limits if limit > 0), physical)


def _cpu_quota() -> tuple[int, int]:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota), int(period)
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return (
            _read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
            _read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
        )


def _read_number(path: str) -> int:
    """-1 where there is none, or no limit."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return -1

"""What a server's processes cost: processor time and memory, from /proc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

Roles = Mapping[str, int]
"""Role ("gateway", "agent", "relay") -> process id."""


@dataclass(frozen=True)
class Usage:
    """Of each role."""

    cpu: dict[str, float]
    """seconds since the process began, in user and kernel mode"""
    memory: dict[str, int]
    """resident bytes"""

    @classmethod
    def of(cls, roles: Roles) -> Usage:
        """Raises FileNotFoundError if one of them has ended."""
        cpu, memory = {}, {}
        for role, pid in roles.items():
            # After the name, which may hold spaces: fields 3 and on of proc(5).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu[role] = (int(fields[11]) + int(fields[12])) / TICKS
            memory[role] = int(fields[21]) * PAGE
        return cls(cpu, memory)

    def cpu_since(self, earlier: Usage) -> dict[str, float]:
        return {role: spent - earlier.cpu.get(role, 0.0) for role, spent in self.cpu.items()}

    def memory_since(self, earlier: Usage) -> dict[str, int]:
        return {role: size - earlier.memory.get(role, 0) for role, size in self.memory.items()}


def marked(mark: str) -> dict[int, str]:
    """Process id -> command line of every process with `mark` (NAME=value) in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
        except OSError:
            continue  # it ended, or is someone else's
    return found

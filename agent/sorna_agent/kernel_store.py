"""The agent's own record of its kernels, so that a restarted agent knows whose they are.

One JSON file, 0600 (it holds keys and environments), replaced as a whole. Used by `agent`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sorna_agent.runtimes import Started
from sorna_jupyter.protocol import CreateKernel, KernelStatus


@dataclass
class KernelRecord:
    """One kernel: what was asked for, and what became of it."""

    request: CreateKernel
    key: str
    directory: str
    status: KernelStatus = KernelStatus.PREPARING
    reason: str = ""
    started: Started | None = None
    kernel_info: dict[str, Any] = field(default_factory=dict)
    execution_state: str = "starting"
    last_activity: float = 0.0
    seq: int = 0
    """number of the last message that `execution_state` tells of"""


class KernelStore:
    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[KernelRecord]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        return msgspec.json.decode(data, type=list[KernelRecord])

    def save(self, records: list[KernelRecord]) -> None:
        """Raises OSError; what was saved before stands then."""
        write_private(self._path, msgspec.json.encode(records))


def write_private(path: Path, data: bytes) -> None:
    """Whole or not at all, and for this user only. Raises OSError."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink()  # on a full disk, what was written of it would stand in others' way
        raise

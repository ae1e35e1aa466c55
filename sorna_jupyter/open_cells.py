"""Who executes which cells, on disk: so that a gateway that is started anew knows who went away.

A file of this user's alone, one JSON line an event, appended and not synced: it survives the end of
this process by whatever signal. A disk that fails costs the record, never a cell. Used by
`unattended`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from sorna_jupyter.cells import Execution

log = logging.getLogger(__name__)

LEAST_REWRITTEN = 4 << 20
"""bytes from which on the file is made anew when half of it is history"""

ClientId = tuple[str, str]
"""kernel and client session"""


class Executed(msgspec.Struct, tag="executed"):
    """An `execute_request` went to the kernel; what the cell was at before is history."""

    client: ClientId
    execution: Execution


class Answered(msgspec.Struct, tag="answered"):
    """The client has the answer, since `at` (Unix time)."""

    client: ClientId
    msg_id: str
    at: float


class Done(msgspec.Struct, tag="done"):
    """The client is gone and its cells are written, or it never needed that."""

    client: ClientId


Event = Executed | Answered | Done

_decode = msgspec.json.Decoder(Event).decode
_encode = msgspec.json.Encoder().encode


class OpenCells:
    def __init__(self, path: Path | None) -> None:
        """What is in the file is read at once; None: nothing is kept."""
        self.clients: dict[ClientId, dict[str, Execution]] = {}
        """their executions, by `msg_id`"""
        self._path = path
        self._fd = -1
        self._size = 0
        self._limit = 0
        self._has_warned = False
        if path is not None and path.exists():
            self._read(path)

    def close(self) -> None:
        """What is noted afterwards is lost."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._path = None

    def note(self, event: Event) -> None:
        self._apply(event)
        if self._path is None:
            return
        try:
            if self._fd < 0 or self._size > self._limit:
                self._rewrite(self._path)
            else:
                self._write(self._fd, _line(event))
        except OSError as error:
            self._give_up(self._path, error)

    def _apply(self, event: Event) -> None:
        match event:
            case Executed():
                for (kernel_id, _), executions in self.clients.items():
                    if kernel_id == event.client[0]:
                        for other in list(executions.values()):
                            if other.cell_id == event.execution.cell_id:
                                del executions[other.msg_id]
                executions = self.clients.setdefault(event.client, {})
                executions[event.execution.msg_id] = event.execution
            case Answered():
                execution = self.clients.get(event.client, {}).get(event.msg_id)
                if execution is not None:
                    execution.answered_at = event.at
            case Done():
                self.clients.pop(event.client, None)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            log.warning("%s: who was away is not known: %s", path, error)
            return
        for line in lines:
            try:
                self._apply(_decode(line))
            except ValueError:
                # Of a process that was killed while it wrote, or on a disk that was full.
                log.warning("%s: a line that is none is left out", path)

    def _rewrite(self, path: Path) -> None:
        """With what counts now alone. Raises OSError."""
        if self._fd >= 0:
            os.close(self._fd)
        draft = _draft_of(path)
        self._fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._write(self._fd, b"".join(map(_line, self._events())))
        self._limit = max(LEAST_REWRITTEN, 2 * self._size)
        draft.replace(path)

    def _events(self) -> Iterable[Event]:
        for client, executions in self.clients.items():
            for execution in executions.values():
                yield Executed(client, execution)

    def _write(self, fd: int, data: bytes) -> None:
        written = os.write(fd, data)
        self._size += written
        if written < len(data):
            raise OSError("only a part could be written")

    def _give_up(self, path: Path, error: OSError) -> None:
        """Until the next event, which makes the file anew."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: a restarted server will not know whose cells run: %s", self._path, error
            )
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _draft_of(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _line(event: Event) -> bytes:
    return _encode(event) + b"\n"

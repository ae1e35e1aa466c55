"""One run: code that is executed on a kernel without a notebook, from its request to its result.

Its outputs are what `outputs` folds from the messages it is told of. What happens is kept as
numbered events, so that a reader can come late, fall behind or come back. No I/O: `runs` carries
the messages and watches the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import msgspec

from sorna_jupyter.outputs import Change, Output, Outputs, decode

EOF = "\x04"
"""an `input_reply` that ends `input()` with EOFError"""


class RunStatus(enum.StrEnum):
    """`queued → running ⇄ waiting-input → ok | error | aborted | timeout | lost`."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING_INPUT = "waiting-input"
    OK = "ok"
    ERROR = "error"
    ABORTED = "aborted"
    TIMEOUT = "timeout"
    LOST = "lost"

    @property
    def is_final(self) -> bool:
        return self not in (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING_INPUT)


class Execute(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What to run, and how."""

    code: str
    stdin: str | list[str] | None = None
    """answers `input()`, line by line; after the last one `input()` raises EOFError, or, with
    `allow_stdin`, waits for `POST …/input`"""
    timeout: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] | None = None
    """seconds from when the code starts (waiting behind other code is not counted); then the
    kernel is interrupted"""
    silent: bool = False
    store_history: bool | None = None
    """by default unless silent"""
    allow_stdin: bool = False


class RunError(msgspec.Struct):
    ename: str = ""
    evalue: str = ""
    traceback: list[str] = []


class Timings(msgspec.Struct):
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    seconds: float | None = None
    """from started to finished"""


class InputRequest(msgspec.Struct):
    prompt: str = ""
    password: bool = False


class RunSummary(msgspec.Struct, kw_only=True):
    id: str
    kernel_id: str
    status: RunStatus
    execution_count: int | None
    error: RunError | None
    reason: str | None
    """why it timed out, was aborted or lost"""
    input_request: InputRequest | None
    """what `input()` asks while the run waits for it"""
    timings: Timings


class RunResult(RunSummary, kw_only=True):
    """All that is known of a run."""

    outputs: list[Output]
    truncated: bool
    """whether output was left out because it was too much"""
    next_event: int
    """the number that the next event will have"""


class StatusChanged(msgspec.Struct, tag_field="type", tag="status"):
    run_id: str
    status: RunStatus
    execution_count: int | None = None
    seq: int = -1


class InputRequested(msgspec.Struct, tag_field="type", tag="input_request"):
    """`input()` waits: `POST …/runs/{run_id}/input {"value"}`."""

    prompt: str
    password: bool
    seq: int = -1


class OutputsReset(msgspec.Struct, tag_field="type", tag="reset"):
    """This reader is so late that events were forgotten: `outputs` is the whole list instead."""

    outputs: list[Output]
    seq: int = -1


class Finished(msgspec.Struct, tag_field="type", tag="result"):
    """The last event."""

    run: RunResult
    seq: int = -1


Event = Change | StatusChanged | InputRequested | OutputsReset | Finished


class LoggedEvent(NamedTuple):
    seq: int
    type: str
    data: bytes
    """JSON, with `seq` and `type` in it"""


class _ReplyContent(msgspec.Struct):
    status: str = "ok"
    execution_count: int | None = None
    payload: list[dict[str, Any]] | None = None
    ename: str = ""
    evalue: str = ""
    traceback: list[str] = []


class Run:
    """One run: what is known of it, and the numbered events that told it. Does no I/O."""

    def __init__(self, run_id: str, kernel_id: str, owner: str, request: Execute, max_bytes: int):
        self.id = run_id
        self.kernel_id = kernel_id
        self.owner = owner
        self.request = request
        self.status = RunStatus.QUEUED
        self.execution_count: int | None = None
        self.outputs = Outputs(max_bytes)
        self.error: RunError | None = None
        self.reason: str | None = None
        self.input_request: InputRequest | None = None
        self.timings = Timings(created=datetime.now(UTC))
        self.answers = _lines(request.stdin)
        self.over = asyncio.Event()

        self.reply: _ReplyContent | None = None
        self.is_idle = False
        self.timed_out: str | None = None
        """why, once it was interrupted for it"""

        self._started_at = 0.0
        self._events: deque[LoggedEvent] = deque()
        self._events_size = 0
        self._max_events_size = max_bytes
        self._next_seq = 0
        self._changed = asyncio.Event()
        self._log(StatusChanged(self.id, self.status))

    @property
    def is_over(self) -> bool:
        return self.status.is_final

    @property
    def size(self) -> int:
        """bytes that it holds, roughly"""
        return self.outputs.size + self._events_size + len(self.request.code)

    def summary(self) -> RunSummary:
        return RunSummary(**self._known())

    def result(self) -> RunResult:
        return RunResult(
            **self._known(),
            outputs=self.outputs.as_list(),
            truncated=self.outputs.truncated,
            next_event=self._next_seq,
        )

    def _known(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in RunSummary.__struct_fields__}

    # -- what happens to it

    def start(self, execution_count: int | None = None) -> None:
        """The kernel took it up. Safe to repeat; a later one may know the execution count."""
        if self.is_over:
            return
        news = self.status is RunStatus.QUEUED or execution_count is not None
        if self.status is RunStatus.QUEUED:
            self.status = RunStatus.RUNNING
            self.timings.started = datetime.now(UTC)
            self._started_at = time.monotonic()
        if execution_count is not None:
            self.execution_count = execution_count
        if news:
            self._log(StatusChanged(self.id, self.status, self.execution_count))

    def take_output(self, msg_type: str, content: bytes) -> None:
        """Raises `ValueError` for malformed content.

        Output of a background thread may come when the run is over: it is kept, but a stream of
        events has its end.
        """
        for change in self.outputs.apply(msg_type, content):
            if not self.is_over:
                self._log(change)

    def note_loss(self, reason: str) -> None:
        """Some of its output may be missing from here on."""
        text = f"[Output may be missing here: {reason}]\n"
        self.take_output("stream", msgspec.json.encode({"name": "stderr", "text": text}))

    def take_reply(self, content: bytes) -> None:
        self.reply = reply = decode(content, _ReplyContent)
        if reply.execution_count is not None:
            self.execution_count = reply.execution_count
        for payload in reply.payload or ():
            data = payload.get("data")
            if payload.get("source") == "page" and isinstance(data, dict):
                for change in self.outputs.add_page(data):
                    self._log(change)
        if reply.status == "error":
            self.error = RunError(reply.ename, reply.evalue, reply.traceback)

    def wait_for_input(self, request: InputRequest) -> None:
        self.start()
        self.status = RunStatus.WAITING_INPUT
        self.input_request = request
        self._log(InputRequested(request.prompt, request.password))

    def go_on(self) -> None:
        self.status = RunStatus.RUNNING
        self.input_request = None
        self._log(StatusChanged(self.id, self.status, self.execution_count))

    def verdict(self) -> tuple[RunStatus, str | None]:
        """How it ended, and why, now that the kernel is done with it."""
        if self.timed_out:
            return RunStatus.TIMEOUT, self.timed_out
        if self.reply is None:
            return RunStatus.LOST, "the kernel went idle without an answer"
        match self.reply.status:
            case "ok":
                return RunStatus.OK, None
            case "error":
                return RunStatus.ERROR, None
        return RunStatus.ABORTED, "code that ran before it failed or was interrupted"

    def end(self, status: RunStatus, reason: str | None = None) -> None:
        """Safe to repeat: the first end stands."""
        if self.is_over:
            return
        self.status = status
        self.reason = reason
        self.input_request = None
        self.timings.finished = datetime.now(UTC)
        if self._started_at:
            self.timings.seconds = round(time.monotonic() - self._started_at, 6)
        # Its `result` is made when it is read: no third copy of the outputs in memory.
        self._note("result", b"")
        self.over.set()

    # -- who looks on

    async def follow(
        self, start: int = 0, quiet_for: float = 15
    ) -> AsyncIterator[list[LoggedEvent]]:
        """Its events from number `start` on, as many at a time as there are, until the last.

        An empty list tells that nothing happened for `quiet_for` seconds.
        """
        seq = start
        while True:
            seq, events = self._read(seq)
            if events or not self.is_over:
                yield events
            if self.is_over and seq >= self._next_seq:
                return
            if seq >= self._next_seq:
                await _a_while(quiet_for, self._changed)

    async def settled(self) -> None:
        """Returns when it is over, or waits for input that only the caller can give."""
        while not self.is_over and self.status is not RunStatus.WAITING_INPUT:
            await self._changed.wait()

    def _read(self, seq: int) -> tuple[int, list[LoggedEvent]]:
        """Events from `seq` on, and the number of the one after them."""
        wanted = self._next_seq - seq
        events = list(itertools.islice(reversed(self._events), max(0, wanted)))[::-1]
        if self.is_over and events:
            finished = Finished(self.result(), self._next_seq - 1)
            events[-1] = events[-1]._replace(data=msgspec.json.encode(finished))
        if wanted > len(self._events):
            events = [self._reset(), *events[len(events) - self.is_over :]]
        return self._next_seq, events

    def _reset(self) -> LoggedEvent:
        """What stands for all events so far, but for the one that ends it."""
        seq = self._next_seq - 1 - self.is_over
        event = OutputsReset(self.outputs.as_list(), seq)
        return LoggedEvent(seq, "reset", msgspec.json.encode(event))

    def _log(self, event: Event) -> None:
        event.seq = self._next_seq
        self._note(str(event.__struct_config__.tag), msgspec.json.encode(event))

    def _note(self, kind: str, data: bytes) -> None:
        self._events.append(LoggedEvent(self._next_seq, kind, data))
        self._next_seq += 1
        self._events_size += len(data)
        while self._events_size > self._max_events_size and len(self._events) > 1:
            self._events_size -= len(self._events.popleft().data)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _lines(stdin: str | list[str] | None) -> deque[str] | None:
    """The answers that were given up front; None: none were, so `input()` may not be asked."""
    if stdin is None:
        return None
    return deque(stdin.splitlines() if isinstance(stdin, str) else stdin)


async def _a_while(seconds: float, event: asyncio.Event) -> None:
    """Returns when the event is set, or after that time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

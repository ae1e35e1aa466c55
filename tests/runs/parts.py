"""What the tests of runs share: a kernel that the test plays."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from sorna_jupyter.exceptions import (
    KernelNotFound,
    SornaError,
)
from sorna_jupyter.kernels import Kernel
from sorna_jupyter.protocol import Batch, KernelMessage, KernelStatus, Limits
from sorna_jupyter.run import Execute, Run

KERNEL_ID = "11111111-2222-4333-8444-555555555555"
PRINT = b'{"name": "stdout", "text": "x"}'


def new_run(max_bytes: int = 1 << 20, **request: Any) -> Run:
    return Run("run-1", KERNEL_ID, "ada", Execute(code="x", **request), max_bytes)


async def read(run: Run, start: int = 0) -> list[Any]:
    """Every event from `start` to the end of a run that is over, as a client parses it."""
    assert run.is_over
    events = [event async for batch in run.follow(start) for event in batch]
    parsed = [json.loads(event.data) for event in events]
    assert [(e.seq, e.type) for e in events] == [(p["seq"], p["type"]) for p in parsed]
    return parsed


class PlayedKernels:
    """In place of `Kernels`: one kernel, played by the test."""

    def __init__(self) -> None:
        self.kernel = Kernel(
            KERNEL_ID, "python3", "ada", "a", KernelStatus.RUNNING, 0.0, "", Limits(), None
        )
        self.sent: asyncio.Queue[tuple[str, Any, Any]] = asyncio.Queue()
        self.attached: list[tuple[str, Any]] = []
        self.interrupts: list[str] = []
        self.stopped: list[tuple[str, str]] = []
        self.journal: list[tuple[str, str, Any, dict[str, str]]] = []
        self.is_behind = False
        self.failure: SornaError | None = None
        self.interrupt_failure: SornaError | None = None

    # what `Runs` calls

    def get(self, kernel_id: str) -> Kernel:
        if kernel_id != KERNEL_ID:
            raise KernelNotFound(kernel_id)
        return self.kernel

    def attach(
        self, kernel_id: str, session_id: str, listener: Any, *, resumes: bool = False
    ) -> PlayedKernels:
        assert resumes
        self.attached.append((session_id, listener))
        return self

    async def catch_up(self) -> None:
        """What an earlier gateway left in the journal."""
        self.is_behind = True
        for message in self.journal:
            self.says(*message)
        self.is_behind = False

    def acknowledge(self, seq: int) -> None:
        self.journal.clear()

    def close(self) -> None:
        self.attached.pop()

    def send(self, channel: str, parts: list[bytes]) -> None:
        if self.failure:
            raise self.failure
        header, parent, _, content = map(json.loads, parts)
        self.sent.put_nowait((channel, {**header, "parent": parent}, content))

    async def interrupt(self, kernel_id: str) -> None:
        self.interrupts.append(kernel_id)
        if self.interrupt_failure:
            raise self.interrupt_failure

    async def start(self, **options: Any) -> Kernel:
        self.options = options
        return self.kernel

    async def stop(self, kernel_id: str, reason: str) -> None:
        self.stopped.append((kernel_id, reason))

    # what the test does

    def says(self, channel: str, msg_type: str, content: Any, parent: str | dict[str, str]) -> None:
        session_id, listener = self.attached[-1]
        header = {"msg_id": f"kernel-{msg_type}", "msg_type": msg_type}
        parent_header = {"msg_id": parent} if isinstance(parent, str) else parent
        parts = [json.dumps(part).encode() for part in (header, parent_header, {}, content)]
        session = "" if channel == "iopub" else session_id
        message = KernelMessage.of(KERNEL_ID, 1, session, channel, parts)
        listener.on_kernel_messages(Batch([message]))

    def is_now(self, status: KernelStatus, reason: str = "") -> None:
        self.kernel.status, self.kernel.reason = status, reason
        for _, listener in list(self.attached):
            listener.on_kernel_event(self.kernel)

    def busy(self, run: Run) -> None:
        self.says("iopub", "status", {"execution_state": "busy"}, run.id)

    def idle(self, run: Run) -> None:
        self.says("iopub", "status", {"execution_state": "idle"}, run.id)

    def reply(self, run: Run, **content: Any) -> None:
        self.says("shell", "execute_reply", {"status": "ok", **content}, run.id)

    def finish(self, run: Run) -> None:
        self.busy(run)
        self.reply(run)
        self.idle(run)

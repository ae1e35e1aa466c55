"""Runs code on kernels without a notebook, and asks kernels what an editor asks.

One client session a kernel, shared by all its runs: a run's id is its `execute_request`'s
`msg_id`, and what comes back finds its run by the parent's id. A run goes on whoever looks on or
leaves, and is kept for a while when it is over. What another gateway, or this one before it was
restarted, has run is read back from the kernel's journal. Used by `faces.rest`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from typing import Any

import msgspec

from sorna_jupyter.exceptions import (
    Conflict,
    InvalidRequest,
    KernelNotFound,
    RunNotFound,
    SornaError,
    Unavailable,
)
from sorna_jupyter.kernels import Kernel, Kernels
from sorna_jupyter.outputs import decode
from sorna_jupyter.protocol import (
    Batch,
    Gap,
    Header,
    KernelMessage,
    KernelStatus,
    Limits,
    Status,
    make_message,
)
from sorna_jupyter.run import EOF, Execute, InputRequest, Run, RunStatus
from sorna_jupyter.unanswered import wait_in_vain

log = logging.getLogger(__name__)

MiB = 1 << 20

SESSION = "sorna-runs"
"""the client session of all runs of a kernel, whichever gateway made them"""


class Runs:
    """Every run of this gateway, going on or over."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        max_run_size: int = 64 * MiB,
        keep_for: float = 3600.0,
        keep_count: int = 1000,
        keep_size: int = 256 * MiB,
        interrupt_grace: float = 10.0,
        settle_time: float = 10.0,
        answer_timeout: float = 10.0,
        linger: float = 60.0,
    ) -> None:
        """Times in seconds, sizes in bytes.

        `max_run_size`: of one run's outputs. A run that is over is kept `keep_for`, unless there
        are more than `keep_count` or `keep_size` in all: then the oldest go first.
        `interrupt_grace`: how long code may go on after its timeout's interrupt. `settle_time`:
        between a reply and its `idle`, which may come in either order. `answer_timeout`: for
        `complete` and the like. `linger`: how long an unused client session is kept.
        """
        self.kernels = kernels
        self.max_run_size = max_run_size
        self.keep_for = keep_for
        self.keep_count = keep_count
        self.keep_size = keep_size
        self.interrupt_grace = interrupt_grace
        self.settle_time = settle_time
        self.answer_timeout = answer_timeout
        self.linger = linger
        self._runs: dict[str, Run] = {}
        self._over: OrderedDict[str, int] = OrderedDict()
        """their sizes"""
        self._over_size = 0
        self._sessions: dict[str, _KernelSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Runs that go on are lost; kernels that were made for one run are stopped."""
        for session in list(self._sessions.values()):
            session.close("the gateway was stopped")
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- runs

    def submit(self, kernel_id: str, request: Execute) -> Run:
        """Run code on a kernel, behind what is queued there. Returns at once.

        A kernel that is still starting gets it when it is ready. Raises `InvalidRequest`,
        `KernelNotFound`, `Unavailable`.
        """
        if "\0" in request.code:
            raise InvalidRequest("The code has a NUL character in it")
        kernel = self._kernel(kernel_id)
        run = Run(str(uuid.uuid4()), kernel_id, kernel.owner, request, self.max_run_size)
        self._session(kernel).execute(run)
        self.add(run)
        return run

    async def run_once(
        self,
        request: Execute,
        *,
        owner: str,
        name: str | None = None,
        env: dict[str, str] | None = None,
        limits: Limits | None = None,
    ) -> Run:
        """Run code on a kernel of its own, which is stopped when the run is over."""
        if "\0" in request.code:
            raise InvalidRequest("The code has a NUL character in it")
        kernel = await self.kernels.start(owner=owner, name=name, env=env or {}, limits=limits)
        try:
            run = self.submit(kernel.id, request)
        except SornaError:
            await self.kernels.stop(kernel.id, "its one run could not start")
            raise
        self.in_background(self._stop_after(run), f"one run {run.id}")
        return run

    async def _stop_after(self, run: Run) -> None:
        await run.over.wait()
        try:
            await self.kernels.stop(run.kernel_id, "its one run is over")
        except KernelNotFound:
            pass  # it ended by itself, or its owner was quicker
        except SornaError as error:
            log.warning("kernel %s, made for one run, is not stopped: %s", run.kernel_id, error)

    async def find(self, run_id: str, kernel_id: str) -> Run:
        """Also one that this gateway did not make, while its kernel lives. Raises `RunNotFound`,
        `Unavailable`."""
        if run_id not in self._runs:
            await self._restore(kernel_id)
        return self.get(run_id, kernel_id)

    async def list_all(self, kernel_id: str) -> list[Run]:
        """As `list`, with those that this gateway did not make."""
        await self._restore(kernel_id)
        return self.list(kernel_id)

    async def _restore(self, kernel_id: str) -> None:
        try:
            session = self._session(self._kernel(kernel_id))
        except KernelNotFound:
            return  # what is known of it is in `_runs`
        try:
            async with asyncio.timeout(self.answer_timeout):
                await session.restored()
        except TimeoutError:
            raise Unavailable(f"The agent of kernel {kernel_id} does not answer") from None

    def add(self, run: Run) -> None:
        self._runs[run.id] = run

    def knows(self, run_id: str) -> bool:
        return run_id in self._runs

    def get(self, run_id: str, kernel_id: str | None = None) -> Run:
        """Also of a kernel that is gone. Raises `RunNotFound`."""
        run = self._runs.get(run_id)
        if run is None or kernel_id not in (None, run.kernel_id):
            raise RunNotFound(run_id)
        return run

    def list(self, kernel_id: str) -> list[Run]:
        """Oldest first."""
        return [run for run in self._runs.values() if run.kernel_id == kernel_id]

    def answer(self, run: Run, value: str) -> None:
        """What `input()` returns. Raises `Conflict` if the run does not wait for it."""
        session = self._sessions.get(run.kernel_id)
        if run.status is not RunStatus.WAITING_INPUT or session is None:
            raise Conflict(f"Run {run.id} does not wait for input: it is {run.status}")
        session.answer(run, value)
        run.go_on()

    # -- questions

    async def ask(self, kernel_id: str, msg_type: str, content: dict[str, Any]) -> dict[str, Any]:
        """The content of the kernel's reply to `complete_request` and the like.

        Raises `Unavailable` if it does not answer in time, as when it runs code.
        """
        session = self._session(self._kernel(kernel_id))
        return await session.ask(msg_type, content, self.answer_timeout)

    # -- inner workings

    def _kernel(self, kernel_id: str) -> Kernel:
        kernel = self.kernels.get(kernel_id)
        if kernel.status is KernelStatus.LOST:
            raise Unavailable(f"Kernel {kernel_id} is out of reach: {kernel.reason}")
        if kernel.status is KernelStatus.TERMINATING:
            raise KernelNotFound(kernel_id, "it is being stopped")
        return kernel

    def _session(self, kernel: Kernel) -> _KernelSession:
        session = self._sessions.get(kernel.id)
        if session is None:
            session = self._sessions[kernel.id] = _KernelSession(self, kernel)
        return session

    def forget_session(self, kernel_id: str) -> None:
        self._sessions.pop(kernel_id, None)

    def keep(self, run: Run) -> None:
        """The run is over: count it, and let the oldest go if that is too much."""
        self._over[run.id] = run.size
        self._over_size += run.size
        asyncio.get_running_loop().call_later(self.keep_for, self._let_go, run.id)
        while len(self._over) > self.keep_count or (
            self._over_size > self.keep_size and len(self._over) > 1
        ):
            self._let_go(next(iter(self._over)))

    def _let_go(self, run_id: str) -> None:
        size = self._over.pop(run_id, None)
        if size is None:
            return
        self._over_size -= size
        run = self._runs.pop(run_id)
        if session := self._sessions.get(run.kernel_id):
            session.forget(run_id)

    def in_background(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _KernelSession:
    """Our client session on one kernel: a `kernels.Listener`."""

    def __init__(self, runs: Runs, kernel: Kernel) -> None:
        self.kernel = kernel
        self._runs = runs
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, Run] = {}
        """also those that are over: a later cell may update their displays"""
        self._going_on: dict[str, Run] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """one a run: its timeout, then its grace, then its settling"""
        self._input_parents: dict[str, bytes] = {}
        self._questions: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._attachment = runs.kernels.attach(kernel.id, SESSION, self, resumes=True)
        self._used_at = self._loop.time()
        self._is_closed = False
        self._loop.call_later(runs.linger, self._close_if_unused)

    def execute(self, run: Run) -> None:
        request = run.request
        history = not request.silent if request.store_history is None else request.store_history
        content = {
            "code": request.code,
            "silent": request.silent,
            "store_history": history,
            "user_expressions": {},
            "allow_stdin": request.allow_stdin or request.stdin is not None,
            # Others' code that waits behind this has nothing to do with its errors.
            "stop_on_error": False,
        }
        self._send("shell", run.id, "execute_request", content)
        self._known[run.id] = self._going_on[run.id] = run

    async def restored(self) -> None:
        """Returns when all runs that the journal tells of are known."""
        await self._attachment.catch_up()

    async def ask(
        self, msg_type: str, content: dict[str, Any], timeout: float | None
    ) -> dict[str, Any]:
        """`timeout`: seconds; None: as long as the kernel lives."""
        question_id = str(uuid.uuid4())
        question: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._questions[question_id] = question
        try:
            self._send("shell", question_id, msg_type, content)
            async with asyncio.timeout(timeout):
                return await question
        except TimeoutError:
            state = self.kernel.execution_state
            raise Unavailable(
                f"Kernel {self.kernel.id} did not answer within {timeout:g} s: it is {state}"
            ) from None
        finally:
            del self._questions[question_id]

    def answer(self, run: Run, value: str) -> None:
        parent = self._input_parents.pop(run.id, b"{}")
        self._send("stdin", str(uuid.uuid4()), "input_reply", {"value": value}, parent)

    def forget(self, run_id: str) -> None:
        self._known.pop(run_id, None)

    def lose(self, reason: str) -> None:
        """No answer will come to whatever waits for one."""
        for run in list(self._going_on.values()):
            self._end(run, RunStatus.LOST, reason)
        for question in self._questions.values():
            if not question.done():
                question.set_exception(Conflict(f"No answer: {reason}"))

    def close(self, reason: str) -> None:
        self.lose(reason)
        self._attachment.close()
        self._runs.forget_session(self.kernel.id)
        self._is_closed = True

    def _close_if_unused(self) -> None:
        if self._is_closed:
            return
        unused_for = self._loop.time() - self._used_at
        if self._known or self._questions or unused_for < self._runs.linger:
            self._loop.call_later(self._runs.linger, self._close_if_unused)
        else:
            # What was read so far is not to be restored: nobody wants it any more.
            self._attachment.acknowledge(self.kernel.seq)
            self.close("unused")

    def _send(
        self,
        channel: str,
        msg_id: str,
        msg_type: str,
        content: dict[str, Any],
        parent: bytes = b"{}",
    ) -> None:
        self._used_at = self._loop.time()
        parts = make_message(
            msg_type,
            content,
            msg_id=msg_id,
            parent=parent,
            session=SESSION,
            username=self.kernel.owner,
        )
        self._attachment.send(channel, parts)

    # -- what comes from the kernel

    def on_kernel_messages(self, batch: Batch) -> None:
        for message in batch.messages:
            try:
                parent = decode(message.parts[1], _Parent)
                header = decode(message.parts[0], Header)
                if self._attachment.is_behind:
                    self._restore(parent)
                self._take(message, header.msg_type, parent.msg_id)
            except (ValueError, RecursionError) as error:
                # Kernels run what users write; what they send may be anything.
                log.warning("kernel %s sent what is no message: %s", self.kernel.id, error)

    def on_kernel_gap(self, gap: Gap) -> None:
        """Output may miss, or the answer itself."""
        for run in self._going_on.values():
            run.note_loss(gap.reason)
        if self._going_on:
            self._runs.in_background(self._end_if_lost(gap.reason), "look for lost answers")

    async def _end_if_lost(self, reason: str) -> None:
        ask = partial(self.ask, "kernel_info_request", {}, timeout=None)
        try:
            lost = await wait_in_vain(self._unanswered, ask)
        except SornaError:
            return  # the kernel is over, and `lose` has ended them
        for run_id in lost:
            self._end(self._going_on[run_id], RunStatus.LOST, f"its answer was lost: {reason}")

    def _unanswered(self) -> list[str]:
        return [run.id for run in self._going_on.values() if run.reply is None]

    def on_kernel_event(self, kernel: Kernel) -> None:
        if kernel.status is KernelStatus.RESTARTING:
            self.lose("the kernel was restarted")
        elif kernel.is_over:
            self.close(
                f"the kernel ended: {kernel.reason}" if kernel.reason else "the kernel ended"
            )

    def _restore(self, parent: _Parent) -> None:
        """A run that another gateway made, as far as the journal tells: not its timeout."""
        is_run = parent.session == SESSION and parent.msg_type == "execute_request"
        if not is_run or self._runs.knows(parent.msg_id):
            return
        request = Execute(code="", allow_stdin=True)
        run = Run(
            parent.msg_id, self.kernel.id, self.kernel.owner, request, self._runs.max_run_size
        )
        run.timings.created = parent.date or run.timings.created
        self._runs.add(run)
        self._known[run.id] = self._going_on[run.id] = run

    def _take(self, message: KernelMessage, msg_type: str, parent_id: str) -> None:
        content = message.parts[3]
        run = self._known.get(parent_id)
        if msg_type == "update_display_data":
            self._update_display(content)
        elif run is None:
            question = self._questions.get(parent_id)
            if question is not None and message.channel == "shell" and not question.done():
                question.set_result(decode(content, dict[str, Any]))
        elif message.channel == "stdin":
            self._take_input_request(run, message)
        elif msg_type == "execute_reply":
            run.take_reply(content)
            self._settle(run)
        elif msg_type == "status":
            self._take_status(run, decode(content, Status).execution_state)
        elif msg_type == "execute_input":
            told = decode(content, _ExecuteInput)
            run.request.code = run.request.code or told.code
            self._start(run, told.execution_count)
        elif message.channel == "iopub":
            run.take_output(msg_type, content)

    def _update_display(self, content: bytes) -> None:
        display_id = decode(content, _Update).transient.display_id
        for run in self._known.values():
            if run.outputs.shows(display_id):
                run.take_output("update_display_data", content)

    def _take_status(self, run: Run, state: str) -> None:
        if state == "busy":
            self._start(run)
        elif state == "idle":
            run.is_idle = True
            self._settle(run)

    def _take_input_request(self, run: Run, message: KernelMessage) -> None:
        self._input_parents[run.id] = message.parts[0]
        if run.answers:
            self.answer(run, run.answers.popleft())
        elif run.answers is not None and not run.request.allow_stdin:
            self.answer(run, EOF)
        else:
            run.wait_for_input(decode(message.parts[3], InputRequest))

    def _start(self, run: Run, execution_count: int | None = None) -> None:
        is_new = run.status is RunStatus.QUEUED
        run.start(execution_count)
        if is_new and run.request.timeout is not None:
            self._set_timer(run, run.request.timeout, self._time_out)

    def _time_out(self, run: Run) -> None:
        run.timed_out = f"interrupted after {run.request.timeout:g} s"
        self._set_timer(run, self._runs.interrupt_grace, self._give_up)
        self._runs.in_background(self._interrupt(run), f"interrupt run {run.id}")

    async def _interrupt(self, run: Run) -> None:
        try:
            await self._runs.kernels.interrupt(self.kernel.id)
        except (SornaError, TimeoutError) as error:
            run.timed_out = f"{run.timed_out}, but the kernel could not be: {error}"

    def _give_up(self, run: Run) -> None:
        grace = self._runs.interrupt_grace
        self._end(
            run, RunStatus.TIMEOUT, f"{run.timed_out}; {grace:g} s later the code still went on"
        )

    def _settle(self, run: Run) -> None:
        """Its reply or its idle came, in either order: it is over when both are there."""
        if run.id not in self._going_on:
            return
        if run.reply and run.is_idle:
            self._settled(run)
        else:
            self._set_timer(run, self._runs.settle_time, self._settled)

    def _settled(self, run: Run) -> None:
        self._end(run, *run.verdict())

    def _end(self, run: Run, status: RunStatus, reason: str | None = None) -> None:
        run.end(status, reason)
        self._going_on.pop(run.id, None)
        self._input_parents.pop(run.id, None)
        if timer := self._timers.pop(run.id, None):
            timer.cancel()
        self._runs.keep(run)

    def _set_timer(self, run: Run, delay: float, then: Callable[[Run], None]) -> None:
        if timer := self._timers.get(run.id):
            timer.cancel()
        self._timers[run.id] = self._loop.call_later(delay, then, run)


class _Parent(msgspec.Struct):
    msg_id: str = ""
    msg_type: str = ""
    session: str = ""
    date: datetime | None = None


class _ExecuteInput(msgspec.Struct):
    execution_count: int | None = None
    code: str = ""


class _Transient(msgspec.Struct, frozen=True):
    display_id: str = ""


class _Update(msgspec.Struct):
    transient: _Transient = _Transient()

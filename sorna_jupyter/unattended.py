"""Cells whose client is gone: their outputs go into the notebook, as they come and at the end.

Front-ends keep outputs in the page and save them with the notebook; of a page that is closed while
a cell runs, nobody would. The websockets tell `UnattendedCells` what their clients execute. When a
client goes and does not come back, what its cells write is read from the kernel's journal, folded
(`cells`) and merged into the notebook (`notebooks`). If it does come back, it gets everything
itself, and the notebook's file is its own again.

Cells that were answered before the client went are written along with those that were not, unless
the client has saved the notebook since: else there would be holes above the running cell.

Who executes what is kept on disk as well (`open_cells`): a gateway that is started anew, also after
`kill -9`, goes on with those who do not come back to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from sorna_jupyter.cells import Cells, Execution, read_execution
from sorna_jupyter.exceptions import SornaError
from sorna_jupyter.kernels import Kernel
from sorna_jupyter.notebooks import Notebooks
from sorna_jupyter.open_cells import Answered, Done, Executed, OpenCells
from sorna_jupyter.protocol import Gap, KernelMessage, KernelStatus

log = logging.getLogger(__name__)

MiB = 1 << 20

SHARE = 0.1
"""of the time may go into writing one client's notebooks: a big one is written less often"""

RETURN_GRACE = 10
"""times as long as usual, a gateway that was started anew waits for clients to come back: while it
is away, front-ends try ever less often"""

MAX_FAILURES = 6
"""in a row, each followed by a pause twice as long, before a notebook is given up"""


class Messages(Protocol):
    """`Kernels.messages`: what left a kernel, numbered `since` and higher, and what is lost of it,
    as many at a time as there are.

    With `follow` also what comes, until the kernel is over. Raises `SornaError`, and `TimeoutError`
    for a kernel that does not get ready.
    """

    def __call__(
        self, kernel_id: str, since: int, *, follow: bool
    ) -> AsyncGenerator[Sequence[KernelMessage | Gap], None]: ...


class UnattendedCells:
    """Who executes which cells, and the writing for those who went away."""

    def __init__(
        self,
        messages: Messages,
        notebooks: Notebooks,
        open_cells: OpenCells,
        *,
        grace: float = 3.0,
        interval: float = 1.0,
        max_cell_size: int = 64 * MiB,
        close_timeout: float = 10.0,
    ) -> None:
        """Times in seconds.

        `grace`: for a client to come back; front-ends do so about 1 s after a cut. `interval`: the
        least between two writings. `max_cell_size`: bytes of one cell's outputs. `close_timeout`:
        for the last writing when the server stops.
        """
        self.messages = messages
        self.notebooks = notebooks
        self.open_cells = open_cells
        self.grace = grace
        self.interval = interval
        self.max_cell_size = max_cell_size
        self.close_timeout = close_timeout
        self.writing = asyncio.Lock()
        """held while a notebook is written: two clients may have had the same one"""
        self._clients: dict[str, dict[str, _Client]] = {}
        """by kernel and session"""
        self._restarting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def resume(self, kernels: Iterable[Kernel]) -> None:
        """Take up what an earlier gateway left, for those of these kernels that still run."""
        running = {kernel.id: kernel for kernel in kernels if not kernel.is_over}
        for client_id, executions in list(self.open_cells.clients.items()):
            kernel_id, session_id = client_id
            if kernel_id not in running or _all_answered(executions):
                self.open_cells.note(Done(client_id))
                continue
            client = _Client(self, running[kernel_id], session_id)
            client.executions.update(executions)
            self._clients.setdefault(kernel_id, {})[session_id] = client
            client.leave(self.grace * RETURN_GRACE)

    async def close(self) -> None:
        """What is there is written; kernels that go on do so without us, until `resume`."""
        for clients in self._clients.values():
            for client in clients.values():
                client.stop()
        self._clients.clear()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.close_timeout)
            for task in late:
                log.warning("%s: not finished within %g s", task.get_name(), self.close_timeout)
                task.cancel()
        self.open_cells.close()

    # -- what websockets tell

    def connected(self, kernel: Kernel, session_id: str) -> None:
        client = self._find(kernel.id, session_id)
        if client is not None:
            client.come_back()

    def executed(self, kernel: Kernel, session_id: str, parts: list[bytes]) -> None:
        """An `execute_request` is on its way to the kernel."""
        try:
            execution = read_execution(parts, since=kernel.seq + 1)
        except (ValueError, RecursionError):
            return  # it is the kernel's to say so
        if execution is None:
            return
        clients = self._clients.setdefault(kernel.id, {})
        for other in clients.values():
            other.forget_cell(execution.cell_id)
        client = clients.get(session_id)
        if client is None:
            client = clients[session_id] = _Client(self, kernel, session_id)
        client.executions[execution.msg_id] = execution
        self.open_cells.note(Executed(client.id, execution))

    def answered(self, kernel_id: str, session_id: str, msg_id: str, seq: int) -> None:
        """The `execute_reply`, which is message number `seq`, is on its way to the client."""
        client = self._find(kernel_id, session_id)
        if client is not None and msg_id in client.executions:
            client.replies[msg_id] = seq

    def acknowledged(self, kernel_id: str, session_id: str, seq: int) -> None:
        """The client has everything up to this number."""
        client = self._find(kernel_id, session_id)
        if client is not None and client.replies:
            client.acknowledge(seq)

    def disconnected(self, kernel_id: str, session_id: str) -> None:
        client = self._find(kernel_id, session_id)
        if client is not None:
            client.leave(self.grace)

    # -- what kernels do

    def on_kernel_change(self, kernel: Kernel) -> None:
        if kernel.status is KernelStatus.RESTARTING:
            self._restarting.add(kernel.id)
            return
        if kernel.is_over:
            reason = f"The kernel ended: {kernel.reason}" if kernel.reason else "The kernel ended"
        elif kernel.status is KernelStatus.RUNNING and kernel.id in self._restarting:
            # Not before: what the old process had written is in the journal by now.
            reason = "The kernel was restarted"
        else:
            return
        self._restarting.discard(kernel.id)
        for client in list(self._clients.get(kernel.id, {}).values()):
            client.end(reason)

    # -- inner workings

    def _find(self, kernel_id: str, session_id: str) -> _Client | None:
        return self._clients.get(kernel_id, {}).get(session_id)

    def forget(self, client: _Client) -> None:
        clients = self._clients.get(client.kernel.id, {})
        if clients.get(client.session_id) is client:
            del clients[client.session_id]
            self.open_cells.note(Done(client.id))
        if not clients:
            self._clients.pop(client.kernel.id, None)

    def begin(self, absence: _Absence, name: str) -> None:
        task = asyncio.create_task(absence.run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", task.get_name(), exc_info=error)


class _Client:
    """One client session on one kernel: here, leaving (`_timer`), or absent (`_absence`)."""

    def __init__(self, service: UnattendedCells, kernel: Kernel, session_id: str) -> None:
        self.kernel = kernel
        self.session_id = session_id
        self.id = (kernel.id, session_id)
        self.executions: dict[str, Execution] = {}
        """by `msg_id`; the last one of each cell"""
        self.replies: dict[str, int] = {}
        """numbers of replies that are on their way, by `msg_id`"""
        self._service = service
        self._timer: asyncio.TimerHandle | None = None
        self._ended_by: str | None = None
        self._absence: _Absence | None = None

    def forget_cell(self, cell_id: str) -> None:
        """It is executed again: what it shows is the newer execution's."""
        for execution in list(self.executions.values()):
            if execution.cell_id == cell_id:
                del self.executions[execution.msg_id]
        if self._absence is not None:
            self._absence.cells.leave(cell_id, "it was executed again")

    def acknowledge(self, seq: int) -> None:
        arrived = [msg_id for msg_id, number in self.replies.items() if number <= seq]
        for msg_id in arrived:
            del self.replies[msg_id]
            if msg_id in self.executions:
                self.executions[msg_id].answered_at = now = time.time()
                self._service.open_cells.note(Answered(self.id, msg_id, now))

    def leave(self, grace: float) -> None:
        """`grace`: seconds for it to come back."""
        self.replies.clear()
        if _all_answered(self.executions):
            self._service.forget(self)
        else:
            self._timer = asyncio.get_running_loop().call_later(grace, self._go_absent)

    def come_back(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self._ended_by is not None:
                self.end(self._ended_by)
        if self._absence is not None:
            self._absence.call_off()
            self._absence = None

    def end(self, reason: str) -> None:
        """Its cells are over, whatever they were at."""
        if self._absence is not None:
            self._absence.end(reason)
        elif self._timer is not None:
            # It may still come back, and then it sees that itself.
            self._ended_by = reason
        else:
            self.executions.clear()  # it is here, and sees that itself
            self._service.forget(self)

    def stop(self) -> None:
        """The server stops: what is there is written, if the client is known to be gone."""
        if self._timer is not None:
            self._timer.cancel()
        if self._absence is not None:
            self._absence.end("")

    def _go_absent(self) -> None:
        self._timer = None
        self._absence = _Absence(self._service, self)
        what = f"the notebook of kernel {self.kernel.id} for session {self.session_id}"
        log.info("%s: its client is gone; outputs are written to the file", what)
        self._service.begin(self._absence, what)
        if self._ended_by is not None:
            self._absence.end(self._ended_by)


class _Absence:
    """A client's time away: reads what its cells write, and writes it down."""

    def __init__(self, service: UnattendedCells, client: _Client) -> None:
        self.cells = Cells(client.executions.values(), service.max_cell_size)
        self._service = service
        self._client = client
        self._kernel = client.kernel
        self._next = self.cells.since
        self._is_called_off = False
        self._ended = asyncio.Event()
        self._reason = ""
        self._news = asyncio.Event()
        self._lost = asyncio.Event()

    def call_off(self) -> None:
        """Its client is back: nothing more is written."""
        self._is_called_off = True
        self._ended.set()

    def end(self, reason: str) -> None:
        """Nothing more will come; safe to repeat: the first reason stands."""
        if not self._ended.is_set():
            self._reason = reason
            self._ended.set()

    async def run(self) -> None:
        reading = asyncio.create_task(self._read())
        reading.add_done_callback(lambda _: self._news.set())
        try:
            await self._write_until_done(reading)
            await reading
        finally:
            reading.cancel()
            if not self._is_called_off:
                self._tell_what_was_left()
                self._service.forget(self._client)

    # -- reading

    async def _read(self) -> None:
        while not self.cells.are_over:
            await self._follow()
            if self._is_called_off:
                return
            if not self.cells.are_over:
                await self._take(follow=False)  # what was still on its way
            if self._ended.is_set() or self.cells.are_doubtful:
                self.cells.end(self._reason)

    async def _follow(self) -> None:
        """Until the cells are over, or it is known otherwise that no more will come."""
        following = asyncio.create_task(self._take(follow=True))
        others = {self._ended.wait(), self._idle_in_doubt()}
        tasks = {following, *(asyncio.create_task(other) for other in others)}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not following.cancelled():
            following.result()

    async def _idle_in_doubt(self) -> None:
        """Returns when the kernel is idle and the end of its cells may be among what is lost."""
        await self._lost.wait()
        while not (self.cells.are_doubtful and self._kernel.execution_state == "idle"):
            await asyncio.sleep(self._service.interval)  # beats tell it, and nobody announces them

    async def _take(self, *, follow: bool) -> None:
        """Fold what comes until the cells are over, or no more will come."""
        try:
            messages = self._service.messages(self._kernel.id, self._next, follow=follow)
            async with aclosing(messages):
                async for items in messages:
                    for item in items:
                        self._take_one(item)
                        if self.cells.are_over:
                            return
            if follow:
                self.end("")  # the kernel is over
        except (SornaError, TimeoutError) as error:
            # A kernel that is over has no journal any more: nothing is amiss.
            self.end("" if self._kernel.is_over else f"The rest can't be read: {error}")

    def _take_one(self, item: KernelMessage | Gap) -> None:
        if isinstance(item, Gap):
            self._next = item.last + 1
            self.cells.lose(item)
            self._lost.set()
        else:
            self._next = item.seq + 1
            try:
                self.cells.take(item)
            except (ValueError, RecursionError) as error:
                # Kernels run what users write; what they send may be anything.
                log.warning("kernel %s sent what is no message: %s", self._kernel.id, error)
        self._news.set()

    # -- writing

    async def _write_until_done(self, reading: asyncio.Task[None]) -> None:
        clock = asyncio.get_running_loop().time
        pause = self._service.interval
        failures = 0
        while True:
            await self._news.wait()
            self._news.clear()
            is_last = reading.done()
            if self._is_called_off:
                return
            began = clock()
            trouble = await self._write()
            if trouble:
                failures += 1
                if failures == MAX_FAILURES:
                    log.warning("%s; outputs of its cells are not in it", trouble)
                    return
                pause *= 2
                self._news.set()
            else:
                failures = 0
                pause = max(self._service.interval, (clock() - began) / SHARE)
                if is_last:
                    return
            if is_last:
                await asyncio.sleep(pause)
            else:
                await asyncio.wait({reading}, timeout=pause)

    async def _write(self) -> str:
        """What is there now; returns what went wrong."""
        notebooks = self._service.notebooks
        trouble = []
        async with self._service.writing:
            try:
                paths = await notebooks.paths(self._kernel.id, self._kernel.owner)
            except SornaError as error:
                return error.message
            for path in paths:
                try:
                    await notebooks.edit(path, self._merge)
                except SornaError as error:
                    trouble.append(error.message)
        return "; ".join(trouble)

    def _merge(self, notebook: dict[str, Any], saved_at: float) -> bool:
        return not self._is_called_off and self.cells.merge_into(notebook, saved_at)

    def _tell_what_was_left(self) -> None:
        for cell in self.cells:
            if cell.has_begun and (why := cell.why_unwritten):
                what = (self._kernel.id, cell.execution.cell_id)
                log.info("kernel %s, cell %s: its outputs are in no notebook: %s", *what, why)


def _all_answered(executions: dict[str, Execution]) -> bool:
    return all(execution.answered_at for execution in executions.values())

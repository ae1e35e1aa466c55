"""The one service that every face uses: start, stop, interrupt, restart, attach.

What is true stands in the registry; `Kernels` keeps a view of it (`Kernel`, one object a kernel)
that faces may read without waiting, refreshed by every agent's beat and by what passes here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sorna_jupyter import protocol
from sorna_jupyter.agents import AgentPool
from sorna_jupyter.cursors import Attachment, Reading
from sorna_jupyter.exceptions import (
    AgentRefused,
    AgentUnreachable,
    IllegalTransition,
    KernelNotFound,
    KernelStartFailed,
    NoAgentAvailable,
    SornaError,
    Unavailable,
)
from sorna_jupyter.live import LiveState
from sorna_jupyter.protocol import (
    Activity,
    Batch,
    Beat,
    BeatReply,
    Gap,
    ImageStatus,
    KernelMessage,
    KernelReport,
    KernelStatus,
    Limits,
)
from sorna_jupyter.registry import IMAGE_RANK, AgentRow, KernelRow, Policy, Registry

log = logging.getLogger(__name__)

READ_TIMEOUT = 30.0
"""seconds for an agent to send on what is in a journal"""
STATES = [activity.execution_state for activity in Activity]


class Listener(Protocol):
    """Who attached to a kernel; called from the event loop, must not block or raise."""

    def on_kernel_messages(self, batch: Batch) -> None: ...

    def on_kernel_gap(self, gap: Gap) -> None:
        """What it can't be given any more."""

    def on_kernel_event(self, kernel: Kernel) -> None:
        """Its status changed: restarting, running again, lost, dead (with `kernel.reason`)."""


@dataclass(eq=False)
class Kernel:
    """This gateway's view of one kernel."""

    id: str
    name: str
    """of its kernelspec"""
    owner: str
    agent_id: str
    status: KernelStatus
    created_at: float
    path: str
    limits: Limits
    idle_timeout: float | None
    reason: str = ""
    revision: int = 0
    """of the registry's row that this is made from"""
    execution_state: str = "starting"
    last_activity: float = 0.0
    seq: int = 0
    """number of the last message that `execution_state` and `last_activity` tell of"""
    connections: int = 0
    kernel_info: dict[str, Any] | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """set while the kernel answers, and once it is over"""
    attached: list[_KernelAttachment] = field(default_factory=list, repr=False)
    readings: list[Reading] = field(default_factory=list, repr=False)
    unanswered: dict[str, dict[str, bytes]] = field(default_factory=dict, repr=False)
    """the headers of clients' execute_requests, by session and msg_id, until the reply is on its
    way: also of those who went away and may come back"""

    @property
    def is_over(self) -> bool:
        return self.status.is_final


class Kernels:
    """Every kernel that this gateway knows of."""

    def __init__(
        self,
        *,
        registry: Registry,
        live: LiveState,
        agents: AgentPool,
        policy: Policy,
        default_kernelspec: str = "python3",
        start_timeout: float = 60.0,
        start_wait: float = 10.0,
        image_timeout: float = 1800.0,
        lost_agent_timeout: float = 15.0,
        lost_kernel_timeout: float = 600.0,
        idle_timeout: float | None = None,
    ) -> None:
        """All times in seconds.

        `start_timeout`: from a container's start to its first answer. `start_wait`: how long
        `start` waits before it returns a kernel that is still starting. `image_timeout`: for
        building or fetching an image. `lost_agent_timeout`: silence after which an agent and its
        kernels are lost. `lost_kernel_timeout`: after which lost kernels are given up.
        `idle_timeout`: after which an idle kernel is stopped, unless its request said another.
        """
        self._registry = registry
        self._live = live
        self._agents = agents
        self._policy = policy
        self._default_kernelspec = default_kernelspec
        self._start_timeout = start_timeout
        self._start_wait = start_wait
        self._image_timeout = image_timeout
        self._lost_agent_timeout = lost_agent_timeout
        self._lost_kernel_timeout = lost_kernel_timeout
        self._idle_timeout = idle_timeout

        self._kernels: dict[str, Kernel] = {}
        self._ended: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._agent_rows: dict[str, AgentRow] = {}
        self._beats: dict[str, Beat] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.joined = asyncio.Event()
        """set once an agent has been heard"""
        self.on_beat: Callable[[Beat], None] = lambda beat: None
        """who wants to see the agents' progress: `app` shows it to people"""
        self.on_change: Callable[[Kernel], None] = lambda kernel: None
        """who wants to know of every change of a kernel's status, attached or not: `unattended`"""

    # -- life of the service

    async def load(self) -> None:
        """Read what the registry holds; before the first request is served."""
        for row in await self._registry.list_kernels():
            self._apply(row)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def sweep(self, interval: float = 1.0) -> None:
        """Runs for ever: agents that fell silent, kernels that stay lost or idle."""
        while True:
            await asyncio.sleep(interval)
            try:
                await self._sweep_once()
            except Exception:  # one round's failure must not end the sweep
                log.exception("the sweep could not be done")

    async def _sweep_once(self) -> None:
        now = time.time()
        for row in await self._registry.mark_lost_agents(self._lost_agent_timeout, now):
            self._apply(row)
        for row in await self._registry.end_lost_kernels(self._lost_kernel_timeout, now):
            self._apply(row)
        for kernel in list(self._kernels.values()):
            timeout = kernel.idle_timeout or self._idle_timeout
            if (
                timeout
                and kernel.status is KernelStatus.RUNNING
                and kernel.execution_state == "idle"
                and not kernel.connections
                and now - kernel.last_activity > timeout
            ):
                await self.stop(kernel.id, f"idle for {timeout:g} s")

    # -- agents

    async def hear(self, beat: Beat) -> BeatReply:
        """What `agents.HeartbeatListener` does with a beat."""
        try:
            outcome = await self._registry.record_beat(beat, time.time())
            await self._live.heard(beat.agent_id, time.time())
        except AgentRefused as refusal:
            log.warning("agent %s refused: %s", beat.agent_id, refusal)
            return BeatReply(accepted=False, reason=refusal.message)
        except Unavailable:
            known = self._beats.get(beat.agent_id)
            if known is None or known.public_key != beat.public_key:
                raise
            # The database is away, or its disk full; the gateway is here. Without an answer the
            # agent would take itself for an orphan and stop every kernel.
            return BeatReply(accepted=True)
        known = self._beats.get(beat.agent_id)
        self._beats[beat.agent_id] = beat
        self._agent_rows[beat.agent_id] = await self._registry.get_agent(beat.agent_id)
        for row in outcome.changed:
            self._apply(row)
        for report in beat.kernels:
            self._take_report(beat.agent_id, report)
        if known is None:
            log.info("agent %s joined: %s", beat.agent_id, beat.isolation)
            self._open_what_waits_for(beat.agent_id)
        elif known.relay_started != beat.relay_started:
            self._agents.reopen(self._agent_rows[beat.agent_id])
        self.joined.set()
        self.on_beat(beat)
        return BeatReply(accepted=True, destroy=outcome.destroy)

    def _open_what_waits_for(self, agent_id: str) -> None:
        for kernel in self._kernels.values():
            if kernel.agent_id == agent_id and kernel.ready.is_set():
                for attachment in list(kernel.attached):
                    self._open(attachment)

    def _take_report(self, agent_id: str, report: KernelReport) -> None:
        kernel = self._kernels.get(report.kernel_id)
        if kernel is None or kernel.is_over or kernel.agent_id != agent_id:
            return
        if kernel.status is KernelStatus.PREPARING:
            kernel.reason = report.reason
        elif report.seq >= kernel.seq:
            # Else what passed here has told us more already.
            kernel.execution_state = report.execution_state
        kernel.last_activity = max(kernel.last_activity, report.last_activity)

    async def wait_for_an_agent(self) -> bool:
        """Whether one has joined, in `start_wait` seconds at most.

        The embedded agent needs a second for it after the gateway's start; a page opened meanwhile
        would show no kernels for a minute.
        """
        return await _within(self._start_wait, self.joined)

    def kernelspecs(self) -> dict[str, ImageStatus]:
        """By name; where several agents have an image, the one that is nearest to ready."""
        best: dict[str, ImageStatus] = {}
        for beat in self._beats.values():
            for image in beat.images:
                other = best.get(image.name)
                if other is None or IMAGE_RANK[image.state] > IMAGE_RANK[other.state]:
                    best[image.name] = image
        return best

    def default_kernelspec(self) -> str:
        specs = self.kernelspecs()
        if self._default_kernelspec in specs or not specs:
            return self._default_kernelspec
        return next(iter(specs))

    async def build_images(self) -> None:
        """Ask every agent to build what it lacks; progress shows in `kernelspecs`."""
        for agent in list(self._agent_rows.values()):
            await self._agents.build_images(agent, [])

    # -- kernels

    async def start(
        self,
        *,
        owner: str,
        name: str | None = None,
        kernel_id: str | None = None,
        env: dict[str, str] | None = None,
        path: str = "",
        limits: Limits | None = None,
        idle_timeout: float | None = None,
        idempotency_key: str | None = None,
        wait: float | None = None,
    ) -> Kernel:
        """A kernel that answers, or after `wait` (or `start_wait`) seconds one that is starting.

        `path`: working directory relative to the kernel's home. Safe to repeat with the same
        `idempotency_key`: the same kernel comes back. Raises `UnknownKernelspec`, `KernelExists`,
        `LimitExceeded`, `NoAgentAvailable`, `KernelStartFailed`, `ImageUnavailable`, ….
        """
        if not await self.wait_for_an_agent():
            raise NoAgentAvailable("No agent has joined this gateway yet")
        row, created = await self._registry.reserve_kernel(
            kernel_id=kernel_id or str(uuid.uuid4()),
            name=name or self.default_kernelspec(),
            owner=owner,
            limits=limits or Limits(),
            path=path,
            idle_timeout=idle_timeout,
            policy=self._policy,
            idempotency_key=idempotency_key,
            now=time.time(),
        )
        kernel = self._apply(row)
        if created:
            request = protocol.CreateKernel(
                kernel_id=row.id,
                image=row.image,
                owner=owner,
                env=env or {},
                limits=row.limits,
                path=path,
                start_timeout=self._start_timeout,
            )
            task = self._in_background(self._start(kernel, request), f"start {row.id}")
            await asyncio.wait({task}, timeout=self._start_wait if wait is None else wait)
            if task.done():
                await task
        else:
            await _within(self._start_wait, kernel.ready)
        if kernel.is_over:
            raise KernelStartFailed(kernel.reason)
        return kernel

    async def _start(self, kernel: Kernel, request: protocol.CreateKernel) -> None:
        try:
            started = await self._agents.create_kernel(
                await self._agent_of(kernel), request, self._image_timeout + self._start_timeout
            )
        except SornaError as error:
            await self._end(kernel, KernelStatus.DEAD, error.message)
            await self._destroy(kernel)
            raise
        kernel.kernel_info = started.kernel_info
        await self._mark_running(kernel)
        log.info("kernel %s started on agent %s", kernel.id, kernel.agent_id)

    async def _mark_running(self, kernel: Kernel) -> None:
        try:
            self._apply(await self._registry.mark_running(kernel.id))
        except IllegalTransition:
            # Its owner stopped it, or its agent was lost, while it started: that stands.
            self._apply(await self._registry.get_kernel(kernel.id))
            raise KernelStartFailed(kernel.reason or f"it is {kernel.status}") from None

    async def wait_ready(self, kernel_id: str, timeout: float | None = None) -> Kernel:
        """The kernel, once it answers. Raises `KernelNotFound` if it ended, `TimeoutError`."""
        kernel = self.get(kernel_id)
        async with asyncio.timeout(timeout):
            await kernel.ready.wait()
        if kernel.is_over:
            raise KernelNotFound(kernel_id, kernel.reason)
        return kernel

    async def stop(self, kernel_id: str, reason: str = "shut down by its owner") -> None:
        """It and what it had is gone when this returns, or will be when its agent is back."""
        kernel = self.get(kernel_id)
        self._apply(await self._registry.mark_terminating(kernel_id, reason))
        await self._destroy(kernel)
        await self._end(kernel, KernelStatus.TERMINATED, reason)

    async def interrupt(self, kernel_id: str) -> None:
        kernel = await self.wait_ready(kernel_id, self._start_wait)
        await self._agents.interrupt_kernel(await self._agent_of(kernel), kernel_id)

    async def restart(self, kernel_id: str) -> None:
        """Same id, new process; whoever is attached stays so. Returns when it answers again."""
        kernel = await self.wait_ready(kernel_id, self._start_wait)
        self._apply(await self._registry.mark_restarting(kernel_id))
        request = protocol.RestartKernel(kernel_id=kernel_id, start_timeout=self._start_timeout)
        try:
            restarted = await self._agents.restart_kernel(await self._agent_of(kernel), request)
        except SornaError as error:
            await self._end(kernel, KernelStatus.DEAD, error.message)
            await self._destroy(kernel)
            raise
        kernel.kernel_info = restarted.kernel_info
        kernel.execution_state = "idle"
        await self._mark_running(kernel)
        log.info("kernel %s restarted", kernel_id)

    async def logs(self, kernel_id: str, lines: int = 200) -> str:
        kernel = self.get(kernel_id)
        return await self._agents.read_kernel_log(await self._agent_of(kernel), kernel_id, lines)

    def get(self, kernel_id: str) -> Kernel:
        """Raises `KernelNotFound`, which says how the kernel ended if that was lately."""
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            raise KernelNotFound(kernel_id, self._ended.get(kernel_id, ("", ""))[1])
        return kernel

    def owner_of(self, kernel_id: str) -> str | None:
        """Also of a kernel that ended lately; None if there is or was no such kernel."""
        kernel = self._kernels.get(kernel_id)
        return kernel.owner if kernel else self._ended.get(kernel_id, (None, ""))[0]

    def list(self, owner: str | None = None) -> list[Kernel]:
        return [k for k in self._kernels.values() if owner is None or k.owner == owner]

    def attach(
        self,
        kernel_id: str,
        session_id: str,
        listener: Listener,
        *,
        counts: bool = False,
        resumes: bool = False,
    ) -> _KernelAttachment:
        """Carry `session_id`'s messages to the kernel and the kernel's to `listener`.

        `counts`: whether people see this as one of the kernel's connections. `resumes`: begin with
        what this session's client has not acknowledged, if it was here before. What is sent while
        the kernel still starts waits for it. Raises `KernelNotFound`, `AgentUnreachable`.
        """
        kernel = self.get(kernel_id)
        attachment = _KernelAttachment(self, kernel, session_id, listener, counts, resumes)
        kernel.attached.append(attachment)
        kernel.connections += counts
        try:
            if kernel.ready.is_set():
                self._open(attachment)
        except AgentUnreachable:
            attachment.close()
            raise
        return attachment

    # -- inner workings

    def _open(self, attachment: _KernelAttachment) -> None:
        agent = self._agent_rows.get(attachment.kernel.agent_id)
        if agent is None:
            return  # a gateway that just started: `hear` opens what waits for this agent
        attachment.open(self._agents, agent)

    async def messages(
        self, kernel_id: str, since: int = 1, *, follow: bool = False, quiet_for: float = 15
    ) -> AsyncGenerator[Sequence[KernelMessage | Gap], None]:
        """All that left the kernel, on every channel and for every client, in order, from number
        `since` on, as many at a time as there are; to its end, or with `follow` until the kernel
        is over.

        With `follow`, an empty list comes at once, when what comes will not be missed, and tells
        later that nothing came for `quiet_for` seconds. Read as fast as the caller iterates. Raises
        `KernelNotFound`, `Unavailable`.
        """
        try:
            kernel = await self.wait_ready(kernel_id, self._start_wait)
        except TimeoutError:
            raise Unavailable(f"Kernel {kernel_id} is still starting") from None
        reading = self._agents.read(await self._agent_of(kernel), kernel_id, max(1, since))
        kernel.readings.append(reading)
        try:
            if follow:
                yield []
            until = math.inf
            while reading.next < until:
                try:
                    async with asyncio.timeout(quiet_for if follow else READ_TIMEOUT):
                        items = await reading.receive()
                except TimeoutError:
                    if not follow:
                        message = f"the agent of kernel {kernel_id} does not answer"
                        raise AgentUnreachable(message) from None
                    yield []
                    continue
                if items:
                    yield items
                elif kernel.is_over:
                    return
                # A gap may come first, and says nothing of the end
                if not follow and until == math.inf and reading.end:
                    until = reading.end
        finally:
            kernel.readings.remove(reading)
            reading.close()

    def observe(self, kernel: Kernel, batch: Batch) -> None:
        """Keep `execution_state` and `last_activity`, as the relay has noted them."""
        for message in batch.messages:
            if message.activity:
                kernel.last_activity = time.time()
                if state := STATES[message.activity]:
                    kernel.execution_state = state
        kernel.seq = batch.next - 1

    def _apply(self, row: KernelRow) -> Kernel:
        """Make the view say what the registry says, and tell who is attached.

        Transactions may return here in another order than they were committed in: of two rows
        the newer one stands.
        """
        kernel = self._kernels.get(row.id)
        if kernel is None:
            kernel = Kernel(
                id=row.id,
                name=row.name,
                owner=row.owner,
                agent_id=row.agent_id,
                status=row.status,
                created_at=row.created_at,
                last_activity=row.created_at,
                path=row.path,
                limits=row.limits,
                idle_timeout=row.idle_timeout,
                reason=row.reason,
                revision=row.revision,
            )
            changed = True
            if not row.status.is_final:
                if row.id in self._ended:
                    return kernel
                self._kernels[row.id] = kernel
        elif row.revision < kernel.revision:
            changed = False
        else:
            changed = kernel.status is not row.status
            kernel.status = row.status
            kernel.reason = row.reason
            kernel.revision = row.revision
        if changed:
            self._change(kernel)
        return kernel

    def _change(self, kernel: Kernel) -> None:
        match kernel.status:
            case KernelStatus.RUNNING:
                kernel.ready.set()
                if kernel.execution_state != "busy":
                    kernel.execution_state = "idle"
                for attachment in list(kernel.attached):
                    try:
                        self._open(attachment)
                    except AgentUnreachable as error:
                        log.warning("kernel %s: %s", kernel.id, error)
            case KernelStatus.RESTARTING:
                kernel.ready.clear()
                kernel.execution_state = "restarting"
                for requests in kernel.unanswered.values():
                    requests.clear()
            case KernelStatus.LOST:
                kernel.reason = kernel.reason or "its agent is lost; it may come back"
            case KernelStatus.DEAD | KernelStatus.TERMINATED:
                kernel.execution_state = "dead"
                self._kernels.pop(kernel.id, None)
                self._ended[kernel.id] = (kernel.owner, kernel.reason)
                while len(self._ended) > 1000:
                    self._ended.popitem(last=False)
                kernel.ready.set()
                for reading in kernel.readings:
                    reading.stop()
                log.info("kernel %s is %s: %s", kernel.id, kernel.status, kernel.reason)
        for attachment in list(kernel.attached):
            attachment.listener.on_kernel_event(kernel)
        self.on_change(kernel)

    async def _end(self, kernel: Kernel, status: KernelStatus, reason: str) -> None:
        mark = (
            self._registry.mark_dead
            if status is KernelStatus.DEAD
            else self._registry.mark_terminated
        )
        if status is KernelStatus.DEAD and kernel.status is KernelStatus.TERMINATING:
            return  # what failed was only in the way of `stop`, which ends it with its own reason
        try:
            self._apply(await mark(kernel.id, reason))
        except IllegalTransition:
            # It ended another way meanwhile: that reason came first, and stands.
            self._apply(await self._registry.get_kernel(kernel.id))

    async def _destroy(self, kernel: Kernel) -> None:
        try:
            await self._agents.destroy_kernel(await self._agent_of(kernel), kernel.id)
        except Unavailable as error:
            # The next beat of its agent names a kernel that is over here: it is destroyed then.
            log.warning("kernel %s can't be destroyed now: %s", kernel.id, error)

    async def _agent_of(self, kernel: Kernel) -> AgentRow:
        row = self._agent_rows.get(kernel.agent_id)
        if row is None:
            row = self._agent_rows[kernel.agent_id] = await self._registry.get_agent(
                kernel.agent_id
            )
        return row

    def agents(self) -> Iterable[AgentRow]:
        """Every agent heard since this gateway started."""
        return self._agent_rows.values()

    def _in_background(self, coroutine: Any, name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, SornaError):
            log.warning("%s: %s", task.get_name(), error)
        elif error is not None:
            log.error("%s failed", task.get_name(), exc_info=error)


class _KernelAttachment:
    """What `Kernels.attach` gives: one client session on one kernel."""

    MAX_WAITING = 256 << 20
    """bytes that may wait for a kernel that does not answer yet"""

    def __init__(
        self,
        kernels: Kernels,
        kernel: Kernel,
        session_id: str,
        listener: Listener,
        counts: bool,
        resumes: bool,
    ) -> None:
        self.kernel = kernel
        self.session_id = session_id
        self.listener = listener
        self._kernels = kernels
        self._counts = counts
        self._resumes = resumes
        self._waiting: list[tuple[str, list[bytes]]] = []
        self._waiting_bytes = 0
        self._attachment: Attachment | None = None

    @property
    def is_behind(self) -> bool:
        """Whether others get newer messages than this one does."""
        return self._attachment is not None and self._attachment.is_behind

    async def catch_up(self) -> None:
        """Returns when it has all that it missed; at once if it is not open yet."""
        if self._attachment is not None:
            await self._attachment.caught_up.wait()

    def open(self, agents: AgentPool, agent: AgentRow) -> None:
        """Safe to repeat."""
        if self._attachment is None:
            self._attachment = agents.attach(
                agent, self.kernel.id, self.session_id, self, resumes=self._resumes
            )
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for channel, parts in waiting:
            self._attachment.send(channel, parts)

    def send(self, channel: str, parts: list[bytes]) -> None:
        """`parts`: header, parent header, metadata, content, buffers, as bytes.

        Raises `KernelNotFound` when the kernel is over, `AgentUnreachable`, `Unavailable` when
        too much waits for a kernel that is still starting.
        """
        if self.kernel.is_over:
            raise KernelNotFound(self.kernel.id, self.kernel.reason)
        if self._attachment is None or not self.kernel.ready.is_set():
            self._waiting_bytes += sum(map(len, parts))
            if self._waiting_bytes > self.MAX_WAITING:
                raise Unavailable(
                    f"more than {self.MAX_WAITING >> 20} MiB wait for kernel {self.kernel.id}, "
                    f"which is {self.kernel.status}"
                )
            self._waiting.append((channel, parts))
        else:
            self._attachment.send(channel, parts)

    def close(self) -> None:
        """Safe to repeat."""
        if self not in self.kernel.attached:
            return
        self.kernel.attached.remove(self)
        self.kernel.connections -= self._counts
        self._waiting.clear()
        if self._attachment is not None:
            self._attachment.close()

    def acknowledge(self, seq: int) -> None:
        """The client has everything up to this number."""
        if self._attachment is not None:
            self._attachment.acknowledge(seq)

    def pause(self) -> None:
        """Until `resume`, nothing comes; afterwards all that came meanwhile."""
        if self._attachment is not None:
            self._attachment.pause()

    def resume(self) -> None:
        if self._attachment is not None:
            self._attachment.resume()

    # -- `cursors.Reader`

    def on_batch(self, batch: Batch) -> None:
        if batch.next - 1 > self.kernel.seq:
            self._kernels.observe(self.kernel, batch)
        self.listener.on_kernel_messages(batch)

    def on_gap(self, gap: Gap) -> None:
        self.listener.on_kernel_gap(gap)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether it was set within that time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True

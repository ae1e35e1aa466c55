"""Holds a host's kernels: starts them with the runtime, connects them with the relay, reports them.

`Agent` answers each protocol request with one method; who asks and how it travels is `server`'s.
What it holds is in its own store, so that a restarted agent goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sorna_agent.kernel_store import KernelRecord, KernelStore
from sorna_agent.relay_link import RelayLink
from sorna_agent.relay_messages import KernelActivity
from sorna_agent.runtimes import Launch, Runtime, Started, remove_directory
from sorna_jupyter.exceptions import (
    AgentDiskFull,
    ImageUnavailable,
    InvalidRequest,
    KernelExists,
    KernelNotFound,
    KernelStartFailed,
    SornaError,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import (
    AnyRequest,
    BuildImages,
    CreateKernel,
    DestroyKernel,
    Done,
    ImageState,
    ImageStatus,
    InterruptKernel,
    KernelLog,
    KernelReport,
    KernelStarted,
    KernelStatus,
    Message,
    ReadKernelLog,
    RestartKernel,
    StopAgent,
)

log = logging.getLogger(__name__)

LOG_TAIL = 15
"""lines of its own output that a kernel's failed start is explained with"""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
KERNEL_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

KernelInfo = dict[str, Any]


class _Kernel(KernelRecord):
    """A kernel in this process' hands."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.lock = asyncio.Lock()
        """held by whoever starts, restarts or destroys it"""
        self.work: asyncio.Task[KernelInfo] | None = None
        """its start or restart while that goes on; `destroy_kernel` cancels it"""
        self.died: asyncio.Future[str] | None = None
        """while it starts: gets the reason if it dies meanwhile"""
        self.waits_for_image = False

    @property
    def id(self) -> str:
        return self.request.kernel_id

    @property
    def is_terminating(self) -> bool:
        return self.status is KernelStatus.TERMINATING

    def launch(self) -> Launch:
        request = self.request
        return Launch(
            kernel_id=request.kernel_id,
            image=request.image,
            owner=request.owner,
            directory=Path(self.directory),
            key=self.key,
            env=request.env,
            limits=request.limits,
            path=request.path,
        )


class Agent:
    """Order of calls: `adopt` once the runtime and the relay are up, then `handle` for each
    request; `destroy_all` before the end, unless kernels shall outlive the agent."""

    def __init__(
        self, runtime: Runtime, link: RelayLink, store: KernelStore, directory: Path
    ) -> None:
        """`directory`: each kernel gets one below it; short, for the sake of its sockets' names."""
        self._runtime = runtime
        self._link = link
        self._store = store
        self._directory = directory
        self._kernels: dict[str, _Kernel] = {}
        self._unsaved: OSError | None = None
        """why the store does not hold what we do"""
        self._builds: set[asyncio.Task[None]] = set()
        self.on_change: Callable[[bool], None] = lambda urgent: None
        """something that beats tell has changed; urgent: a kernel's status"""
        self.on_stop: Callable[[], None] = lambda: None
        """a gateway has stopped this agent; its kernels are gone"""
        self.on_left_alone: Callable[[], None] = lambda: None
        """a gateway goes and wants everything here to go on without it"""
        self._handlers: dict[type[Message], Callable[[Any], Awaitable[Message]]] = {
            CreateKernel: self.create_kernel,
            RestartKernel: self.restart_kernel,
            InterruptKernel: self.interrupt_kernel,
            DestroyKernel: self.destroy_kernel,
            ReadKernelLog: self.read_kernel_log,
            BuildImages: self.build_images,
            StopAgent: self.stop_agent,
        }
        runtime.on_death(self._on_death)
        link.on_activity = self._on_activity
        link.on_restart = self._on_relay_restart

    async def handle(self, request: AnyRequest) -> Message:
        """Raises SornaError for what cannot be done."""
        return await self._handlers[type(request)](request)

    def reports(self) -> list[KernelReport]:
        return [self._report(kernel) for kernel in self._kernels.values()]

    def images(self) -> list[ImageStatus]:
        return self._runtime.images()

    # -- an agent's life ---------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over the kernels of an earlier agent process; those that are gone are dead."""
        kernels = [_Kernel(**vars(record)) for record in self._store.load()]
        running = {k.id: k for k in kernels if k.status is KernelStatus.RUNNING}
        # First, so that `_on_death` finds those whose death the runtime tells while it looks.
        self._kernels.update({kernel.id: kernel for kernel in kernels})
        found = await self._runtime.adopt({k.id: k.launch() for k in running.values()})
        connected = set(self._link.adopted_kernels)
        for kernel in kernels:
            if kernel.id in found:
                kernel.started = found[kernel.id]
                if kernel.id not in connected:
                    self._reopen(kernel)
            elif kernel.status is not KernelStatus.DEAD:
                kernel.status = KernelStatus.DEAD
                kernel.reason = (
                    "ended while its agent was away"
                    if kernel.id in running
                    else "its agent was stopped while it was starting"
                )
                self._link.detach_kernel(kernel.id)
        for kernel_id in connected - found.keys():
            self._link.forget_kernel(kernel_id)
        self._link.keep_kernels([kernel.id for kernel in kernels])
        self._save()
        if kernels:
            log.info("%d of %d kernels adopted", len(found), len(kernels))

    async def destroy_all(self) -> None:
        """What cannot be destroyed is logged: whoever asked has nobody else to ask."""
        kernel_ids = list(self._kernels)
        results = await asyncio.gather(
            *(self.destroy_kernel(DestroyKernel(kernel_id=kernel_id)) for kernel_id in kernel_ids),
            return_exceptions=True,
        )
        for kernel_id, result in zip(kernel_ids, results, strict=True):
            if isinstance(result, BaseException):
                log.error("kernel %s could not be destroyed: %s", kernel_id, result)

    async def close(self) -> None:
        for task in self._builds:
            task.cancel()
        await asyncio.gather(*self._builds, return_exceptions=True)

    async def stop_agent(self, request: StopAgent) -> Done:
        if request.keep_kernels:
            self.on_left_alone()
        else:
            await self.destroy_all()
            # Soon and not now: the reply goes first.
            asyncio.get_running_loop().call_soon(self.on_stop)
        return Done()

    # -- create ------------------------------------------------------------------------------

    async def create_kernel(self, request: CreateKernel) -> KernelStarted:
        kernel = self._kernels.get(request.kernel_id)
        if kernel is None:
            kernel = self._add(request)
        elif (kernel.request.owner, kernel.request.image) != (request.owner, request.image):
            raise KernelExists()
        async with kernel.lock:
            if kernel.status is KernelStatus.PREPARING and kernel.id in self._kernels:
                kernel.kernel_info = await self._run(kernel, self._create(kernel))
                self._set_status(kernel, KernelStatus.RUNNING)
                log.info("kernel %s runs", kernel.id)
            elif kernel.status is not KernelStatus.RUNNING:
                raise KernelStartFailed(kernel.reason or f"the kernel is {kernel.status}")
            return KernelStarted(kernel_info=kernel.kernel_info)

    def _add(self, request: CreateKernel) -> _Kernel:
        if not KERNEL_ID.fullmatch(request.kernel_id):
            raise InvalidRequest(f"not a possible kernel id: {request.kernel_id[:150]!r}")
        self._image(request.image)
        # Hashed: ids may be chosen by clients and begin alike.
        name = hashlib.sha256(request.kernel_id.encode()).hexdigest()[:13]
        kernel = _Kernel(
            request=request,
            key=secrets.token_hex(32),
            directory=str(self._directory / name),
            last_activity=time.time(),
        )
        self._kernels[kernel.id] = kernel
        self._save()
        if self._unsaved is not None:
            # After a restart, nobody would know whose it is.
            del self._kernels[kernel.id]
            raise _refusal(self._unsaved) from self._unsaved
        self.on_change(True)
        return kernel

    async def _create(self, kernel: _Kernel) -> KernelInfo:
        """Whatever goes wrong, nothing stays behind."""
        async with AsyncExitStack() as undo:
            undo.callback(self._remove, kernel)
            await self._make_image_ready(kernel)
            directory = Path(kernel.directory)
            remove_directory(directory)  # of an agent that was killed
            directory.mkdir(parents=True, mode=0o700)
            undo.callback(remove_directory, directory)
            undo.push_async_callback(self._runtime.destroy, kernel.id)
            undo.callback(self._link.forget_kernel, kernel.id)
            launching = self._runtime.launch(kernel.launch())
            info = await self._until_it_answers(kernel, launching, kernel.request.start_timeout)
            undo.pop_all()
        return info

    async def _make_image_ready(self, kernel: _Kernel) -> None:
        name = kernel.request.image
        if self._image(name).state is ImageState.READY:
            return
        kernel.waits_for_image = True
        try:
            await self._runtime.build([name], self._on_image_change)
        finally:
            kernel.waits_for_image = False
        image = self._image(name)
        if image.state is not ImageState.READY:
            raise ImageUnavailable(f"the image of {name!r} could not be built: {image.message}")

    def _image(self, name: str) -> ImageStatus:
        images = {image.name: image for image in self._runtime.images()}
        if name not in images:
            raise UnknownKernelspec(name, sorted(images))
        return images[name]

    async def _until_it_answers(
        self, kernel: _Kernel, launching: Coroutine[Any, Any, Started], timeout: float
    ) -> KernelInfo:
        """Start the process and wait for its kernel_info; raises KernelStartFailed."""
        kernel.died = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                kernel.started = await launching
                opening = asyncio.ensure_future(
                    self._link.open_kernel(kernel.id, kernel.started.address, kernel.key)
                )
                try:
                    await asyncio.wait((opening, kernel.died), return_when=asyncio.FIRST_COMPLETED)
                    if opening.done():
                        return opening.result()
                    raise await self._explain(kernel, kernel.died.result())
                finally:
                    opening.cancel()
        except TimeoutError:
            reason = f"the kernel did not answer within {timeout:g} s"
            raise await self._explain(kernel, reason) from None
        finally:
            kernel.died = None

    async def _explain(self, kernel: _Kernel, reason: str) -> KernelStartFailed:
        try:
            tail = await self._runtime.logs(kernel.id, LOG_TAIL)
        except SornaError:
            tail = ""
        return KernelStartFailed(f"{reason}\n{tail.strip()}".strip())

    async def _run(self, kernel: _Kernel, work: Coroutine[Any, Any, KernelInfo]) -> KernelInfo:
        """`work`, which `destroy_kernel` may cancel."""
        kernel.work = asyncio.create_task(work, name=f"start {kernel.id}")
        try:
            return await kernel.work
        except asyncio.CancelledError:
            if kernel.is_terminating:
                raise KernelStartFailed("it was stopped while it was starting") from None
            raise
        except SornaError as error:
            kernel.reason = error.message
            raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise AgentDiskFull() from error
        finally:
            kernel.work = None

    # -- the others --------------------------------------------------------------------------

    async def restart_kernel(self, request: RestartKernel) -> KernelStarted:
        kernel = self._get(request.kernel_id)
        async with kernel.lock:
            if kernel.status is not KernelStatus.RUNNING:
                raise KernelNotFound(kernel.id, kernel.reason or kernel.status)
            self._set_status(kernel, KernelStatus.RESTARTING)
            kernel.execution_state = "restarting"
            self._link.detach_kernel(kernel.id)
            relaunching = self._runtime.relaunch(kernel.id)
            work = self._until_it_answers(kernel, relaunching, request.start_timeout)
            try:
                kernel.kernel_info = await self._run(kernel, work)
            except SornaError as error:
                if not kernel.is_terminating:
                    self._link.detach_kernel(kernel.id)
                    self._set_status(kernel, KernelStatus.DEAD, error.message)
                    await self._runtime.destroy(kernel.id)
                raise
            self._set_status(kernel, KernelStatus.RUNNING)
            log.info("kernel %s restarted", kernel.id)
            return KernelStarted(kernel_info=kernel.kernel_info)

    async def interrupt_kernel(self, request: InterruptKernel) -> Done:
        kernel = self._get(request.kernel_id)
        if kernel.status is not KernelStatus.RUNNING or kernel.started is None:
            raise KernelNotFound(kernel.id, kernel.reason or kernel.status)
        if kernel.started.interrupt_mode == "message":
            self._link.interrupt_kernel(kernel.id)
        else:
            await self._runtime.interrupt(kernel.id)
        return Done()

    async def destroy_kernel(self, request: DestroyKernel) -> Done:
        kernel = self._kernels.get(request.kernel_id)
        if kernel is None:
            return Done()
        self._set_status(kernel, KernelStatus.TERMINATING)
        if kernel.work is not None:
            kernel.work.cancel()
        async with kernel.lock:
            if self._kernels.get(kernel.id) is kernel:
                # First the process, then the sockets: its last output is still read.
                await self._runtime.destroy(kernel.id)
                self._link.forget_kernel(kernel.id)
                remove_directory(Path(kernel.directory))
                self._remove(kernel)
                log.info("kernel %s destroyed", kernel.id)
        return Done()

    async def read_kernel_log(self, request: ReadKernelLog) -> KernelLog:
        kernel = self._get(request.kernel_id)
        return KernelLog(text=await self._runtime.logs(kernel.id, request.lines))

    async def build_images(self, request: BuildImages) -> Done:
        """Returns at once; beats tell the rest."""
        task = asyncio.create_task(
            self._runtime.build(request.names, self._on_image_change), name="build images"
        )
        self._builds.add(task)
        task.add_done_callback(self._on_build_end)
        return Done()

    def _on_build_end(self, task: asyncio.Task[None]) -> None:
        self._builds.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("building images failed", exc_info=task.exception())

    # -- what is held ------------------------------------------------------------------------

    def _get(self, kernel_id: str) -> _Kernel:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            raise KernelNotFound(kernel_id)
        return kernel

    def _set_status(self, kernel: _Kernel, status: KernelStatus, reason: str = "") -> None:
        kernel.status = status
        kernel.reason = reason
        self._save()
        self.on_change(True)

    def _remove(self, kernel: _Kernel) -> None:
        if self._kernels.get(kernel.id) is kernel:
            del self._kernels[kernel.id]
            self._save()
            self.on_change(True)

    def save_the_rest(self) -> None:
        """What the disk did not take when it changed. To be called now and then."""
        if self._unsaved is not None:
            self._save()

    def _save(self) -> None:
        """What a disk that is full does not take is told once, and saved with the next change or
        by `save_the_rest`: kernels have to be stopped all the same."""
        try:
            self._store.save(list(self._kernels.values()))
        except OSError as error:
            if self._unsaved is None:
                log.error("the record of the kernels can't be saved for now: %s", error)
            self._unsaved = error
        else:
            if self._unsaved is not None:
                log.info("the record of the kernels is saved again")
            self._unsaved = None

    def _report(self, kernel: _Kernel) -> KernelReport:
        reason = kernel.reason
        if kernel.waits_for_image:
            image = self._image(kernel.request.image)
            reason = f"building the image of {image.name}: {image.progress:.0%} {image.message}"
        return KernelReport(
            kernel_id=kernel.id,
            status=kernel.status,
            reason=reason.strip(),
            execution_state=kernel.execution_state,
            last_activity=kernel.last_activity,
            seq=kernel.seq,
            owner=kernel.request.owner,
        )

    # -- what happens by itself --------------------------------------------------------------

    def _on_death(self, kernel_id: str, reason: str) -> None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            return
        if kernel.died is not None and not kernel.died.done():
            kernel.died.set_result(reason)
        elif kernel.status is KernelStatus.RUNNING:
            log.info("kernel %s died: %s", kernel_id, reason)
            self._link.detach_kernel(kernel_id)
            self._set_status(kernel, KernelStatus.DEAD, reason)

    def _on_activity(self, activity: KernelActivity) -> None:
        kernel = self._kernels.get(activity.kernel_id)
        if kernel is not None:
            kernel.last_activity = activity.last_activity
            kernel.seq = activity.seq
            if kernel.execution_state != activity.execution_state:
                kernel.execution_state = activity.execution_state
                self.on_change(False)

    def _on_image_change(self) -> None:
        self.on_change(False)

    def _on_relay_restart(self) -> None:
        for kernel in self._kernels.values():
            if kernel.status is KernelStatus.RUNNING:
                self._reopen(kernel)
        self.on_change(True)

    def _reopen(self, kernel: _Kernel) -> None:
        assert kernel.started is not None
        self._link.reopen_kernel(
            kernel.id, kernel.started.address, kernel.key, kernel.execution_state
        )


def _refusal(error: OSError) -> AgentDiskFull:
    """Of a new kernel, in words for whoever wanted it."""
    if error.errno in DISK_FULL:
        return AgentDiskFull()
    return AgentDiskFull(f"The agent's disk takes no new kernel: {error.strerror}")

"""Kernels in Docker containers, without network. With `engine`, all that knows the Docker SDK.

What a container may do stands in `container`. What the engine says is told in its own words as
SornaErrors, here and nowhere else. Deaths come from one event stream; each time it is opened,
containers are listed too, since the stream ends without a word when the engine stops and tells
nothing of what happened meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors

from sorna_agent.runtimes import (
    DEFAULT_LIMITS,
    INSIDE,
    PORTS,
    SOCKET_PREFIX,
    Launch,
    Runtime,
    Started,
    check_env,
    check_limits,
    check_path,
    death_reason,
    fill_limits,
    remove_directory,
    remove_sockets,
    write_connection_file,
)
from sorna_agent.runtimes.container import (
    AGENT_LABEL,
    KERNEL_LABEL,
    container_name,
    container_options,
    hand_over,
    seal_when_bound,
    wait_until_overfull,
)
from sorna_agent.runtimes.engine import Engine, Watcher, engine_address, in_daemon_thread
from sorna_agent.runtimes.images import (
    FOLDER_LABEL,
    NAME_LABEL,
    SPEC_LABEL,
    BuildProgress,
    ImageFolder,
    find_folders,
    label_spec,
    spec_name,
)
from sorna_jupyter.exceptions import (
    ImageUnavailable,
    KernelNotFound,
    KernelStartFailed,
    RuntimeUnavailable,
    SornaError,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import ImageState, ImageStatus, Limits

log = logging.getLogger(__name__)

T = TypeVar("T")

OUR_IMAGES = Path(str(resources.files("sorna_kernelspecs")))


@dataclass
class _Kernel:
    launch: Launch
    interrupt_mode: str
    spec: dict[str, Any]
    is_alive: bool = False
    """False also while we stop it ourselves, so that its end is not reported as a death."""
    is_doomed: bool = False
    """To be destroyed, but the engine was away."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    guarding: asyncio.Task[None] | None = None


class DockerRuntime(Runtime):
    name = "docker"
    isolation = (
        "Each kernel runs in a Docker container of its own, without network and privileges, "
        "on a read-only file system, with limits on memory, processors, processes and disk."
    )

    def __init__(
        self,
        *,
        agent_id: str,
        base_image: str | None = None,
        image_folders: Sequence[Path] = (),
        defaults: Limits = DEFAULT_LIMITS,
        base_url: str | None = None,
        threads: int = 8,
    ) -> None:
        """`base_url` of the engine: from DOCKER_HOST or where engines usually listen, if None."""
        self.agent_id = agent_id
        self.defaults = defaults
        self._engine = Engine(base_url or engine_address())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="docker")
        self._folders = find_folders([OUR_IMAGES, *image_folders], base_image)
        self._images: dict[str, ImageStatus] = {
            folder.name: _folder_status(folder) for folder in self._folders
        }
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._kernels: dict[str, _Kernel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: Watcher | None = None

    async def ping(self) -> None:
        """Raises RuntimeUnavailable if no engine answers."""
        await self._call(lambda client: client.ping())

    async def start_up(self) -> None:
        try:
            await self.refresh_images()
        except RuntimeUnavailable as error:
            log.warning("%s; waiting for it", error)
        loop = asyncio.get_running_loop()
        self._watcher = Watcher(
            self._engine,
            on_connect=functools.partial(loop.call_soon_threadsafe, self._spawn_reconcile),
            on_death=lambda kernel_id: loop.call_soon_threadsafe(self._spawn_check, kernel_id),
            on_image=functools.partial(loop.call_soon_threadsafe, self._spawn_refresh),
        )
        self._watcher.start()

    async def close(self) -> None:
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.stop)
        tasks = [*self._tasks, *self._builds.values()]
        tasks += [kernel.guarding for kernel in self._kernels.values() if kernel.guarding]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    # -- images --

    def images(self) -> list[ImageStatus]:
        return list(self._images.values())

    async def refresh_images(self) -> None:
        """Look which images the engine has; a build under way keeps its state."""
        found = await self._call(_list_kernel_images)
        by_tag = {tag: image for image in found for tag in image.get("RepoTags") or ()}
        images: dict[str, ImageStatus] = {}
        for folder in self._folders:
            old = self._images.get(folder.name) or _folder_status(folder)
            if image := by_tag.get(folder.reference):
                images[folder.name] = _folder_status(folder, ImageState.READY, digest=image["Id"])
            elif old.state is ImageState.READY:
                images[folder.name] = _folder_status(folder)
            else:
                images[folder.name] = old
        for tag, image in sorted(by_tag.items()):
            labels = image.get("Labels") or {}
            spec = label_spec(labels)
            if spec is None or labels.get(FOLDER_LABEL):
                continue  # of a folder: ours above, or an older version of it
            name = labels.get(NAME_LABEL) or spec_name(spec) or tag.split(":")[0].split("/")[-1]
            status = ImageStatus(
                name=name, reference=tag, state=ImageState.READY, spec=spec, digest=image["Id"]
            )
            images.setdefault(name, status)
        self._images = images

    async def build(self, names: list[str], on_change: Callable[[], None]) -> None:
        wanted = [folder for folder in self._folders if not names or folder.name in names]
        for folder in wanted:
            if self._images[folder.name].state is ImageState.READY:
                continue
            running = self._builds.get(folder.name)
            if running is None:
                running = asyncio.create_task(
                    self._build(folder, on_change), name=f"build {folder.name}"
                )
                self._builds[folder.name] = running
                running.add_done_callback(functools.partial(self._forget_build, folder.name))
            await asyncio.shield(running)

    def _forget_build(self, name: str, _: asyncio.Task[None]) -> None:
        self._builds.pop(name, None)

    async def _build(self, folder: ImageFolder, on_change: Callable[[], None]) -> None:
        def show(state: ImageState, **fields: Any) -> None:
            self._images[folder.name] = _folder_status(folder, state, **fields)
            on_change()

        loop = asyncio.get_running_loop()
        progress = BuildProgress()

        def show_progress(fraction: float, message: str) -> None:
            if self._images[folder.name].state is ImageState.BUILDING:
                show(ImageState.BUILDING, progress=fraction, message=message)

        def tell(fraction: float, message: str) -> None:
            loop.call_soon_threadsafe(show_progress, fraction, message)

        log.info("building image %s", folder.reference)
        show(ImageState.BUILDING, message=progress.message)
        try:
            await in_daemon_thread(lambda: self._engine.build(folder, progress, tell))
            await self.refresh_images()
        except SornaError as error:
            log.error("image %s could not be built: %s", folder.reference, error)
            show(ImageState.FAILED, message=error.message)
        else:
            log.info("image %s is ready", folder.reference)
            on_change()

    # -- kernels --

    async def launch(self, launch: Launch) -> Started:
        image = self._ready_image(launch.image)
        limits = check_limits(fill_limits(launch.limits, self.defaults))
        check_env(launch.env)
        check_path(launch.path)
        kernel = _Kernel(launch, image.spec.get("interrupt_mode", "message"), image.spec)
        self._kernels[launch.kernel_id] = kernel
        # In a thread nothing can be cancelled half-way: let it end, then undo it.
        work = asyncio.ensure_future(self._call(self._create_and_start, kernel, image, limits))
        try:
            async with kernel.lock:
                await asyncio.shield(work)
                kernel.is_alive = True
        except BaseException:  # cancelled too: nothing stays behind
            await asyncio.wait([work])
            with contextlib.suppress(RuntimeUnavailable):
                await self.destroy(launch.kernel_id)
            raise
        self._after_start(kernel)
        log.info("kernel %s started from %s", launch.kernel_id, image.reference)
        return self._started(kernel)

    def _ready_image(self, name: str) -> ImageStatus:
        image = self._images.get(name)
        if image is None:
            raise UnknownKernelspec(name, sorted(self._images))
        if image.state is not ImageState.READY:
            why = f": {image.message}" if image.message else ""
            raise ImageUnavailable(f"The image of kernelspec {name!r} is {image.state}{why}")
        return image

    def _create_and_start(
        self, client: docker.DockerClient, kernel: _Kernel, image: ImageStatus, limits: Limits
    ) -> None:
        launch = kernel.launch
        identity = self._engine.identity(client)
        path = write_connection_file(launch, f"{INSIDE}/{SOCKET_PREFIX}", launch.image)
        hand_over(launch.directory, path, identity)
        cores = float(self._engine.info(client)["NCPU"]) if limits.cpus is None else limits.cpus
        options = container_options(launch, image, limits, cores, identity, self.agent_id)
        name = container_name(launch.kernel_id)
        try:
            self._remove_container(client, launch.kernel_id)
            client.containers.create(image.digest or image.reference, name=name, **options)
            client.api.start(name)
        except docker.errors.ImageNotFound as error:
            raise ImageUnavailable(f"the engine has no image {image.reference}") from error
        except docker.errors.APIError as error:
            raise KernelStartFailed(f"the engine refused: {error.explanation}") from error

    async def relaunch(self, kernel_id: str) -> Started:
        kernel = self._kernel(kernel_id)
        async with kernel.lock:
            kernel.is_alive = False
            work = asyncio.ensure_future(self._call(self._restart_container, kernel))
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                raise
            finally:
                # Also if that failed half-way: the check then tells whether it lives.
                kernel.is_alive = True
                self._spawn_check(kernel_id)
        self._after_start(kernel)
        log.info("kernel %s started anew", kernel_id)
        return self._started(kernel)

    def _restart_container(self, client: docker.DockerClient, kernel: _Kernel) -> None:
        launch = kernel.launch
        name = container_name(launch.kernel_id)
        try:
            with contextlib.suppress(docker.errors.APIError):  # not running: nothing to kill
                client.api.kill(name)
            client.api.wait(name, timeout=30)
            remove_sockets(launch.directory)
            path = write_connection_file(launch, f"{INSIDE}/{SOCKET_PREFIX}", launch.image)
            hand_over(launch.directory, path, self._engine.identity(client))
            client.api.start(name)
        except docker.errors.NotFound as error:
            raise KernelStartFailed("its container is gone") from error
        except docker.errors.APIError as error:
            raise KernelStartFailed(f"the engine refused: {error.explanation}") from error

    async def interrupt(self, kernel_id: str) -> None:
        name = container_name(self._kernel(kernel_id).launch.kernel_id)
        try:
            await self._call(lambda client: client.api.kill(name, "SIGINT"))
        except docker.errors.APIError as error:
            raise KernelNotFound(kernel_id, "its container does not run") from error

    async def destroy(self, kernel_id: str) -> None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            return
        async with kernel.lock:
            kernel.is_alive = False
            if kernel.guarding is not None:
                kernel.guarding.cancel()
            kernel.is_doomed = True
            await self._call(self._remove_container, kernel_id)
            await asyncio.to_thread(remove_directory, kernel.launch.directory)
            if self._kernels.get(kernel_id) is kernel:
                del self._kernels[kernel_id]
        log.info("kernel %s is gone", kernel_id)

    def _remove_container(self, client: docker.DockerClient, kernel_id: str) -> None:
        try:
            client.api.remove_container(container_name(kernel_id), force=True, v=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if error.status_code != 409:  # 409: its removal is already in progress
                raise

    async def adopt(self, launches: dict[str, Launch]) -> dict[str, Started]:
        for kernel_id, launch in launches.items():
            image = self._images.get(launch.image)
            spec = image.spec if image else {}
            mode = spec.get("interrupt_mode", "message")
            self._kernels[kernel_id] = _Kernel(launch, mode, spec, is_alive=True)
        try:
            await self._reconcile(remove_unknown=True)
        except RuntimeUnavailable as error:
            # Containers may outlive their engine: believe so until it can be asked.
            log.warning("%s; taking %d kernels for alive", error, len(launches))
        kernels = [self._kernels[kernel_id] for kernel_id in launches]
        for kernel in kernels:
            if kernel.is_alive:
                self._after_start(kernel)
        return {k.launch.kernel_id: self._started(k) for k in kernels if k.is_alive}

    async def logs(self, kernel_id: str, lines: int = 200) -> str:
        name = container_name(self._kernel(kernel_id).launch.kernel_id)
        return await self._call(lambda client: _read_log(client, name, lines))

    def _kernel(self, kernel_id: str) -> _Kernel:
        try:
            return self._kernels[kernel_id]
        except KeyError:
            raise KernelNotFound(kernel_id) from None

    def _started(self, kernel: _Kernel) -> Started:
        return Started(
            transport="ipc",
            address=str(kernel.launch.directory / SOCKET_PREFIX),
            handle=container_name(kernel.launch.kernel_id),
            interrupt_mode=kernel.interrupt_mode,
        )

    def _after_start(self, kernel: _Kernel) -> None:
        # It may have died before `is_alive` said that we care.
        self._spawn(self._check(kernel.launch.kernel_id))
        if kernel.guarding is not None:
            kernel.guarding.cancel()
        kernel.guarding = asyncio.create_task(self._guard(kernel))
        kernel.guarding.add_done_callback(_log_failure)

    async def _guard(self, kernel: _Kernel) -> None:
        """Its directory is on the host, where no limit on disk holds: keep the kernel from using
        it for more than its sockets."""
        directory, kernel_id = kernel.launch.directory, kernel.launch.kernel_id
        if os.geteuid() == 0:
            await seal_when_bound(directory)
            return
        await wait_until_overfull(directory)
        if kernel.is_alive:
            kernel.is_alive = False
            log.warning("kernel %s is killed: it filled its socket directory", kernel_id)
            with contextlib.suppress(RuntimeUnavailable):
                await self._call(self._remove_container, kernel_id)
            self.report_death(kernel_id, "killed: it filled the directory of its sockets")

    # -- deaths --

    async def _check(self, kernel_id: str) -> None:
        """Ask whether this kernel is dead, and why; report it once."""
        kernel = self._kernels.get(kernel_id)
        if kernel is None or not kernel.is_alive:
            return
        with contextlib.suppress(RuntimeUnavailable):  # then listing tells, when it is back
            reason = await self._call(self._reason_of_death, kernel)
            if reason is not None and kernel.is_alive:
                kernel.is_alive = False
                log.info("kernel %s died: %s", kernel_id, reason)
                self.report_death(kernel_id, reason)

    def _reason_of_death(self, client: docker.DockerClient, kernel: _Kernel) -> str | None:
        name = container_name(kernel.launch.kernel_id)
        try:
            state = client.api.inspect_container(name)["State"]
            if state["Running"] or state["Status"] == "created":
                return None
            # Only a kernel that never came up says there why it ended.
            came_up = (kernel.launch.directory / f"{SOCKET_PREFIX}-{PORTS['hb_port']}").exists()
            last_line = "" if came_up else _read_log(client, name, 1).strip()
        except docker.errors.NotFound:
            return "its container was removed"
        limits = fill_limits(kernel.launch.limits, self.defaults)
        return death_reason(
            state["ExitCode"],
            out_of_memory=bool(state["OOMKilled"]),
            memory=limits.memory,
            last_line=state.get("Error") or last_line,
        )

    async def _reconcile(self, *, remove_unknown: bool = False) -> None:
        filters = {"label": f"{AGENT_LABEL}={self.agent_id}"}
        found = await self._call(lambda client: client.api.containers(all=True, filters=filters))
        running = {c["Labels"].get(KERNEL_LABEL) for c in found if c["State"] == "running"}
        for kernel_id, kernel in list(self._kernels.items()):
            if kernel.is_doomed:
                await self.destroy(kernel_id)
            elif kernel.is_alive and kernel_id not in running:
                await self._check(kernel_id)
        if remove_unknown:
            for kernel_id in {c["Labels"].get(KERNEL_LABEL, "") for c in found}:
                if kernel_id and kernel_id not in self._kernels:
                    log.info("removing the container of unknown kernel %s", kernel_id)
                    await self._call(self._remove_container, kernel_id)

    def _spawn_reconcile(self) -> None:
        async def catch_up() -> None:
            with contextlib.suppress(RuntimeUnavailable):  # the watcher will connect again
                await self._reconcile()
                await self.refresh_images()

        self._spawn(catch_up())

    def _spawn_refresh(self) -> None:
        async def refresh() -> None:
            with contextlib.suppress(RuntimeUnavailable):
                await self.refresh_images()

        self._spawn(refresh())

    def _spawn_check(self, kernel_id: str) -> None:
        self._spawn(self._check(kernel_id))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(client, *arguments)` in the pool; an engine that is away is a SornaError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._pool, lambda: self._engine.call(function, *arguments)
        )


def _list_kernel_images(client: docker.DockerClient) -> list[dict[str, Any]]:
    return list(client.api.images(filters={"label": SPEC_LABEL}))


def _read_log(client: docker.DockerClient, name: str, lines: int) -> str:
    try:
        text: bytes = client.api.logs(name, stdout=True, stderr=True, tail=lines)
    except docker.errors.NotFound:
        return ""
    return text.decode(errors="replace")


def _folder_status(
    folder: ImageFolder,
    state: ImageState = ImageState.MISSING,
    digest: str = "",
    progress: float = 0.0,
    message: str = "",
) -> ImageStatus:
    return ImageStatus(
        name=folder.name,
        reference=folder.reference,
        state=state,
        spec=folder.spec,
        digest=digest,
        progress=1.0 if state is ImageState.READY else progress,
        message=message,
        logo=folder.logo,
    )


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("looking after containers failed", exc_info=error)

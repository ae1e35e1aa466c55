"""Jupyter's four managers (kernel, kernels, kernelspecs, sessions) over `Kernels` and the registry.

jupyter_server's own handlers, and extensions, know nothing but these classes; what they mean by
"the kernels" is the kernels of whoever asks. Nothing is kept here: kernels stand in `Kernels`,
sessions in the registry. `app` puts both in (`kernels`, `registry`) before the first request.

Errors leave as what callers of jupyter_server's managers expect: `NoSuchKernel`,
`DuplicateKernelError`, and `HTTPError` for the rest.
"""

from __future__ import annotations

import asyncio
import os.path
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.multikernelmanager import DuplicateKernelError
from jupyter_core.paths import jupyter_data_dir
from jupyter_server import CallContext
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server.services.sessions.sessionmanager import SessionManager
from jupyter_server.utils import ensure_async
from tornado import web
from traitlets.config import LoggingConfigurable

from sorna_jupyter.exceptions import (
    InvalidRequest,
    KernelExists,
    KernelNotFound,
    SessionNotFound,
    SornaError,
    UnknownKernelspec,
)
from sorna_jupyter.http import status_of
from sorna_jupyter.kernels import Kernel, Kernels
from sorna_jupyter.protocol import ImageState, ImageStatus, KernelStatus, Limits
from sorna_jupyter.registry import Registry, SessionRow
from sorna_jupyter.unattended import UnattendedCells

LOGO = "logo-64x64"

SESSION_WAIT = 0.25
"""seconds for what can't start to fail in the answer. No longer: Notebook's file list asks for
the session under a path of its own, and renames it when it is answered; meanwhile the page it
opened looks, once, for the notebook's session, and asks the user for a kernel if there is none"""

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


# -- models and values -----------------------------------------------------------------------


def kernel_model(kernel: Kernel) -> dict[str, Any]:
    """The kernel as every Jupyter API shows it."""
    model: dict[str, Any] = {
        "id": kernel.id,
        "name": kernel.name,
        "last_activity": timestamp(kernel.last_activity),
        "execution_state": _execution_state(kernel),
        "connections": kernel.connections,
    }
    if kernel.reason:
        model["reason"] = kernel.reason
    return model


def timestamp(seconds: float) -> str:
    """GatewayClient reads it with strptime and needs both the fraction and the Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _execution_state(kernel: Kernel) -> str:
    match kernel.status:
        case KernelStatus.PREPARING:
            return "starting"
        case KernelStatus.RESTARTING:
            return "restarting"
        case KernelStatus.TERMINATING | KernelStatus.TERMINATED | KernelStatus.DEAD:
            return "dead"
    # Lost: what it last was; the reason says that it is out of reach.
    return kernel.execution_state


def kernelspec_model(image: ImageStatus, base_url: str) -> dict[str, Any]:
    """The image's kernelspec as `/api/kernelspecs` shows it."""
    logo = posixpath.join(base_url, "kernelspecs", image.name, f"{LOGO}.png")
    return {
        "name": image.name,
        "spec": _spec_of(image).to_dict(),
        "resources": {LOGO: logo} if image.logo else {},
    }


def checked_kernel_id(kernel_id: str) -> str:
    """Raises `InvalidRequest`: ids are UUIDs, so that nobody can squat on names."""
    if not _UUID.fullmatch(kernel_id):
        raise InvalidRequest(f"A kernel's id must be a UUID, not {kernel_id[:80]!r}")
    return kernel_id.lower()


def checked_path(path: str | None) -> str:
    """A working directory relative to the kernel's home. Raises `InvalidRequest`."""
    if path is not None and "\0" in path:
        raise InvalidRequest("A path can't contain NUL")
    relative = posixpath.normpath("/" + (path or "").replace("\\", "/")).strip("/")
    if ".." in (path or "").split("/"):
        raise InvalidRequest(f"A kernel's path can't leave its home: {path!r}")
    return relative


def caller() -> str | None:
    """Who made the request that is being answered; None outside any request."""
    handler = CallContext.get(CallContext.JUPYTER_HANDLER)
    # Not `current_user`: that one raises until the identity provider has answered.
    user = getattr(handler, "_jupyter_current_user", None)
    return user.username if user is not None else None


# -- kernels ---------------------------------------------------------------------------------


class SornaKernelManager(LoggingConfigurable):
    """What `get_kernel(id)` gives: a look at one kernel, for the websocket and for extensions.

    No connection info and no `client()`: nobody but the relay reaches the kernel's sockets.
    """

    def __init__(self, kernel: Kernel, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernel = kernel

    @property
    def kernel_id(self) -> str:
        return self.kernel.id

    @property
    def kernel_name(self) -> str:
        return self.kernel.name

    @property
    def execution_state(self) -> str:
        return _execution_state(self.kernel)

    @property
    def reason(self) -> str:
        return self.kernel.reason

    @property
    def last_activity(self) -> datetime:
        return datetime.fromtimestamp(self.kernel.last_activity, UTC)

    async def is_alive(self) -> bool:
        return not self.kernel.is_over


class SornaMappingKernelManager(AsyncMappingKernelManager):
    """The kernels of whoever asks."""

    _service: Kernels | None = None
    unattended: UnattendedCells | None = None
    """None where no notebooks live with us"""

    @property
    def kernels(self) -> Kernels:
        if self._service is None:
            raise web.HTTPError(503, "The server is still starting, or stopping")
        return self._service

    @kernels.setter
    def kernels(self, service: Kernels) -> None:
        self._service = service

    # -- what there is

    def list_kernels(self) -> list[dict[str, Any]]:
        return [kernel_model(kernel) for kernel in self._visible()]

    def list_kernel_ids(self) -> list[str]:
        return [kernel.id for kernel in self._visible()]

    def __contains__(self, kernel_id: object) -> bool:
        try:
            self.find(str(kernel_id))
        except web.HTTPError:
            return False
        return True

    def kernel_model(self, kernel_id: str) -> dict[str, Any]:
        return kernel_model(self.find(kernel_id))

    def get_kernel(  # type: ignore[override]  # looked at, never managed
        self, kernel_id: str
    ) -> SornaKernelManager:
        return SornaKernelManager(self.find(kernel_id), parent=self, log=self.log)

    def find(self, kernel_id: str) -> Kernel:
        """The caller's kernel; anyone else's is 404 like one that never was."""
        if caller() not in (None, self.kernels.owner_of(kernel_id)):
            raise web.HTTPError(404, KernelNotFound(kernel_id).message)
        try:
            return self.kernels.get(kernel_id)
        except KernelNotFound as error:
            raise web.HTTPError(404, error.message) from error

    def _visible(self) -> list[Kernel]:
        return [] if self._service is None else self._service.list(caller())

    @property
    def last_kernel_activity(self) -> datetime:
        """Over all users: what `shutdown_no_activity_timeout` goes by."""
        kernels = self._service.list() if self._service is not None else []
        seen = [datetime.fromtimestamp(kernel.last_activity, UTC) for kernel in kernels]
        return max([self._last_activity, *seen])

    @last_kernel_activity.setter
    def last_kernel_activity(self, value: datetime) -> None:
        self._last_activity = value

    # -- what can be done

    async def start_kernel(  # type: ignore[override]  # the async twins of the stock ones
        self,
        *,
        kernel_name: str | None = None,
        path: str | None = None,
        kernel_id: str | None = None,
        env: dict[str, str] | None = None,
        limits: Limits | None = None,
        idle_timeout: float | None = None,
        idempotency_key: str | None = None,
        wait: float | None = None,
        **_: Any,
    ) -> str:
        """`env` goes by value into this kernel and nowhere else; none of the server's own does."""
        owner = caller()
        if owner is None:
            raise web.HTTPError(403, "A kernel needs an owner; nobody asked for this one")
        with _as_jupyter_errors(self):
            kernel = await self.kernels.start(
                owner=owner,
                name=kernel_name,
                kernel_id=checked_kernel_id(kernel_id) if kernel_id is not None else None,
                env=env or {},
                path=checked_path(path),
                limits=limits,
                idle_timeout=idle_timeout,
                idempotency_key=idempotency_key,
                wait=wait,
            )
        return kernel.id

    async def shutdown_kernel(  # type: ignore[override]
        self, kernel_id: str, now: bool = False, restart: bool = False
    ) -> None:
        kernel = self.find(kernel_id)
        with _as_jupyter_errors(self):
            await self.kernels.stop(kernel.id)

    async def interrupt_kernel(  # type: ignore[override]
        self, kernel_id: str
    ) -> None:
        kernel = self.find(kernel_id)
        with _as_jupyter_errors(self):
            await self.kernels.interrupt(kernel.id)

    async def restart_kernel(  # type: ignore[override]
        self, kernel_id: str, now: bool = False
    ) -> None:
        kernel = self.find(kernel_id)
        with _as_jupyter_errors(self):
            await self.kernels.restart(kernel.id)

    async def shutdown_all(  # type: ignore[override]
        self, now: bool = False
    ) -> None:
        """Nothing to do: jupyter_server calls it when it stops, after `app` has decided
        whether the kernels go or stay."""

    def update_env(self, *, kernel_id: str, env: dict[str, str]) -> None:
        """Sessions call it when a notebook is renamed; a running kernel's env stays as it is."""

    # jupyter_client calls some of its methods by these names.
    _async_start_kernel = start_kernel
    _async_shutdown_kernel = shutdown_kernel  # type: ignore[assignment]
    _async_interrupt_kernel = interrupt_kernel
    _async_restart_kernel = restart_kernel
    _async_shutdown_all = shutdown_all


@contextmanager
def _as_jupyter_errors(manager: SornaMappingKernelManager) -> Iterator[None]:
    try:
        yield
    except UnknownKernelspec as error:
        raise NoSuchKernel(error.name) from error
    except KernelExists as error:
        raise DuplicateKernelError(error.message) from error
    except SornaError as error:
        manager.log.debug("%s: %s", type(error).__name__, error.message)
        raise http_error(error) from error


def http_error(error: SornaError) -> web.HTTPError:
    return web.HTTPError(status_of(error), error.message)


# -- kernelspecs -----------------------------------------------------------------------------


class SornaKernelSpecManager(KernelSpecManager):
    """One kernelspec an image."""

    kernels: Kernels | None = None

    def find_kernel_specs(self) -> dict[str, str]:
        return {name: _no_directory(name) for name in self._images()}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        image = self._images().get(kernel_name)
        if image is None:
            raise NoSuchKernel(kernel_name)
        return _spec_of(image)

    def get_all_specs(self) -> dict[str, Any]:
        return {
            name: {"resource_dir": _no_directory(name), "spec": _spec_of(image).to_dict()}
            for name, image in self._images().items()
        }

    async def get_kernel_spec_resource(self, kernel_name: str, path: str) -> bytes | None:
        """jupyter_server's seam for specs that are not on disk."""
        image = self._images().get(kernel_name)
        return image.logo if image is not None and image.logo and path == f"{LOGO}.png" else None

    def _images(self) -> dict[str, ImageStatus]:
        images = self.kernels.kernelspecs() if self.kernels is not None else {}
        allowed = self.allowed_kernelspecs
        return {name: i for name, i in images.items() if not allowed or name in allowed}


def _no_directory(name: str) -> str:
    # Callers join file names to it; an empty string would make that the working directory.
    return os.path.join(jupyter_data_dir(), "sorna", "kernelspecs", name)


def _spec_of(image: ImageStatus) -> KernelSpec:
    known = {key: value for key, value in image.spec.items() if key in KernelSpec.class_traits()}
    spec = KernelSpec(**{**known, "name": image.name, "resource_dir": _no_directory(image.name)})
    if image.state is not ImageState.READY:
        progress = {"state": image.state, "progress": image.progress, "message": image.message}
        spec.metadata = {**spec.metadata, "sorna": progress}
    return spec


# -- sessions --------------------------------------------------------------------------------


class SornaSessionManager(SessionManager):
    """Which document has which kernel. In the registry, so that it outlives the gateway."""

    registry: Registry | None = None
    kernel_manager: SornaMappingKernelManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._creating: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def session_exists(self, path: str) -> bool:
        return await self._find(path=path) is not None

    async def get_or_create_session(self, *, path: str, **fields: Any) -> dict[str, Any]:
        """One session a path, also when two requests for it come at once."""
        key = (_owner(), path)
        async with self._creating.setdefault(key, asyncio.Lock()):
            found = await self._find(path=path)
            if found is not None:
                return self._model(found)
            return await self.create_session(path=path, **fields)

    async def create_session(
        self,
        path: str | None = None,
        name: str | None = None,
        type: str | None = None,
        kernel_name: str | None = None,
        kernel_id: str | None = None,
    ) -> dict[str, Any]:
        row = SessionRow(
            id=str(uuid4()),
            path=path or "",
            name=name or "",
            type=type or "",
            kernel_id=kernel_id or str(uuid4()),
            owner=_owner(),
        )
        is_new = row.kernel_id not in self.kernel_manager
        if is_new:
            await self.kernel_manager.start_kernel(
                path=await ensure_async(self.contents_manager.get_kernel_path(path=row.path)),
                kernel_name=kernel_name,
                env=self.get_kernel_env(row.path, row.name),
                kernel_id=row.kernel_id,
                wait=SESSION_WAIT,
            )
        try:
            await self._registry.create_session(row)
        except Exception:
            if is_new:
                await self.kernel_manager.shutdown_kernel(row.kernel_id)
            raise
        return self._model(row)

    def get_kernel_env(self, path: str | None, name: str | None = None) -> dict[str, str]:
        """The stock one hands the server's whole environment to the kernel."""
        directory = posixpath.dirname(path or "")
        return {"JPY_SESSION_NAME": posixpath.join(directory, name) if name else path or ""}

    async def get_session(self, **kwargs: Any) -> dict[str, Any]:
        """By `session_id`, `path`, `name`, `type`, `kernel_id`; HTTPError 404 without a match."""
        if "session_id" in kwargs:
            kwargs["id"] = kwargs.pop("session_id")
        row = await self._find(**kwargs)
        if row is None:
            wanted = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise web.HTTPError(404, f"Session not found: {wanted}")
        return self._model(row)

    async def update_session(self, session_id: str, **kwargs: Any) -> None:
        await self.get_session(session_id=session_id)
        if kwargs:
            await self._registry.update_session(session_id, **kwargs)

    async def list_sessions(self) -> list[dict[str, Any]]:
        rows = await self._registry.list_sessions(_owner())
        alive = [row for row in rows if await self._is_alive(row)]
        return [self._model(row) for row in alive]

    async def delete_session(self, session_id: str) -> None:
        """And its kernel."""
        session = await self.get_session(session_id=session_id)
        await self.kernel_manager.shutdown_kernel(session["kernel"]["id"])
        await self._forget(session_id)

    def close(self) -> None:
        """The registry is closed by `app`."""

    # -- details

    @property
    def _registry(self) -> Registry:
        if self.registry is None:
            raise web.HTTPError(503, "The server is still starting, or stopping")
        return self.registry

    async def _find(self, **fields: Any) -> SessionRow | None:
        try:
            row = await self._registry.get_session(**fields, owner=_owner())
        except SessionNotFound:
            return None
        return row if await self._is_alive(row) else None

    async def _is_alive(self, row: SessionRow) -> bool:
        """Whether its kernel is there still; if not, the session goes too, as everywhere."""
        if row.kernel_id in self.kernel_manager:
            return True
        self.log.info("session %s goes with its kernel %s", row.id, row.kernel_id)
        await self._forget(row.id)
        return False

    async def _forget(self, session_id: str) -> None:
        with suppress(SessionNotFound):  # the registry may have ended it with its kernel
            await self._registry.delete_session(session_id)

    def _model(self, row: SessionRow) -> dict[str, Any]:
        model = {
            "id": row.id,
            "path": row.path,
            "name": row.name,
            "type": row.type,
            "kernel": self.kernel_manager.kernel_model(row.kernel_id),
        }
        if row.type == "notebook":
            model["notebook"] = {"path": row.path, "name": row.name}
        return model


def _owner() -> str:
    owner = caller()
    if owner is None:
        raise web.HTTPError(403, "Sessions belong to whoever asks; nobody does")
    return owner

"""Jupyter's own REST and websocket routes: kernels, kernelspecs, sessions.

They stand before jupyter_server's, and differ from them where those lack something (env, limits,
a client's own id, `Idempotency-Key`) or answer a wrong request with 500. Paths, status codes and
models are the stock ones: each front-end depends on some detail of them.
"""

from __future__ import annotations

from asyncio import Future
from http.client import responses
from typing import Any, cast

import msgspec
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.multikernelmanager import DuplicateKernelError
from jupyter_server.auth.decorator import authorized
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from jupyter_server.services.sessions.sessionmanager import KernelName
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.ioloop import IOLoop
from tornado.websocket import WebSocketProtocol, WebSocketProtocol13

from sorna_jupyter.bodies import NewKernel, kernel_env
from sorna_jupyter.exceptions import InvalidRequest, UnknownKernelspec
from sorna_jupyter.http import KERNEL_ID, QuietHandler, SornaAPIHandler
from sorna_jupyter.jupyter_manager import (
    LOGO,
    SornaSessionManager,
    checked_kernel_id,
    checked_path,
    kernel_model,
    kernelspec_model,
)
from sorna_jupyter.protocol import ImageStatus, Limits


def handlers(*, headless: bool = False) -> list[tuple[Any, ...]]:
    routes: list[tuple[Any, ...]] = [
        (r"/api/kernels", KernelsHandler),
        (rf"/api/kernels/{KERNEL_ID}", KernelHandler),
        (rf"/api/kernels/{KERNEL_ID}/(?P<action>interrupt|restart)", KernelActionHandler),
        (rf"/api/kernels/{KERNEL_ID}/channels", KernelChannelsHandler),
        (r"/api/kernelspecs", KernelSpecsHandler),
        (r"/api/kernelspecs/(?P<kernel_name>[^/]+)", KernelSpecHandler),
        (r"/kernelspecs/(?P<kernel_name>[^/]+)/(?P<path>.*)", KernelSpecResourceHandler),
        (r"/api/sessions", SessionsHandler),
        (r"/api/sessions/(?P<session_id>[^/]+)", SessionHandler),
        (r"/hub/api", NoHubHandler),
    ]
    if headless:
        routes.append((r"/tree", TreePageHandler))
    return routes


# -- request bodies --------------------------------------------------------------------------


class SessionKernelBody(msgspec.Struct):
    id: str | None = None
    name: str | None = None


class NotebookBody(msgspec.Struct):
    """What sessions were called before 2015; some clients still say it."""

    path: str | None = None
    name: str | None = None


class SessionBody(msgspec.Struct):
    path: str | None = None
    name: str | None = None
    type: str | None = None
    kernel: SessionKernelBody | None = None
    notebook: NotebookBody | None = None

    def __post_init__(self) -> None:
        if self.notebook is not None:
            self.type = "notebook"
            self.path = self.notebook.path or self.notebook.name or self.path


# -- kernels ---------------------------------------------------------------------------------


class KernelsHandler(SornaAPIHandler):
    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Never 403 for a user who may log in: VS Code and `--gateway-url` would give up."""
        self.write_json([kernel_model(k) for k in self.kernels.list(self.username)])

    @web.authenticated
    @authorized
    async def post(self) -> None:
        body = self.body(NewKernel)
        env = kernel_env(body.env or {}, self.username)
        # GatewayClient can't send an id of its own; Enterprise Gateway's clients put it here.
        kernel_id = body.kernel_id or body.id or env.get("KERNEL_ID")
        kernel = await self.kernels.start(
            owner=self.username,
            name=body.name or None,
            kernel_id=checked_kernel_id(kernel_id) if kernel_id else None,
            env=env,
            path=checked_path(body.path),
            limits=body.limits.limits() if body.limits else Limits(),
            idle_timeout=_positive("idle_timeout", body.idle_timeout),
            idempotency_key=self.request.headers.get("Idempotency-Key"),
        )
        self.set_header("Location", url_path_join(self.base_url, "api/kernels", kernel.id))
        self.write_json(kernel_model(kernel), 201)


class KernelHandler(SornaAPIHandler):
    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        self.write_json(kernel_model(self.kernels.get(kernel_id)))

    @web.authenticated
    @authorized
    async def delete(self, kernel_id: str) -> None:
        await self.kernels.stop(kernel_id)
        self.set_status(204)
        self.finish()


class KernelActionHandler(SornaAPIHandler):
    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def post(self, kernel_id: str, action: str) -> None:
        """Bodies are ignored: some clients send `{}`, some nothing, some no JSON at all."""
        self.kernels.get(kernel_id)
        if action == "interrupt":
            await self.kernels.interrupt(kernel_id)
            self.set_status(204)
            self.finish()
        else:
            await self.kernels.restart(kernel_id)
            self.write_json(kernel_model(self.kernels.get(kernel_id)))


class _LenientProtocol(WebSocketProtocol13):
    """jupyter_server with --gateway-url sends a front-end's binary frames on as text, over which
    tornado would break the connection off. They begin with a zero byte, as no JSON does."""

    TEXT, BINARY = 0x1, 0x2

    def _handle_message(self, opcode: int, data: bytes) -> Future[None] | None:
        if opcode == self.TEXT and data.startswith(b"\0"):
            opcode = self.BINARY
        return super()._handle_message(opcode, data)


class KernelChannelsHandler(QuietHandler, KernelWebsocketHandler):
    """The stock one with clearer refusals; the work is `websocket.SornaWebsocketConnection`'s."""

    MAX_SESSION_ID = 200
    """bytes; ZeroMQ takes no routing id above 255"""

    async def prepare(self) -> None:  # type: ignore[override]  # as jupyter_server's own
        await super().prepare()
        if not self.current_user:
            raise web.HTTPError(403)  # before `get` warns of it

    async def pre_get(self) -> None:
        session_id = self.get_argument("session_id", "")
        if len(session_id.encode()) > self.MAX_SESSION_ID:
            raise web.HTTPError(400, f"The session_id is above {self.MAX_SESSION_ID} bytes")
        await super().pre_get()  # type: ignore[no-untyped-call]

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        """jupyter_server's mixin pings every 30 s. It says so in milliseconds under the name
        that tornado reads in seconds, and tornado warns of what it makes of that."""
        protocol = super().get_websocket_protocol()
        if isinstance(protocol, WebSocketProtocol13):
            protocol.params.ping_interval = None
            protocol.params.ping_timeout = None
            protocol = _LenientProtocol(self, mask_outgoing=False, params=protocol.params)
        return protocol

    def send_ping(self) -> None:
        """Every 30 s, of the mixin, which also closes a socket whose last pong is 90 s old. On a
        slow link a pong may wait longer than that for what was sent before its ping."""
        if self.connection is not None and self.connection.is_draining():
            self.last_pong = IOLoop.current().time()
        super().send_ping()

    def on_pong(self, data: bytes) -> None:
        super().on_pong(data)  # type: ignore[no-untyped-call]
        if self.connection is not None:
            self.connection.on_pong(data)

    def on_close(self) -> None:
        # A handshake that failed half-way has no connection.
        if self.connection is not None:
            super().on_close()  # type: ignore[no-untyped-call]

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """JSON, as on the REST routes: no browser shows a failed handshake's page."""
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        reason = responses.get(status_code, "Unknown HTTP error")
        message = error.get_message() if isinstance(error, web.HTTPError) else None
        self.set_header("Content-Type", "application/json")
        self.finish(msgspec.json.encode({"message": message or reason, "reason": reason}))


# -- kernelspecs -----------------------------------------------------------------------------


class _KernelSpecs(SornaAPIHandler):
    auth_resource = "kernelspecs"

    def image(self, name: str) -> ImageStatus:
        images = self.kernels.kernelspecs()
        if name not in images:
            raise UnknownKernelspec(name, sorted(images))
        return images[name]

    def write_spec(self, name: str) -> None:
        self.write_json(kernelspec_model(self.image(name), self.base_url))


class KernelSpecsHandler(_KernelSpecs):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        """`?user=` is Enterprise Gateway's filter, which means nothing here: specs are the same
        for everyone. But jupyter_server's GatewayClient has a bug that puts the name of a single
        spec behind it, `?user=carol/python3`, and then wants that spec alone."""
        await self.kernels.wait_for_an_agent()
        _, slash, name = self.get_query_argument("user", "").rpartition("/")
        if slash:
            self.write_spec(name)
            return
        self.write_json(
            {
                "default": self.kernels.default_kernelspec(),
                "kernelspecs": {
                    name: kernelspec_model(image, self.base_url)
                    for name, image in self.kernels.kernelspecs().items()
                },
            }
        )


class KernelSpecHandler(_KernelSpecs):
    @web.authenticated
    @authorized
    async def get(self, kernel_name: str) -> None:
        await self.kernels.wait_for_an_agent()
        self.write_spec(kernel_name)


class KernelSpecResourceHandler(_KernelSpecs):
    @web.authenticated
    @authorized
    async def get(self, kernel_name: str, path: str) -> None:
        logo = self.image(kernel_name).logo
        if path != f"{LOGO}.png" or not logo:
            raise web.HTTPError(404, f"The kernelspec {kernel_name} has no {path}")
        self.set_header("Cache-Control", f"max-age={24 * 3600}")
        self.finish(logo, set_content_type="image/png")

    @web.authenticated
    @authorized
    async def head(self, kernel_name: str, path: str) -> None:
        # tornado leaves the body out of answers to HEAD.
        await KernelSpecResourceHandler.get(self, kernel_name, path)  # type: ignore[misc]


# -- sessions --------------------------------------------------------------------------------


class _Sessions(SornaAPIHandler):
    auth_resource = "sessions"

    @property
    def sessions(self) -> SornaSessionManager:
        return cast(SornaSessionManager, self.session_manager)

    def write_no_such_kernel(self, name: str) -> None:
        """501 and these two fields are what JupyterLab's dialog is made from."""
        self.log.info("unknown kernelspec %r", name)
        message = (
            f"The {name!r} kernel is not available. Please pick another suitable kernel instead, "
            "or install that kernel."
        )
        self.write_json({"message": message, "short_message": f"{name} not found"}, 501)


class SessionsHandler(_Sessions):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.write_json(await self.sessions.list_sessions())

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """A path that has a session already gets that one, also with 201."""
        if not self.body_bytes().strip():
            raise InvalidRequest("No JSON data provided")
        body = self.body(SessionBody)
        kernel = body.kernel or SessionKernelBody()
        for field in ("path", "type"):
            if getattr(body, field) is None:
                raise InvalidRequest(f"Missing field in JSON data: {field}")
        try:
            model = await self.sessions.get_or_create_session(
                path=body.path or "",
                name=body.name,
                type=body.type,
                kernel_name=kernel.name or None,
                kernel_id=kernel.id or None,
            )
        except NoSuchKernel as error:
            self.write_no_such_kernel(error.name)
            return
        except DuplicateKernelError as error:
            raise web.HTTPError(409, str(error)) from error
        location = url_path_join(self.base_url, "api/sessions", model["id"])
        self.set_header("Location", location)
        self.write_json(model, 201)


class SessionHandler(_Sessions):
    @web.authenticated
    @authorized
    async def get(self, session_id: str) -> None:
        self.write_json(await self.sessions.get_session(session_id=session_id))

    @web.authenticated
    @authorized
    async def patch(self, session_id: str) -> None:
        """`kernel.id` moves the session to that kernel, `kernel.name` to a new one; either way
        the kernel that it leaves is stopped."""
        if not self.body_bytes().strip():
            raise InvalidRequest("No JSON data provided")
        body = self.body(SessionBody)
        before = await self.sessions.get_session(session_id=session_id)
        changes = {
            field: value
            for field in ("path", "name", "type")
            if (value := getattr(body, field)) is not None
        }
        if body.kernel is not None:
            try:
                changes |= await self._change_kernel(before, body.kernel)
            except NoSuchKernel as error:
                self.write_no_such_kernel(error.name)
                return
        await self.sessions.update_session(session_id, **changes)
        if changes.get("kernel_id", before["kernel"]["id"]) != before["kernel"]["id"]:
            await self.kernels.stop(before["kernel"]["id"])
        self.write_json(await self.sessions.get_session(session_id=session_id))

    async def _change_kernel(
        self, before: dict[str, Any], wanted: SessionKernelBody
    ) -> dict[str, str]:
        if wanted.id is not None:
            if wanted.id not in self.kernel_manager:
                raise InvalidRequest(f"No such kernel: {wanted.id}")
            return {"kernel_id": wanted.id}
        if wanted.name is None:
            return {}
        kernel_id = await self.sessions.start_kernel_for_session(
            before["id"],
            before["path"],
            before["name"],
            before["type"],
            cast(KernelName, wanted.name),
        )
        return {"kernel_id": kernel_id}

    @web.authenticated
    @authorized
    async def delete(self, session_id: str) -> None:
        await self.sessions.delete_session(session_id)
        self.set_status(204)
        self.finish()


# -- pages that clients look for -------------------------------------------------------------


class NoHubHandler(SornaAPIHandler):
    """VS Code asks it first: 200 would mean JupyterHub."""

    @web.authenticated
    def get(self) -> None:
        raise web.HTTPError(404, "This is no JupyterHub")


class TreePageHandler(SornaAPIHandler):
    """VS Code takes anything but 200 here for "needs a password"."""

    auth_resource = "api"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.finish(
            "<!doctype html><title>Sorna Jupyter</title><p>This server serves kernels only.",
            set_content_type="text/html",
        )


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise InvalidRequest(f"{name} must be a positive number of seconds, not {value}")
    return value

"""A whole jupyter_server with our face in it, in this process; only the agent is made up.

Registry, `Kernels`, identity, managers, handlers and sockets are the real ones. `ObedientAgents`
does at once what it is asked, or misbehaves as the test says; a test plays the kernel itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from jupyter_server.serverapp import ServerApp
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection, websocket_connect
from traitlets.config import Config

from sorna_jupyter.cursors import Cursor, Reading
from sorna_jupyter.exceptions import SornaError
from sorna_jupyter.faces import jupyter
from sorna_jupyter.kernels import Kernels
from sorna_jupyter.live import MemoryLive
from sorna_jupyter.protocol import (
    CHANNELS,
    Activity,
    Batch,
    Beat,
    CreateKernel,
    ImageState,
    ImageStatus,
    KernelMessage,
    KernelStarted,
    Limits,
    RestartKernel,
    Slots,
    pack_record,
)
from sorna_jupyter.registry import Policy, Registry
from sorna_jupyter.wire import LEGACY, V1, V1_PROTOCOL
from tests.waiting import until

TOKEN = "the-servers-own-token"
LOGO = b"\x89PNG\r\n\x1a\n not really"
KERNEL_INFO = {"status": "ok", "protocol_version": "5.3", "implementation": "made up"}

SPEC = {
    "argv": ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": "Python 3",
    "language": "python",
    "interrupt_mode": "message",
    "metadata": {"debugger": True},
}


POLICY = Policy(
    max_kernels=None, max_limits=Limits(memory=1 << 40), default_limits=Limits(memory=1 << 30)
)


class Attached:
    """The kernel's side of one client session."""

    def __init__(self, kernel_id: str, session_id: str, reader: Any) -> None:
        self.kernel_id = kernel_id
        self.session_id = session_id
        self.reader = reader
        self.acknowledged = 0
        self.is_paused = False
        self.is_behind = False
        self.caught_up = asyncio.Event()
        self.caught_up.set()
        self._next = 1
        self.sent: asyncio.Queue[tuple[str, list[bytes]]] = asyncio.Queue()
        self.is_closed = False

    def send(self, channel: str, parts: list[bytes]) -> None:
        self.sent.put_nowait((channel, parts))

    def close(self) -> None:
        self.is_closed = True

    def acknowledge(self, seq: int) -> None:
        self.acknowledged = seq

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def emit(self, channel: str, msg_type: str, content: Any, *buffers: bytes, parent: Any = None):
        """The kernel says this."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": msg_type, "session": "kernel"}
        parts = [json.dumps(part).encode() for part in (header, parent or {}, {}, content)]
        session = "" if channel == "iopub" else self.session_id
        self.say(channel, [*parts, *buffers], session)

    def say(self, channel: str, parts: list[bytes], session: str = "") -> None:
        message = KernelMessage.of(self.kernel_id, self._next, session, channel, parts)
        self._next += 1
        if channel == "iopub" and b'"busy"' in parts[3]:
            message.activity = Activity.BUSY
        elif channel == "iopub" and b'"idle"' in parts[3]:
            message.activity = Activity.IDLE
        self.reader.on_batch(Batch([message]))


class Relay:
    """In place of the way to the relay, for who reads a journal; a test says what is in it."""

    def __init__(self) -> None:
        self.cursors: list[Cursor] = []

    def new_name(self) -> bytes:
        return uuid.uuid4().bytes

    def send(self, frames: list[bytes]) -> None: ...

    def subscribe(self, cursor: Cursor) -> None:
        self.cursors.append(cursor)

    def unsubscribe(self, cursor: Cursor) -> None:
        if cursor in self.cursors:
            self.cursors.remove(cursor)

    def credit(self, cursor: Cursor, size: int) -> None: ...

    def acknowledge(self, attachment: Any, seq: int) -> None: ...

    def detach(self, attachment: Any) -> None: ...

    async def cursor(self) -> Cursor:
        """The one that is open, once it is."""
        await until(lambda: self.cursors)
        (cursor,) = self.cursors
        return cursor


def record(text: str) -> bytes:
    """What a journal holds of this print."""
    parts = [{"msg_type": "stream"}, {}, {}, {"name": "stdout", "text": text}]
    encoded = [json.dumps(part).encode() for part in parts]
    return pack_record(CHANNELS.index("iopub"), Activity.NOTHING, b"", encoded)


class ObedientAgents:
    """In place of `AgentPool`."""

    def __init__(self) -> None:
        self.relay = Relay()
        self.created: list[CreateKernel] = []
        self.asked: list[tuple[str, str]] = []
        self.attached: list[Attached] = []
        self.let_start = asyncio.Event()
        self.let_start.set()
        self.failure: SornaError | None = None

    async def create_kernel(self, agent: Any, request: CreateKernel, timeout: float) -> Any:
        self.created.append(request)
        await self.let_start.wait()
        return self._started()

    async def restart_kernel(self, agent: Any, request: RestartKernel) -> KernelStarted:
        self.asked.append(("restart", request.kernel_id))
        return self._started()

    async def interrupt_kernel(self, agent: Any, kernel_id: str) -> None:
        self.asked.append(("interrupt", kernel_id))

    async def destroy_kernel(self, agent: Any, kernel_id: str) -> None:
        self.asked.append(("destroy", kernel_id))

    def attach(
        self, agent: Any, kernel_id: str, session_id: str, reader: Any, *, resumes: bool = False
    ) -> Attached:
        self.attached.append(Attached(kernel_id, session_id, reader))
        return self.attached[-1]

    def read(self, agent: Any, kernel_id: str, since: int) -> Reading:
        return Reading(self.relay, kernel_id, since)

    def _started(self) -> KernelStarted:
        if self.failure is not None:
            raise self.failure
        return KernelStarted(kernel_info=KERNEL_INFO)


class Socket:
    """A client's websocket, in either framing."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection
        self.framing = V1 if connection.selected_subprotocol == V1_PROTOCOL else LEGACY

    async def send(self, channel: str, msg_type: str, content: Any = None, **header: Any) -> str:
        msg_id = uuid.uuid4().hex
        head = {"msg_id": msg_id, "msg_type": msg_type, "session": "client", **header}
        parts = [json.dumps(part).encode() for part in (head, {}, {}, content or {})]
        await self.send_frame(self.framing.encode(channel, parts))
        return msg_id

    async def send_frame(self, frame: bytes | str) -> None:
        await self.connection.write_message(frame, binary=isinstance(frame, bytes))

    async def frame(self) -> bytes | str:
        async with asyncio.timeout(10):
            frame = await self.connection.read_message()
        assert frame is not None, f"closed: {self.close_code} {self.close_reason}"
        return frame

    async def receive(self) -> tuple[str, str, Any, list[bytes]]:
        """Channel, type, content and buffers of the next message."""
        channel, parts = self.framing.decode(await self.frame())
        header, content = json.loads(parts[0]), json.loads(parts[3])
        return channel, header["msg_type"], content, parts[4:]

    async def parent(self) -> Any:
        """The next message's parent header."""
        return json.loads(self.framing.decode(await self.frame())[1][1])

    async def closed(self) -> tuple[int | None, str | None]:
        """Code and reason, once the server has closed it."""
        async with asyncio.timeout(10):
            while await self.connection.read_message() is not None:
                pass
        return self.close_code, self.close_reason

    @property
    def close_code(self) -> int | None:
        return self.connection.close_code

    @property
    def close_reason(self) -> str | None:
        return self.connection.close_reason


class App:
    """The server, and clients of it."""

    def __init__(self, server: ServerApp, port: int, agents: ObedientAgents) -> None:
        self.server = server
        self.port = port
        self.agents = agents
        self.url = f"http://127.0.0.1:{port}"
        self.kernels: Kernels = server.kernel_manager.kernels
        self.registry: Registry = server.session_manager.registry

    async def fetch(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = TOKEN,
        headers: dict[str, str] | None = None,
    ) -> HTTPResponse:
        """Any status is returned. `body`: JSON, or bytes as they are."""
        headers = dict(headers or {})
        if token is not None:
            headers.setdefault("Authorization", f"token {token}")
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return await AsyncHTTPClient().fetch(
            HTTPRequest(
                self.url + path,
                method,
                headers=headers,
                body=data,
                allow_nonstandard_methods=True,
                follow_redirects=False,
            ),
            raise_error=False,
        )

    async def json(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        response = await self.fetch(method, path, body, **options)
        assert response.code < 300, (response.code, response.body)
        return json.loads(response.body) if response.body else None

    async def start_kernel(self, token: str = TOKEN, **body: Any) -> str:
        model = await self.json("POST", "/api/kernels", body, token=token)
        if self.agents.let_start.is_set():
            await self.kernels.wait_ready(model["id"], 10)
        return str(model["id"])

    async def user(self, name: str, *, is_admin: bool = False) -> str:
        """A token of this user."""
        await self.registry.ensure_user(name, is_admin=is_admin)
        return await self.registry.create_token(name)

    async def socket(
        self,
        kernel_id: str,
        *protocols: str,
        session: str = "client",
        token: str = TOKEN,
        headers: dict[str, str] | None = None,
    ) -> Socket:
        request = HTTPRequest(
            f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?session_id={session}",
            headers={"Authorization": f"token {token}", "User-Agent": "test", **(headers or {})},
        )
        return Socket(await websocket_connect(request, subprotocols=list(protocols)))

    async def attached(self, number: int = -1) -> Attached:
        """The kernel's side of a socket, once the server has opened it."""
        await until(lambda: self.agents.attached)
        return self.agents.attached[number]


def image(name: str, state: ImageState = ImageState.READY, logo: bytes = b"") -> ImageStatus:
    return ImageStatus(name=name, reference=name, state=state, spec=SPEC, logo=logo)


def beat(agent_id: str = "agent-1", images: list[ImageStatus] | None = None) -> Beat:
    return Beat(
        agent_id=agent_id,
        join_token="",
        public_key="k" * 40,
        addresses=[],
        host="here",
        runtime="local",
        isolation="none",
        slots=Slots(cpus=64, memory=1 << 40, kernels=100),
        images=images or [image("python3", logo=LOGO), image("julia", ImageState.BUILDING)],
        kernels=[],
    )


@asynccontextmanager
async def running_app(
    folder: Path, policy: Policy | None = None, headless: bool = False, **config: Any
) -> AsyncIterator[App]:
    registry = Registry(f"sqlite:///{folder / 'registry.sqlite'}")
    await registry.upgrade()
    agents = ObedientAgents()
    kernels = Kernels(
        registry=registry,
        live=MemoryLive(),
        agents=agents,  # type: ignore[arg-type]  # made up
        policy=policy or POLICY,
        start_wait=0.2,
    )
    await kernels.hear(beat())
    server = _server(folder, config)
    server.kernel_manager.kernels = kernels
    server.kernel_spec_manager.kernels = kernels
    server.session_manager.registry = registry
    server.identity_provider.registry = registry
    server.authorizer.kernels = kernels
    server.authorizer.registry = registry
    await registry.ensure_user(server.identity_provider.local_user, is_admin=True)
    settings = server.web_app.settings
    settings.update(sorna_kernels=kernels, sorna_registry=registry)
    base = server.base_url.rstrip("/")
    routes = [(base + path, *rest) for path, *rest in jupyter.handlers(headless=headless)]
    server.web_app.add_handlers(".*$", routes)
    http = HTTPServer(server.web_app)
    sockets = bind_sockets(0, "127.0.0.1")
    http.add_sockets(sockets)
    try:
        yield App(server, sockets[0].getsockname()[1], agents)
    finally:
        http.stop()
        await http.close_all_connections()
        await kernels.close()
        await registry.close()


def _server(folder: Path, config: dict[str, Any]) -> ServerApp:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    settings = Config(
        {
            "ServerApp": {
                "root_dir": str(root),
                "allow_root": True,
                "open_browser": False,
                "cookie_secret": b"a secret",
                "log_level": "WARN",
                "kernel_manager_class": ("sorna_jupyter.jupyter_manager.SornaMappingKernelManager"),
                "kernel_spec_manager_class": (
                    "sorna_jupyter.jupyter_manager.SornaKernelSpecManager"
                ),
                "session_manager_class": "sorna_jupyter.jupyter_manager.SornaSessionManager",
                "kernel_websocket_connection_class": (
                    "sorna_jupyter.websocket.SornaWebsocketConnection"
                ),
                "identity_provider_class": "sorna_jupyter.auth.SornaIdentityProvider",
                "authorizer_class": "sorna_jupyter.auth.SornaAuthorizer",
            },
            "IdentityProvider": {"token": TOKEN},
        }
    )
    settings.merge(Config(config))
    server = ServerApp(config=settings)
    server.init_signal = lambda: None  # the process is pytest's
    with mock.patch.dict(os.environ, JUPYTER_CONFIG_DIR=str(folder / "no-config")):
        server.initialize(argv=[], find_extensions=False, new_httpserver=False)
    return server


def basic(username: str, password: str) -> dict[str, str]:
    value = base64.b64encode(f"{username}:{password}".encode()).decode()
    return {"Authorization": f"Basic {value}"}

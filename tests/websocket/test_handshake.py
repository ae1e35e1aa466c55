"""The handshake, and what keeps a connection."""

import asyncio
import json
import socket

import pytest
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from tornado.httpclient import HTTPClientError
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import Resolver, bind_unix_socket
from tornado.websocket import websocket_connect

from sorna_jupyter.wire import V1_PROTOCOL
from tests.jupyter_app import TOKEN, running_app
from tests.waiting import until


async def test_vscode_gets_the_v1_protocol_echoed_when_it_offers_it(app, kernel_id):
    socket = await app.socket(kernel_id, V1_PROTOCOL)

    assert socket.connection.selected_subprotocol == V1_PROTOCOL


async def test_gateway_client_offers_no_protocol_and_gets_none(app, kernel_id):
    socket = await app.socket(kernel_id)

    assert socket.connection.selected_subprotocol is None


async def test_jupyterlab_sees_its_connection_counted(app, kernel_id):
    socket = await app.socket(kernel_id)
    await app.attached()
    assert app.kernels.get(kernel_id).connections == 1
    assert (await app.json("GET", f"/api/kernels/{kernel_id}"))["connections"] == 1

    socket.connection.close()

    await until(lambda: app.kernels.get(kernel_id).connections == 0)
    assert app.agents.attached[0].is_closed


async def test_jupyter_kernel_client_without_a_session_id_gets_one(app, kernel_id):
    await app.socket(kernel_id, session="")

    assert len((await app.attached()).session_id) >= 32


@pytest.mark.parametrize("session", ["x" * 201, "%C3%BC" * 101])
async def test_a_session_id_that_zeromq_can_not_take_is_refused(app, kernel_id, session):
    with pytest.raises(HTTPClientError) as refusal:
        await app.socket(kernel_id, session=session)

    assert refusal.value.code == 400
    assert json.loads(refusal.value.response.body)["message"].startswith("The session_id")


async def test_jupyterlab_gets_404_for_a_kernel_that_is_gone(app, kernel_id):
    await app.kernels.stop(kernel_id, "idle for 60 s")

    for missing in (kernel_id, "00000000-0000-4000-8000-000000000000", "nonsense"):
        with pytest.raises(HTTPClientError) as refusal:
            await app.socket(missing)

        assert refusal.value.code == 404
        assert "Traceback" not in refusal.value.response.body.decode()


async def test_a_socket_needs_a_token(app, kernel_id):
    with pytest.raises(HTTPClientError) as refusal:
        await app.socket(kernel_id, token="wrong")

    assert refusal.value.code == 403


async def test_another_sites_page_gets_no_socket_with_the_users_cookie(app, kernel_id):
    cookie = (await app.fetch("GET", "/api/me")).headers["Set-Cookie"].partition(";")[0]
    headers = {"Authorization": "", "Cookie": cookie, "Origin": "https://evil.example"}

    with pytest.raises(HTTPClientError) as refusal:
        await app.socket(kernel_id, headers=headers)

    assert refusal.value.code == 403
    assert app.agents.attached == []


async def test_the_socket_is_not_delayed(app, kernel_id, monkeypatch):
    """Peers that leave TCP_NODELAY out answer a trivial cell in 44 ms instead of 2.5."""
    seen = []
    monkeypatch.setattr(KernelWebsocketHandler, "set_nodelay", lambda self, on: seen.append(on))

    await app.socket(kernel_id)

    await until(lambda: seen == [True])


async def test_a_load_balancer_sees_a_ping_every_now_and_then(tmp_path, caplog):
    settings = {"ServerApp": {"tornado_settings": {"ws_ping_interval": 20}}}
    async with running_app(tmp_path, **settings) as app:
        kernel_id = await app.start_kernel()
        pinged = asyncio.Event()
        url = f"ws://127.0.0.1:{app.port}/api/kernels/{kernel_id}/channels?token={TOKEN}"
        connection = await websocket_connect(url)
        connection.on_ping = lambda data: pinged.set()

        async with asyncio.timeout(10):
            await pinged.wait()

    assert "websocket_ping" not in caplog.text


async def test_a_client_that_answers_pings_stays_connected(tmp_path):
    settings = {"ws_ping_interval": 20, "ws_ping_timeout": 200}  # milliseconds
    async with running_app(tmp_path, ServerApp={"tornado_settings": settings}) as app:
        socket = await app.socket(await app.start_kernel())
        pings = []
        socket.connection.on_ping = pings.append

        await until(lambda: len(pings) > 30 or socket.close_code)

        assert socket.close_code is None


class ToFile(Resolver):
    """Whatever is asked for is behind this Unix socket."""

    def initialize(self, path):
        self.path = path

    async def resolve(self, host, port, family=socket.AF_UNSPEC):
        return [(socket.AF_UNIX, self.path)]


async def test_a_server_behind_a_unix_socket_serves_as_on_tcp(app, kernel_id, tmp_path):
    path = str(tmp_path / "server.sock")
    server = HTTPServer(app.server.web_app)
    server.add_socket(bind_unix_socket(path))
    url = f"ws://localhost/api/kernels/{kernel_id}/channels?token={TOKEN}"
    client = await websocket_connect(url, resolver=ToFile(path))
    attached = await app.attached()

    attached.reader.listener.websocket_handler.send_ping()
    attached.emit("iopub", "stream", {"name": "stdout", "text": "x"})

    assert '"text": "x"' in str(await client.read_message())
    await until(lambda: attached.acknowledged == 1 or client.close_code)
    assert client.close_code is None
    server.stop()


class Unanswering:
    """A plain socket that answers no ping, reads what it is told to, and has little room."""

    def __init__(self, app):
        self.app = app
        self.loop = asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

    async def connect(self, kernel_id):
        await self.loop.sock_connect(self.socket, ("127.0.0.1", self.app.port))
        request = (
            f"GET /api/kernels/{kernel_id}/channels?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Sec-WebSocket-Protocol: {V1_PROTOCOL}\r\n\r\n"
        )
        await self.loop.sock_sendall(self.socket, request.encode())
        assert (await self.loop.sock_recv(self.socket, 4096)).startswith(b"HTTP/1.1 101 ")
        self.attached = await self.app.attached()
        self.connection = self.attached.reader.listener
        self.handler = self.connection.websocket_handler

    async def take(self, size):
        while size > 0:
            size -= len(await self.loop.sock_recv(self.socket, 65536))

    def is_pinged_after_100_s_without_a_pong(self):
        """Whether that leaves it connected."""
        now = IOLoop.current().time()
        self.handler.last_ping, self.handler.last_pong = now - 30, now - 100
        self.handler.send_ping()
        return self.handler.ws_connection is not None


@pytest.fixture
async def unanswering(app, kernel_id):
    client = Unanswering(app)
    await client.connect(kernel_id)
    yield client
    client.socket.close()


async def test_a_client_on_a_slow_link_is_alive_while_it_takes_what_was_sent(unanswering):
    """Its pongs come behind that, perhaps later than jupyter_server waits for them."""
    line = {"name": "stdout", "text": "x" * 12_000_000}
    unanswering.attached.emit("iopub", "stream", line)
    unanswering.handler.send_ping()

    for _ in range(3):
        await unanswering.take(1_000_000)
        assert unanswering.is_pinged_after_100_s_without_a_pong()

    await until(lambda: not unanswering.connection.is_draining())
    assert not unanswering.is_pinged_after_100_s_without_a_pong()


async def test_a_client_that_only_its_system_answers_for_is_not_alive(unanswering):
    """Pings are acknowledged by its TCP, although it never reads them."""
    for _ in range(3):
        unanswering.handler.send_ping()
        await asyncio.sleep(0.1)  # long enough for its system to acknowledge that

    assert not unanswering.is_pinged_after_100_s_without_a_pong()

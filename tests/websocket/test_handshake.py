"""The handshake, and what keeps a connection."""

import asyncio
import json

import pytest
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from tornado.httpclient import HTTPClientError
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

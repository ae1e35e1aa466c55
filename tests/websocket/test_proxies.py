"""jupyter_server with --gateway-url as the client."""

import asyncio
import json

from sorna_jupyter.websocket import (
    is_proxy,
)
from sorna_jupyter.wire import LEGACY, V1_PROTOCOL
from tests.websocket.parts import PROXY, status


def test_gateway_client_is_known_by_its_user_agent():
    assert is_proxy("Tornado/6.6.1")
    assert not is_proxy("Mozilla/5.0")
    assert not is_proxy("")


async def test_gateway_client_never_gets_a_binary_frame(app, kernel_id):
    """It would end its reader for good, and the cell would hang."""
    socket = await app.socket(kernel_id, headers=PROXY)
    attached = await app.attached()

    attached.emit("iopub", "comm_msg", {"data": 1}, b"\xff\x00", parent={"msg_id": "p"})

    note, message = await socket.frame(), await socket.frame()
    assert isinstance(note, str) and isinstance(message, str)
    assert json.loads(note)["content"]["name"] == "stderr"
    assert "Binary buffers were left out" in json.loads(note)["content"]["text"]
    assert (
        "sorna_jupyter.remote.gateway_url.GatewayConnection" in json.loads(note)["content"]["text"]
    )
    assert json.loads(note)["parent_header"] == {"msg_id": "p"}
    assert (json.loads(message)["content"], json.loads(message)["buffers"]) == ({"data": 1}, [])


async def test_gateway_client_never_gets_a_message_above_its_limit(app, kernel_id):
    """It would close the socket, and come back without the output."""
    socket = await app.socket(kernel_id, headers=PROXY)
    attached = await app.attached()
    big = "x" * (11 << 20)

    attached.emit("iopub", "display_data", {"data": {"text/plain": big}}, parent={"msg_id": "p"})
    attached.emit("shell", "inspect_reply", {"data": big})
    attached.emit("iopub", "status", {"execution_state": "idle"})

    channel, msg_type, content, _ = await socket.receive()
    assert (channel, msg_type) == ("iopub", "stream")
    assert "11.0 MiB was left out" in content["text"]
    assert (await socket.receive())[1] == "stream"
    assert (await socket.receive())[:2] == ("shell", "inspect_reply")
    assert await socket.receive() == status("idle")


async def test_gateway_client_gets_all_else_as_everyone_does(app, kernel_id):
    socket = await app.socket(kernel_id, headers=PROXY)

    (await app.attached()).emit("iopub", "stream", {"name": "stdout", "text": "x" * (9 << 20)})

    assert len((await socket.receive())[2]["text"]) == 9 << 20


async def test_gateway_client_sends_binary_frames_as_text(app, kernel_id):
    """It takes them for JSON: what tornado would break off over is read as what it is."""
    socket = await app.socket(kernel_id, headers=PROXY)
    parts = [b'{"msg_id": "m", "msg_type": "comm_msg"}', b"{}", b"{}", b'{"data": 1}', b"\xff\x00"]
    frame = LEGACY.encode("shell", parts)
    assert isinstance(frame, bytes)

    await socket.connection.write_message(frame, binary=False)

    async with asyncio.timeout(10):
        channel, arrived = await (await app.attached()).sent.get()
    assert (channel, arrived[-1]) == ("shell", b"\xff\x00")


async def test_a_tornado_client_that_speaks_v1_gets_its_buffers(app, kernel_id):
    socket = await app.socket(kernel_id, V1_PROTOCOL, headers=PROXY)

    (await app.attached()).emit("iopub", "comm_msg", {}, b"\xff\x00")

    assert (await socket.receive())[3] == [b"\xff\x00"]

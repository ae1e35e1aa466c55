"""Messages to the kernel and back, and their frames."""

import asyncio
import json

import pytest

from sorna_jupyter.exceptions import AgentUnreachable, KernelNotFound
from sorna_jupyter.protocol import Batch, KernelMessage
from sorna_jupyter.websocket import (
    websocket_frame,
    with_streams_joined,
)
from sorna_jupyter.wire import LEGACY, V1, V1_PROTOCOL
from tests.jupyter_app import running_app
from tests.waiting import until
from tests.websocket.parts import FRAMINGS, status

# -- messages to the kernel ------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["shell", "control", "stdin"])
async def test_a_message_reaches_the_kernel_byte_for_byte(app, socket, channel):
    parts = [b'{"msg_id": "a","msg_type":"x"}', b"{ }", b"{}", '{"é":1.0}'.encode(), b"\0\xff", b""]
    attached = await app.attached()

    await socket.send_frame(socket.framing.encode(channel, parts))

    sent = await attached.sent.get()
    assert sent == (channel, parts)


async def test_thebe_leaves_out_the_channel_and_means_shell(app, kernel_id):
    socket = await app.socket(kernel_id)

    await socket.send_frame('{"header":{"msg_id":"a","msg_type":"execute_request"},"content":{}}')

    channel, parts = await (await app.attached()).sent.get()
    assert channel == "shell"


async def test_messages_wait_for_a_kernel_that_still_starts(app):
    app.agents.let_start.clear()
    kernel_id = await app.start_kernel()

    socket = await app.socket(kernel_id)
    msg_id = await socket.send("shell", "kernel_info_request")
    assert await socket.receive() == status("starting")
    assert app.agents.attached == []
    app.agents.let_start.set()

    channel, parts = await (await app.attached()).sent.get()
    assert (channel, json.loads(parts[0])["msg_id"]) == ("shell", msg_id)


@pytest.mark.parametrize(
    ("protocols", "frame", "code"),
    [
        ((V1_PROTOCOL,), b"", 1007),
        ((V1_PROTOCOL,), b"\xff" * 100, 1007),
        ((V1_PROTOCOL,), "{}", 1003),
        ((V1_PROTOCOL,), V1.encode("shell", [b"no json", b"{}", b"{}", b"{}"]), 1007),
        ((V1_PROTOCOL,), V1.encode("iopub", [b'{"msg_id":"a","msg_type":"b"}'] * 4), 1003),
        ((V1_PROTOCOL,), V1.encode("hb", [b'{"msg_id":"a","msg_type":"b"}'] * 4), 1003),
        ((), "hello", 1007),
        ((), b"\0\0\0\1", 1007),
        ((), '{"header":{"msg_id":"a","msg_type":"b"},"channel":"iopub"}', 1003),
        ((), '{"header":{}}', 1007),
    ],
)
async def test_a_frame_that_is_none_closes_the_socket_with_a_reason(
    app, kernel_id, protocols, frame, code
):
    socket = await app.socket(kernel_id, *protocols)
    attached = await app.attached()

    await socket.send_frame(frame)

    closed, reason = await socket.closed()
    assert closed == code
    assert reason
    assert attached.sent.empty()
    await until(lambda: attached.is_closed)


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_message_types_may_be_allowed_one_by_one(app, kernel_id, framing):
    app.server.kernel_manager.allowed_message_types = ["kernel_info_request"]
    socket = await app.socket(kernel_id, *framing)
    attached = await app.attached()

    await socket.send("shell", "execute_request")
    await socket.send("shell", "kernel_info_request")

    _, parts = await attached.sent.get()
    assert json.loads(parts[0])["msg_type"] == "kernel_info_request"
    assert attached.sent.empty()


async def test_a_client_whose_agent_is_out_of_reach_is_told_to_come_back(app, socket, monkeypatch):
    attached = await app.attached()

    def unreachable(channel, parts):
        raise AgentUnreachable("The agent did not answer in time.")

    monkeypatch.setattr(attached, "send", unreachable)
    await socket.send("shell", "execute_request")

    assert await socket.closed() == (1013, "The agent did not answer in time.")


async def test_a_kernel_that_ends_during_the_handshake_is_dead(app, kernel_id, monkeypatch):
    def gone(*args, **options):
        raise KernelNotFound(kernel_id, "idle for 60 s")

    monkeypatch.setattr(app.kernels, "attach", gone)
    socket = await app.socket(kernel_id)

    assert "idle for 60 s" in (await socket.receive())[2]["text"]
    assert await socket.receive() == status("dead")


async def test_a_kernel_out_of_reach_during_the_handshake_is_not_dead(app, kernel_id, monkeypatch):
    def away(*args, **options):
        raise AgentUnreachable()

    monkeypatch.setattr(app.kernels, "attach", away)
    socket = await app.socket(kernel_id)

    assert (await socket.closed())[0] == 1013


# -- messages from the kernel ----------------------------------------------------------------


async def test_an_output_reaches_the_client_byte_for_byte(app, socket):
    attached = await app.attached()
    buffers = [b"\x00\xff" * 1000, b""]

    attached.emit("iopub", "comm_msg", {"data": 1}, *buffers, parent={"msg_id": "p"})
    attached.emit("shell", "execute_reply", {"status": "ok"})

    assert await socket.receive() == ("iopub", "comm_msg", {"data": 1}, buffers)
    assert await socket.receive() == ("shell", "execute_reply", {"status": "ok"}, [])


async def test_everyone_gets_iopub_and_only_the_asker_the_reply(app, kernel_id):
    sockets = [await app.socket(kernel_id, session=f"s{i}") for i in range(3)]
    await until(lambda: len(app.agents.attached) == 3)
    for attached in app.agents.attached:  # the pool calls every attachment of the kernel
        attached.emit("iopub", "stream", {"name": "stdout", "text": "hello"})
    app.agents.attached[1].emit("stdin", "input_request", {"prompt": "?"})
    app.agents.attached[2].emit("iopub", "status", {"execution_state": "idle"})

    assert {(await socket.receive())[2]["text"] for socket in sockets} == {"hello"}
    assert (await sockets[1].receive())[1] == "input_request"
    assert (await sockets[2].receive())[1] == "status"


async def test_one_message_is_encoded_once_for_all_sockets_of_a_framing(
    app, kernel_id, monkeypatch
):
    sockets = [await app.socket(kernel_id, session=f"s{i}") for i in range(3)]
    await until(lambda: len(app.agents.attached) == 3)
    made = []
    encode = type(LEGACY).encode

    def counted(self, *args):
        made.append(args)
        return encode(self, *args)

    monkeypatch.setattr(type(LEGACY), "encode", counted)
    header = b'{"msg_id":"m","msg_type":"stream"}'
    batch = Batch([KernelMessage.of(kernel_id, 1, "", "iopub", [header, b"{}", b"{}", b"{}"])])
    for attached in app.agents.attached:
        attached.reader.on_batch(batch)

    assert [(await socket.receive())[1] for socket in sockets] == ["stream"] * 3
    assert len(made) == 1


async def test_nothing_is_dropped_for_being_fast(app, socket):
    """jupyter_server drops what is above 1000 messages or 1 MB a second."""
    attached = await app.attached()
    for number in range(5000):
        attached.emit("iopub", "stream", {"name": "stdout", "text": "x" * 1000 + str(number)})

    texts = [(await socket.receive())[2]["text"] for _ in range(5000)]

    assert [int(text[1000:]) for text in texts] == list(range(5000))


async def test_papermill_gets_an_output_of_fifty_megabytes(app, kernel_id):
    socket = await app.socket(kernel_id)
    socket.connection.protocol.params.max_message_size = 1 << 30

    (await app.attached()).emit("iopub", "stream", {"name": "stdout", "text": "x" * 50_000_000})

    assert len((await socket.receive())[2]["text"]) == 50_000_000


async def test_a_client_that_does_not_read_lags_and_costs_nobody_else(tmp_path):
    config = {"SornaWebsocketConnection": {"max_unsent_bytes": 10_000_000}}
    async with running_app(tmp_path, **config) as app:
        kernel_id = await app.start_kernel()
        await app.socket(kernel_id, session="sleeper")
        reader = await app.socket(kernel_id, session="reader")
        await until(lambda: len(app.agents.attached) == 2)
        sleeper_side, reader_side = app.agents.attached
        lines = [{"name": "stdout", "text": "x" * 1_000_000}] * 60
        # tornado's client reads ahead as long as its queue takes it: stop that.
        connection = app.kernels.get(kernel_id).attached[0].listener
        connection._stream.write = never_written(connection._stream)

        for line in lines:
            sleeper_side.emit("iopub", "stream", line)
            reader_side.emit("iopub", "stream", line)
            assert (await reader.receive())[2] == line

        assert sleeper_side.is_paused
        assert not reader_side.is_paused


def never_written(stream):
    """A client that reads nothing: what is written to it stays."""
    return lambda data: asyncio.get_running_loop().create_future()


async def test_a_pong_acknowledges_what_the_client_has(app, socket):
    attached = app.agents.attached[0]
    for i in range(3):
        attached.emit("iopub", "stream", {"name": "stdout", "text": str(i)})
        await socket.receive()

    await until(lambda: attached.acknowledged == 3)


async def test_what_may_come_twice_is_acknowledged_later_and_not_with_every_execute(app, socket):
    attached = app.agents.attached[0]
    attached.emit("iopub", "status", {"execution_state": "busy"})
    await socket.receive()
    assert attached.acknowledged == 0

    await until(lambda: attached.acknowledged == 1)


async def test_a_pong_that_nobody_asked_for_acknowledges_nothing(app, socket):
    attached = app.agents.attached[0]
    stream = socket.connection.stream
    await stream.write(b"\x8a\x88\0\0\0\0" + (99).to_bytes(8, "big"))
    attached.emit("iopub", "stream", {"name": "stdout", "text": "x"})

    await until(lambda: attached.acknowledged)
    assert attached.acknowledged == 1


def test_streams_are_joined_for_who_lags_and_nothing_else_is():
    def message(seq, msg_type, content, parent="p"):
        parts = [{"msg_id": f"m{seq}", "msg_type": msg_type}, {"msg_id": parent}, {}, content]
        encoded = [json.dumps(part).encode() for part in parts]
        return KernelMessage.of("k", seq, "", "iopub", encoded)

    def out(seq, text, name="stdout", parent="p"):
        return message(seq, "stream", {"name": name, "text": text}, parent)

    picture = message(6, "display_data", {"data": {}})
    broken = message(8, "stream", {"name": 3})

    joined = with_streams_joined(
        Batch(
            [
                *(out(1, "a"), out(2, "b"), out(3, "c")),
                *(out(4, "e", "stderr"), out(5, "x", parent="q")),
                *(picture, out(7, "d"), broken),
            ]
        )
    )

    texts = [json.loads(m.parts[3]).get("text") for m in joined.messages]
    assert texts == ["abc", "e", "x", None, "d", None]
    assert [m.seq for m in joined.messages] == [3, 4, 5, 6, 7, 8]
    assert joined.next == 9


async def test_a_kernels_broken_header_costs_one_message_and_not_the_socket(app, kernel_id):
    socket = await app.socket(kernel_id)
    attached = await app.attached()

    attached.say("iopub", [b"{", b"{}", b"{}", b"{}"])
    attached.emit("iopub", "stream", {"name": "stdout", "text": "after"})

    assert (await socket.receive())[2]["text"] == "after"


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_tracebacks_may_be_hidden(app, kernel_id, framing):
    app.server.kernel_manager.allow_tracebacks = False
    socket = await app.socket(kernel_id, *framing)
    attached = await app.attached()

    secret = {"ename": "KeyError", "evalue": "secret", "traceback": ["secret"]}
    attached.emit("iopub", "error", secret)
    attached.emit("iopub", "stream", {"name": "stdout", "text": "no secret"})

    _, msg_type, content, _ = await socket.receive()
    assert msg_type == "error"
    assert "secret" not in json.dumps(content["evalue"])
    assert (await socket.receive())[2]["text"] == "no secret"


# -- frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 100_000])
async def test_frames_of_every_size_are_what_a_websocket_client_reads(app, kernel_id, size):
    socket = await app.socket(kernel_id)

    (await app.attached()).emit("iopub", "stream", {"name": "stdout", "text": "x" * size})

    assert (await socket.receive())[2]["text"] == "x" * size


def test_a_frame_is_rfc_6455():
    assert websocket_frame("é") == b"\x81\x02\xc3\xa9"
    assert websocket_frame(b"ab") == b"\x82\x02ab"
    assert websocket_frame(b"a" * 126)[:4] == b"\x82\x7e\x00\x7e"
    assert websocket_frame(b"a" * 65536)[:10] == b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00"


async def test_compression_may_be_switched_on(tmp_path):
    settings = {"ServerApp": {"tornado_settings": {"websocket_compression_options": {}}}}
    async with running_app(tmp_path, **settings) as app:
        socket = await app.socket(await app.start_kernel())

        (await app.attached()).emit("iopub", "stream", {"name": "stdout", "text": "x" * 1000})

        assert len((await socket.receive())[2]["text"]) == 1000

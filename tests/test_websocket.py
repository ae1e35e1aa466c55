"""The kernel's websocket: what front-ends send and get. The tests play the kernel."""

import asyncio
import json

import pytest
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from tornado.httpclient import HTTPClientError
from tornado.websocket import websocket_connect

from sorna_jupyter.exceptions import AgentUnreachable, KernelNotFound, KernelStartFailed
from sorna_jupyter.protocol import Batch, KernelMessage
from sorna_jupyter.websocket import (
    SornaWebsocketConnection,
    is_proxy,
    websocket_frame,
    with_streams_joined,
)
from sorna_jupyter.wire import LEGACY, V1, V1_PROTOCOL
from tests.jupyter_app import KERNEL_INFO, TOKEN, running_app
from tests.waiting import until

PROXY = {"User-Agent": "Tornado/6.6.1"}
FRAMINGS = [pytest.param((V1_PROTOCOL,), id="v1"), pytest.param((), id="legacy")]


@pytest.fixture
async def app(tmp_path):
    async with running_app(tmp_path) as app:
        yield app


@pytest.fixture
async def kernel_id(app):
    return await app.start_kernel()


@pytest.fixture(params=FRAMINGS)
async def socket(app, kernel_id, request):
    """One in each framing."""
    return await app.socket(kernel_id, *request.param)


def stderr(text):
    return ("iopub", "stream", {"name": "stderr", "text": text}, [])


def status(state):
    return ("iopub", "status", {"execution_state": state}, [])


# -- the handshake ---------------------------------------------------------------------------


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


# -- sessions --------------------------------------------------------------------------------


async def test_jupyterlab_back_with_the_same_session_replaces_its_dead_socket(app, kernel_id):
    old = await app.socket(kernel_id, session="tab-1")
    await app.attached()
    new = await app.socket(kernel_id, session="tab-1")

    assert (await old.closed())[0] == 1001
    await until(lambda: len(app.agents.attached) == 2)
    assert [attached.is_closed for attached in app.agents.attached] == [True, False]
    app.agents.attached[1].emit("iopub", "stream", {"name": "stdout", "text": "here"})
    assert (await new.receive())[2]["text"] == "here"
    await until(lambda: app.kernels.get(kernel_id).connections == 1)


async def test_two_kernels_may_have_the_same_session(app, kernel_id):
    other = await app.start_kernel()
    sockets = [await app.socket(kernel_id), await app.socket(other)]
    await until(lambda: len(app.agents.attached) == 2)

    for attached in app.agents.attached:
        attached.emit("iopub", "stream", {"name": "stdout", "text": attached.kernel_id})

    assert [(await s.receive())[2]["text"] for s in sockets] == [kernel_id, other]


# -- kernel_info while busy ------------------------------------------------------------------


async def test_jupyterlab_is_answered_at_once_while_a_cell_runs(app, socket, kernel_id):
    """It holds back everything else until it has the kernel_info_reply."""
    attached = await app.attached()
    app.kernels.get(kernel_id).execution_state = "busy"

    msg_id = await socket.send("shell", "kernel_info_request")

    frames = [socket.framing.decode(await socket.frame()) for _ in range(4)]
    assert {json.loads(parts[1])["msg_id"] for _, parts in frames} == {msg_id}
    told = [
        (channel, json.loads(parts[0])["msg_type"], json.loads(parts[3]))
        for channel, parts in frames
    ]
    assert told == [
        ("iopub", "status", {"execution_state": "busy"}),
        ("shell", "kernel_info_reply", KERNEL_INFO),
        ("iopub", "status", {"execution_state": "idle"}),
        ("iopub", "status", {"execution_state": "busy"}),  # what the badge ends with
    ]
    assert attached.sent.empty()


@pytest.mark.parametrize(
    ("state", "channel", "header"),
    [
        ("idle", "shell", {}),
        ("busy", "control", {}),
        ("busy", "shell", {"subshell_id": "s"}),
    ],
)
async def test_otherwise_the_kernel_answers_itself(app, socket, kernel_id, state, channel, header):
    app.kernels.get(kernel_id).execution_state = state

    await socket.send(channel, "kernel_info_request", **header)

    assert (await (await app.attached()).sent.get())[0] == channel


# -- the kernel's life -----------------------------------------------------------------------


async def test_a_notebook_is_told_why_its_kernel_died(app, socket, kernel_id):
    attached = await app.attached()
    reason = "killed: out of memory (limit 512 MiB)"

    app.kernels._apply(await app.registry.mark_dead(kernel_id, reason))

    assert await socket.receive() == stderr(f"The kernel died: {reason}\n")
    assert await socket.receive() == status("dead")
    assert attached.is_closed
    # As with jupyter_server, the socket stays: what is sent on it now is ignored.
    await socket.send("shell", "execute_request")
    socket.connection.ping(b"")
    assert socket.close_code is None


async def test_jupyterlab_shows_why_its_kernel_died_below_the_cell_that_ran(app, socket, kernel_id):
    """Output that is no request's it shows nowhere."""
    attached = await app.attached()
    done, running, _ = [await socket.send("shell", "execute_request") for _ in range(3)]
    for _ in range(3):
        await attached.sent.get()
    request = {"msg_id": done, "msg_type": "execute_request"}
    attached.emit("shell", "execute_reply", {"status": "ok"}, parent=request)
    assert (await socket.receive())[1] == "execute_reply"

    app.kernels._apply(await app.registry.mark_dead(kernel_id, "exit code 3"))

    assert (await socket.parent())["msg_id"] == running


async def test_after_a_restart_no_cell_of_before_is_blamed(app, socket, kernel_id):
    attached = await app.attached()
    await socket.send("shell", "execute_request")
    await attached.sent.get()
    await app.json("POST", f"/api/kernels/{kernel_id}/restart")

    app.kernels._apply(await app.registry.mark_dead(kernel_id, "exit code 3"))

    assert await socket.parent() == {}


async def test_other_tabs_are_told_that_a_kernel_was_stopped(app, socket, kernel_id):
    await app.attached()

    await app.fetch("DELETE", f"/api/kernels/{kernel_id}")

    assert await socket.receive() == stderr("The kernel was stopped: shut down by its owner\n")
    assert await socket.receive() == status("dead")


async def test_a_notebook_is_told_why_its_kernel_did_not_start(app):
    app.agents.let_start.clear()
    kernel_id = await app.start_kernel()
    socket = await app.socket(kernel_id)
    assert await socket.receive() == status("starting")

    app.agents.failure = KernelStartFailed("no module named ipykernel")
    app.agents.let_start.set()

    assert await socket.receive() == stderr("The kernel died: no module named ipykernel\n")
    assert await socket.receive() == status("dead")


async def test_what_the_gateway_says_has_an_empty_parent_for_jupyter_kernel_client(
    app, socket, kernel_id
):
    await app.attached()

    await app.kernels.stop(kernel_id)

    assert await socket.parent() == {}


async def test_jupyterlab_hears_of_a_restart_over_http_only(app, socket, kernel_id):
    """`status: restarting` would make it open another socket, twice."""
    attached = await app.attached()

    await app.fetch("POST", f"/api/kernels/{kernel_id}/restart")
    attached.emit("iopub", "stream", {"name": "stdout", "text": "the same socket"})
    await socket.send("shell", "execute_request")

    assert (await socket.receive())[2]["text"] == "the same socket"
    assert (await attached.sent.get())[0] == "shell"
    assert not attached.is_closed


async def test_a_notebook_is_told_that_its_kernel_is_out_of_reach(app, socket, kernel_id):
    await app.attached()

    app.kernels._apply((await app.registry.mark_lost_agents(-1, 1e12))[0])

    text = (await socket.receive())[2]["text"]
    assert text.startswith("The kernel is out of reach: ")


async def test_clients_hear_1001_when_the_server_stops(app, socket):
    await app.attached()

    await SornaWebsocketConnection.close_all()

    assert await socket.closed() == (1001, "the server is stopping")


# -- jupyter_server with --gateway-url -------------------------------------------------------


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


# -- cells whose client may go ---------------------------------------------------------------


class Notes:
    """In place of `UnattendedCells`: what it is told."""

    def __init__(self):
        self.told = []

    def connected(self, kernel, session_id):
        self.told.append(("connected", session_id))

    def executed(self, kernel, session_id, parts):
        self.told.append(("executed", session_id))

    def answered(self, kernel_id, session_id, msg_id, seq):
        self.told.append(("answered", session_id, msg_id, seq))

    def acknowledged(self, kernel_id, session_id, seq):
        self.told.append(("acknowledged", session_id, seq))

    def disconnected(self, kernel_id, session_id):
        self.told.append(("disconnected", session_id))


@pytest.fixture
def notes(app):
    notes = app.server.kernel_manager.unattended = Notes()
    return notes


async def test_what_a_client_executes_is_told_until_it_is_gone(app, kernel_id, notes):
    socket = await app.socket(kernel_id, V1_PROTOCOL)
    msg_id = await socket.send("shell", "execute_request", {"code": "x"})
    attached = await app.attached()
    await attached.sent.get()
    attached.emit(
        "shell",
        "execute_reply",
        {"status": "ok"},
        parent={"msg_id": msg_id, "msg_type": "execute_request"},
    )
    await socket.receive()
    await until(lambda: len(notes.told) == 4)
    socket.connection.close()
    await until(lambda: len(notes.told) == 5)

    assert notes.told == [
        ("connected", "client"),
        ("executed", "client"),
        ("answered", "client", msg_id, 1),
        ("acknowledged", "client", 1),
        ("disconnected", "client"),
    ]


async def test_a_client_that_is_back_before_its_old_socket_is_gone_is_not_taken_for_gone(
    app, kernel_id, notes
):
    old = await app.socket(kernel_id, V1_PROTOCOL)
    await app.socket(kernel_id, V1_PROTOCOL)
    await old.closed()
    await until(lambda: len(app.server.kernel_manager.kernels.get(kernel_id).attached) == 1)

    assert [what for what, _ in notes.told] == ["connected", "disconnected", "connected"]

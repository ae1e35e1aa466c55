"""What a client is told of its session and of its kernel's life."""

import json

import pytest

from sorna_jupyter.exceptions import KernelStartFailed
from sorna_jupyter.websocket import (
    SornaWebsocketConnection,
)
from tests.jupyter_app import KERNEL_INFO
from tests.waiting import until
from tests.websocket.parts import status, stderr

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

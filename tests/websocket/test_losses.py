"""Cells whose end is lost: the gateway ends them, so that no page waits for ever."""

import asyncio
import json

from sorna_jupyter.protocol import Gap
from sorna_jupyter.wire import V1_PROTOCOL
from tests.jupyter_app import KERNEL_INFO
from tests.waiting import until

LOST = "Whether this ran to its end is not known: the relay was away"


async def loses(app, attached, *answered):
    """The relay says that it was away; the kernel answers what it is asked thereupon, and before
    that these requests."""
    attached.reader.on_gap(Gap(attached.kernel_id, 7, 7, None, "the relay was away"))
    waiting = list(answered)
    while True:
        try:
            async with asyncio.timeout(0.2):
                channel, parts = await attached.sent.get()
        except TimeoutError:
            return
        question = json.loads(parts[0])
        assert (channel, question["msg_type"]) == ("shell", "kernel_info_request")
        while waiting:
            parent = {"msg_id": waiting.pop(0), "msg_type": "execute_request"}
            attached.emit("shell", "execute_reply", {"status": "ok"}, parent=parent)
        attached.emit("shell", "kernel_info_reply", KERNEL_INFO, parent=question)


async def received(socket, attached):
    """What there is by now: kind of message, state or status or text, msg_id of the parent."""
    attached.emit("iopub", "stream", {"text": "the end of it"})
    found = []
    while True:
        _, (header, parent, _, content) = socket.framing.decode(await socket.frame())
        content = json.loads(content)
        if content.get("text") == "the end of it":
            return found
        said = next(content[key] for key in ("execution_state", "evalue", "status", "text") if
            key in content)  # fmt: skip
        found.append((json.loads(header)["msg_type"], said, json.loads(parent).get("msg_id")))


async def test_a_cell_whose_end_is_lost_does_not_run_for_ever_in_jupyterlab(app, socket):
    attached = await app.attached()
    first, second = [await socket.send("shell", "execute_request") for _ in range(2)]
    for _ in range(2):
        await attached.sent.get()

    await loses(app, attached)

    gap = "[Output may be missing here: the relay was away]\n"
    assert await received(socket, attached) == [
        ("stream", gap, first),
        ("stream", f"[{LOST}]\n", first),
        ("execute_reply", LOST, first),
        ("status", "idle", first),
        ("stream", f"[{LOST}]\n", second),
        ("execute_reply", LOST, second),
        ("status", "idle", second),
    ]


async def test_a_cell_that_is_answered_after_a_loss_keeps_its_answer(app, socket):
    attached = await app.attached()
    msg_id = await socket.send("shell", "execute_request")
    await attached.sent.get()

    await loses(app, attached, msg_id)

    kinds = [kind for kind, _, _ in await received(socket, attached)]
    assert kinds == ["stream", "execute_reply"]


async def test_a_cell_that_was_answered_before_a_loss_may_have_lost_its_idle(app, socket):
    attached = await app.attached()
    msg_id = await socket.send("shell", "execute_request")
    await attached.sent.get()
    request = {"msg_id": msg_id, "msg_type": "execute_request"}
    attached.emit("shell", "execute_reply", {"status": "ok"}, parent=request)

    await loses(app, attached)

    assert await received(socket, attached) == [
        ("execute_reply", "ok", msg_id),
        ("stream", "[Output may be missing here: the relay was away]\n", None),
        ("status", "idle", msg_id),
    ]


async def test_a_cell_in_another_subshell_is_not_judged_by_the_main_one(app, socket):
    attached = await app.attached()
    await socket.send("shell", "execute_request", subshell_id="s1")
    await attached.sent.get()

    await loses(app, attached)

    assert [kind for kind, _, _ in await received(socket, attached)] == ["stream"]


async def test_a_client_that_was_away_meanwhile_gets_its_cells_end_too(app, kernel_id):
    laptop = await app.socket(kernel_id, V1_PROTOCOL, session="laptop")
    attached = await app.attached()
    msg_id = await laptop.send("shell", "execute_request")
    await attached.sent.get()
    laptop.connection.close()
    await until(lambda: attached.is_closed)

    back = await app.socket(kernel_id, V1_PROTOCOL, session="laptop")
    await until(lambda: len(app.agents.attached) == 2)
    attached = await app.attached()
    await loses(app, attached)

    assert ("execute_reply", LOST, msg_id) in await received(back, attached)
    back.connection.close()
    await until(lambda: attached.is_closed)
    assert app.kernels.get(kernel_id).unanswered == {}


async def test_a_kernel_that_dies_or_restarts_is_asked_no_more(app, socket, kernel_id):
    attached = await app.attached()
    await socket.send("shell", "execute_request")
    await attached.sent.get()
    attached.reader.on_gap(Gap(kernel_id, 7, 7, None, "the relay was away"))
    _, question = await attached.sent.get()

    await app.json("POST", f"/api/kernels/{kernel_id}/restart")
    attached.emit("shell", "kernel_info_reply", KERNEL_INFO, parent=json.loads(question[0]))

    kinds = [kind for kind, _, _ in await received(socket, attached)]
    assert kinds == ["stream", "kernel_info_reply"]
    assert attached.sent.empty()

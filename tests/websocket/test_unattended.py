"""Who is told that a client with a running cell may go."""

import pytest

from sorna_jupyter.wire import V1_PROTOCOL
from tests.waiting import until


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

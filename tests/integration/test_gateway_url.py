"""A stock jupyter_server with --gateway-url and our websocket client, in front of real kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import websocket

from tests.gateways import Gateway, start_front, wait_until
from tests.kernel_socket import FRAMINGS, KernelSocket
from tests.remote_servers import Network

OUR_CLIENT = "sorna_jupyter.remote.gateway_url.GatewayConnection"
GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013

ECHO = """\
from comm import create_comm
comm = create_comm(target_name='echo', comm_id='echo')
comm.on_msg(lambda message: comm.send(buffers=[bytes(message['buffers'][0])[::-1]]))"""


@pytest.fixture(scope="module")
def network(local_gateway: Gateway) -> Network:
    return Network(int(local_gateway.url.rpartition(":")[2]))


@pytest.fixture(scope="module")
def front(local_gateway: Gateway, network: Network) -> Iterator[Gateway]:
    setting = f"--ServerApp.kernel_websocket_connection_class={OUR_CLIENT}"
    front = start_front(network.url, local_gateway.token, setting)
    yield front
    front.dispose()


@pytest.fixture
def kernel_id(front: Gateway) -> Iterator[str]:
    kernel_id = front.start_kernel(name="python3")
    yield kernel_id
    front.stop_kernel(kernel_id)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_binary_buffers_pass_both_ways(front: Gateway, kernel_id: str, framing: str) -> None:
    buffer = bytes(range(256)) * 1000
    with KernelSocket(front, kernel_id, framing) as socket:
        socket.execute(ECHO)

        socket.send("shell", "comm_msg", {"comm_id": "echo", "data": {}}, buffers=[buffer])

        while (message := socket.receive())["header"]["msg_type"] != "comm_msg":
            pass
    assert message["buffers"] == [buffer[::-1]]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_output_above_tornados_limit_arrives(
    front: Gateway, kernel_id: str, framing: str
) -> None:
    with KernelSocket(front, kernel_id, framing) as socket:
        assert len(socket.execute("print('x' * (12 << 20))").text) == (12 << 20) + 1


def test_what_was_missed_comes_after_a_cut(
    front: Gateway, local_gateway: Gateway, network: Network, kernel_id: str
) -> None:
    def state() -> str:
        state: str = local_gateway.get(f"/api/kernels/{kernel_id}").json()["execution_state"]
        return state

    with KernelSocket(front, kernel_id) as first:
        first.execute("import time")
        code = "print('before', flush=True); time.sleep(2); print('after')"
        first.send("shell", "execute_request", {"code": code})
        while first.receive()["content"].get("text") != "before\n":
            pass
        network.cut()
        assert close_code(first) == GOING_AWAY
        with KernelSocket(front, kernel_id, session=first.session) as refused:
            assert close_code(refused) == TRY_AGAIN_LATER
        wait_until(lambda: state() == "idle", "the cell has ended", 20)
    network.restore()

    with KernelSocket(front, kernel_id, session=first.session) as second:
        while second.receive()["content"].get("text") != "after\n":
            pass
        assert second.execute("1 + 1").text == "2"


def close_code(socket: KernelSocket) -> int:
    """Reads on until the server closes."""
    while True:
        opcode, data = socket.ws.recv_data()
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            return int.from_bytes(data[:2], "big")

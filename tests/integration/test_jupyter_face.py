"""Both framings against real kernels, through the whole gateway."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.gateways import Gateway, start_front, wait_until
from tests.kernel_socket import FRAMINGS, KernelSocket


@pytest.fixture(scope="module")
def kernel_id(local_gateway: Gateway) -> Iterator[str]:
    kernel_id = local_gateway.start_kernel()
    yield kernel_id
    local_gateway.stop_kernel(kernel_id)


@pytest.fixture(params=FRAMINGS)
def socket(local_gateway: Gateway, kernel_id: str, request) -> Iterator[KernelSocket]:
    with KernelSocket(local_gateway, kernel_id, request.param) as socket:
        yield socket


def state_of(gateway: Gateway, kernel_id: str) -> str:
    return gateway.get(f"/api/kernels/{kernel_id}").json()["execution_state"]


def next_of(socket: KernelSocket, msg_type: str) -> dict:
    while (message := socket.receive())["header"]["msg_type"] != msg_type:
        pass
    return message


def test_the_kernelspec_is_there_on_the_first_page(new_gateway) -> None:
    """JupyterLab asks once, and then not again for a minute."""
    gateway = new_gateway("--runtime=local")

    assert list(gateway.get("/api/kernelspecs").json()["kernelspecs"]) == ["python3"]


def test_jupyter_console_is_asked_for_input(socket: KernelSocket) -> None:
    execution = socket.execute("print(input('name? ') * 2)", on_input=lambda prompt: f"<{prompt}>")

    assert execution.text == "<name? ><name? >\n"


def test_papermill_is_asked_for_input_by_the_very_first_cell(
    local_gateway: Gateway, kernel_id: str
) -> None:
    """A kernel drops a prompt for a stdin that is not connected yet, and waits for ever."""
    for attempt in range(30):
        with KernelSocket(local_gateway, kernel_id, FRAMINGS[attempt % 2]) as socket:
            execution = socket.execute("print(input())", timeout=10, on_input=lambda _: "yes")

            assert execution.text == "yes\n"


def test_ipywidgets_buffers_go_both_ways(socket: KernelSocket) -> None:
    socket.execute(
        "from ipykernel.comm import Comm\n"
        "def opened(comm, message):\n"
        "    comm.on_msg(lambda m: comm.send({'n': len(m['buffers'])},\n"
        "                                    buffers=[bytes(b)[::-1] for b in m['buffers']]))\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    data = bytes(range(256)) * 1000

    socket.send("shell", "comm_open", {"comm_id": "c1", "target_name": "echo", "data": {}})
    content = {"comm_id": "c1", "data": {}}
    socket.send("shell", "comm_msg", content, buffers=[data, b""])

    answer = next_of(socket, "comm_msg")
    assert answer["content"]["data"] == {"n": 2}
    assert answer["buffers"] == [data[::-1], b""]


def test_jupyterlabs_debugger_is_answered_on_control(socket: KernelSocket) -> None:
    request = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}

    socket.send("control", "debug_request", request)

    assert next_of(socket, "debug_reply")["content"]["success"] is True


def test_a_subshell_answers_while_a_cell_runs(socket: KernelSocket) -> None:
    socket.send("control", "create_subshell_request", {})
    subshell = next_of(socket, "create_subshell_reply")["content"]["subshell_id"]
    with_sleep = {"code": "import time; time.sleep(3)", "silent": False}
    main = socket.send("shell", "execute_request", with_sleep)

    began = time.monotonic()
    execution = socket.execute("print('meanwhile')", subshell_id=subshell)

    assert execution.text == "meanwhile\n"
    assert time.monotonic() - began < 2.5
    while next_of(socket, "execute_reply")["parent_header"]["msg_id"] != main:
        pass
    socket.send("control", "delete_subshell_request", {"subshell_id": subshell})


def test_jupyterlab_opens_a_busy_kernels_notebook_at_once(
    local_gateway: Gateway, kernel_id: str, socket: KernelSocket
) -> None:
    """It waits for the kernel_info_reply before it shows anything."""
    sleep = {"code": "import time; time.sleep(60)", "silent": False}
    wait_until(lambda: state_of(local_gateway, kernel_id) == "idle", "the last test is over")
    socket.send("shell", "execute_request", sleep)
    wait_until(lambda: state_of(local_gateway, kernel_id) == "busy", "the kernel is busy")

    with KernelSocket(local_gateway, kernel_id, socket.framing) as tab:
        msg_id = tab.send("shell", "kernel_info_request", {})
        reply = next_of(tab, "kernel_info_reply")
        states = [next_of(tab, "status")["content"]["execution_state"] for _ in range(2)]
    assert reply["parent_header"]["msg_id"] == msg_id
    assert reply["content"]["implementation"] == "ipython"
    assert states == ["idle", "busy"]

    interrupted = local_gateway.post(f"/api/kernels/{kernel_id}/interrupt", {})
    assert interrupted.status_code == 204
    assert next_of(socket, "error")["content"]["ename"] == "KeyboardInterrupt"


def test_the_socket_survives_a_restart(local_gateway: Gateway, socket: KernelSocket) -> None:
    kernel_id = local_gateway.start_kernel()
    with KernelSocket(local_gateway, kernel_id, socket.framing) as socket:
        socket.execute("x = 1")

        response = local_gateway.post(f"/api/kernels/{kernel_id}/restart", {})

        assert response.status_code == 200
        assert response.json()["execution_state"] == "idle"
        assert "NameError" in socket.execute("x").text
        assert socket.execute("input()", on_input=lambda _: "y").text == "'y'"
    local_gateway.stop_kernel(kernel_id)


def test_a_notebook_is_told_why_its_kernel_died(
    local_gateway: Gateway, socket: KernelSocket
) -> None:
    kernel_id = local_gateway.start_kernel()
    with KernelSocket(local_gateway, kernel_id, socket.framing) as socket:
        code = {"code": "import os; os.kill(os.getpid(), 9)", "silent": False}
        socket.send("shell", "execute_request", code)

        note = next_of(socket, "stream")["content"]
        status = next_of(socket, "status")["content"]

    assert note["name"] == "stderr"
    assert note["text"].startswith("The kernel died: ")
    assert status == {"execution_state": "dead"}
    response = local_gateway.get(f"/api/kernels/{kernel_id}")
    assert response.status_code == 404
    assert note["text"].removeprefix("The kernel died: ").strip() in response.json()["message"]


def test_eight_megabytes_of_output_arrive_whole(socket: KernelSocket) -> None:
    """jupyter_server delivers 2.8 of them and drops the rest for ever."""
    execution = socket.execute("for i in range(40): print('x' * 200_000, flush=True)")

    assert execution.text == ("x" * 200_000 + "\n") * 40


def test_a_kernels_environment_is_what_was_asked_and_nothing_of_the_servers(
    new_gateway, socket: KernelSocket
) -> None:
    gateway = new_gateway("--runtime=local", env={"SERVERS_SECRET": "s3cret"})
    body = {"path": "n.ipynb", "name": "n.ipynb", "type": "notebook", "kernel": {}}

    session = gateway.post("/api/sessions", body).json()

    with KernelSocket(gateway, session["kernel"]["id"]) as tab:
        text = tab.execute("import os; print(dict(os.environ))").text
    assert "'JPY_SESSION_NAME': 'n.ipynb'" in text
    assert "s3cret" not in text


# -- a stock jupyter_server with --gateway-url -----------------------------------------------


@pytest.fixture(scope="module")
def proxy(local_gateway: Gateway) -> Iterator[Gateway]:
    env = {"KERNEL_USERNAME": "carol"}
    proxy = start_front(local_gateway.url, local_gateway.token, env=env)
    yield proxy
    proxy.dispose()


def test_gateway_client_lists_specs_also_with_kernel_username(proxy: Gateway) -> None:
    assert list(proxy.get("/api/kernelspecs").json()["kernelspecs"]) == ["python3"]
    one = proxy.get("/api/kernelspecs/python3")
    assert (one.status_code, one.json()["name"]) == (200, "python3")


@pytest.fixture(scope="module")
def proxied(proxy: Gateway) -> str:
    body = {"path": "n.ipynb", "name": "n", "type": "notebook", "kernel": {"name": "python3"}}
    response = proxy.post("/api/sessions", body)
    assert response.status_code == 201, response.text
    kernel_id: str = response.json()["kernel"]["id"]
    return kernel_id


def test_a_widget_does_not_kill_the_proxys_reader(proxy: Gateway, proxied: str) -> None:
    with KernelSocket(proxy, proxied, "legacy") as socket:
        execution = socket.execute(
            "from ipykernel.comm import Comm\n"
            "Comm(target_name='t', data={}, buffers=[b'\\xff\\x00'])\n"
            "print('still here')"
        )

        assert "Binary buffers were left out" in execution.text
        assert "still here" in execution.text
        assert socket.execute("1 + 1").text == "2"


def test_an_output_above_the_proxys_limit_is_replaced_by_a_note(
    proxy: Gateway, proxied: str
) -> None:
    with KernelSocket(proxy, proxied, "legacy") as socket:
        code = "from IPython.display import display\n"
        code += "display({'text/plain': 'x' * (12 << 20)}, raw=True)\nprint('after')"

        execution = socket.execute(code)

        assert "was left out" in execution.text
        assert execution.text.endswith("after\n")
        assert len(execution.text) < 1000


def test_the_proxy_interrupts_restarts_and_stops(proxy: Gateway, proxied: str) -> None:
    assert proxy.post(f"/api/kernels/{proxied}/interrupt", {}).status_code == 204
    restarted = proxy.post(f"/api/kernels/{proxied}/restart", {})
    assert restarted.status_code == 200, restarted.text
    assert json.loads(restarted.text)["id"] == proxied
    assert proxied in [kernel["id"] for kernel in proxy.get("/api/kernels").json()]
    assert proxy.delete(f"/api/kernels/{proxied}").status_code == 204

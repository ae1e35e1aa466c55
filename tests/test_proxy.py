"""The local proxy kernel against a plain Jupyter server, through an installed kernelspec."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from jupyter_client.session import Session

from sorna_jupyter.remote import credentials, kernelspecs
from sorna_jupyter.remote.server import Server
from tests.gateways import free_port, wait_until
from tests.remote_servers import Network, StockServer, near, stock_server  # noqa: F401  (fixtures)

Message = dict[str, Any]
Start = Callable[..., "Kernel"]
Install = Callable[[str], None]


class Kernel:
    """A local kernel manager and its client, on an installed kernelspec."""

    def __init__(self, name: str, **traits: Any) -> None:
        self.stderr = os.memfd_create("stderr")
        self.manager = KernelManager(kernel_name=name, **traits)
        self.manager.start_kernel(stdout=subprocess.DEVNULL, stderr=self.stderr)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()

    def wait(self) -> Kernel:
        self.client.wait_for_ready(timeout=60)
        return self

    def another_client(self) -> BlockingKernelClient:
        """One with a session, and so a routing identity, of its own."""
        client = BlockingKernelClient(session=Session(key=self.manager.session.key))
        client.load_connection_info(self.manager.get_connection_info())
        client.start_channels()
        client.wait_for_ready(timeout=60)
        return client

    @property
    def pid(self) -> int:
        pid: int = self.manager.provisioner.pid
        return pid

    def printed(self) -> str:
        return os.pread(self.stderr, 65536, 0).decode()

    def dispose(self) -> None:
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)
        os.close(self.stderr)


@pytest.fixture
def far(stock_server: StockServer) -> StockServer:  # noqa: F811
    return stock_server


@pytest.fixture
def network(far: StockServer) -> Iterator[Network]:
    network = Network(far.port)
    yield network
    network.close()


@pytest.fixture
def install(far: StockServer, near: Path) -> Install:  # noqa: F811
    """Installs the kernelspec, from `url` if another way leads to the server."""

    def install_kernelspec(url: str) -> None:
        credentials.save(url, far.token)
        server = Server(url, far.token)
        ours = kernelspecs.install(server, kernelspecs.offered(server)["python3"])
        assert ours.name == "sorna-python3"

    return install_kernelspec


@pytest.fixture
def start(install: Install, far: StockServer, network: Network, near: Path) -> Iterator[Start]:  # noqa: F811
    """Starts a kernel of the installed kernelspec."""
    kernels = []

    def start_kernel(url: str = far.url, **traits: Any) -> Kernel:
        if not (near / "kernels").exists():
            install(url)
        kernels.append(Kernel("sorna-python3", **traits))
        return kernels[-1]

    yield start_kernel
    for kernel in kernels:
        kernel.dispose()
    # Whatever a test did, none may stay behind; this is half of what is tested here.
    network.restore()
    wait_until(lambda: not far.kernels(), "no remote kernel is left")
    # Each still has to hear that its kernel is gone, before the network goes.
    wait_until(lambda: not guardians({far.url, network.url}), "no guardian is left")


def guardians(urls: set[str]) -> list[int]:
    """The guardians of kernels at these addresses."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = file.read_text().split("\0")
        except OSError:
            continue
        if "sorna_jupyter.remote.guardian" in argv and urls.intersection(argv):
            found.append(int(file.parent.name))
    return found


def outputs_of(client: BlockingKernelClient, msg_id: str) -> Iterator[Message]:
    """What comes on iopub for this request, until its kernel is idle again."""
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != msg_id:
            continue
        if message["content"].get("execution_state") == "idle":
            return
        yield message


def text_of(messages: list[Message]) -> str:
    return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")


def execute(client: BlockingKernelClient, code: str) -> tuple[str, str]:
    """Status and printed text."""
    msg_id = client.execute(code)
    text = text_of(list(outputs_of(client, msg_id)))
    return reply_to(client, msg_id)["content"]["status"], text


def reply_to(client: BlockingKernelClient, msg_id: str) -> Message:
    while True:
        reply: Message = client.get_shell_msg(timeout=60)
        if reply["parent_header"].get("msg_id") == msg_id:
            return reply


def next_output(client: BlockingKernelClient, msg_type: str) -> Message:
    while True:
        message: Message = client.get_iopub_msg(timeout=60)
        if message["msg_type"] == msg_type:
            return message


# -- messages --------------------------------------------------------------------------------


def test_code_runs_on_the_remote_kernel(start: Start, far: StockServer) -> None:
    client = start().wait().client

    assert execute(client, "import os; print(os.getppid(), 'here')")[0] == "ok"

    [model] = far.kernels()
    assert model["name"] == "python3"


def test_completion_and_inspection(start: Start) -> None:
    client = start().wait().client

    completion = reply_to(client, client.complete("prin"))["content"]
    inspection = reply_to(client, client.inspect("print"))["content"]

    assert "print" in completion["matches"]
    assert inspection["found"]


def test_input_is_asked_of_the_client_that_runs_the_cell(start: Start) -> None:
    kernel = start().wait()
    other = kernel.another_client()

    msg_id = other.execute("print('hello', input('who? '))", allow_stdin=True)
    request = other.get_stdin_msg(timeout=60)
    assert request["content"]["prompt"] == "who? "
    other.input("Ada")

    assert text_of(list(outputs_of(other, msg_id))) == "hello Ada\n"
    assert reply_to(other, msg_id)["content"]["status"] == "ok"
    with pytest.raises(Empty):
        kernel.client.get_stdin_msg(timeout=0)
    other.stop_channels()


def test_each_client_gets_its_own_replies_and_all_get_the_output(start: Start) -> None:
    kernel = start().wait()
    other = kernel.another_client()

    mine = kernel.client.execute("print('from one')")
    theirs = other.execute("print('from two')")

    for client in (kernel.client, other):
        texts = [next_output(client, "stream") for _ in range(2)]
        assert {m["parent_header"]["msg_id"]: m["content"]["text"] for m in texts} == {
            mine: "from one\n",
            theirs: "from two\n",
        }
    for client, msg_id in ((kernel.client, mine), (other, theirs)):
        assert next_reply(client)["parent_header"]["msg_id"] == msg_id
        with pytest.raises(Empty):
            client.get_shell_msg(timeout=0)
    other.stop_channels()


def next_reply(client: BlockingKernelClient) -> dict[str, Any]:
    """To an execute_request: a slow kernel was asked for its kernel_info more than once."""
    while True:
        message = client.get_shell_msg(timeout=60)
        if message["msg_type"] == "execute_reply":
            return dict(message)


def test_comms_carry_binary_buffers_both_ways(start: Start) -> None:
    client = start().wait().client
    code = """
from comm import create_comm
c = create_comm(target_name="t", data={}, buffers=[bytes(range(256)) * 1000])
c.on_msg(lambda m: c.send({}, buffers=[bytes(b)[::-1] for b in m["buffers"]]))
"""
    msg_id = client.execute(code)
    opened = next(m for m in outputs_of(client, msg_id) if m["msg_type"] == "comm_open")
    assert [bytes(b) for b in opened["buffers"]] == [bytes(range(256)) * 1000]

    content = {"comm_id": opened["content"]["comm_id"], "data": {}}
    message = client.session.msg("comm_msg", content)
    buffers = [b"\0\xff\x80", b"", os.urandom(3_000_000)]
    client.session.send(client.shell_channel.socket, message, buffers=buffers)

    answer = next_output(client, "comm_msg")
    assert [bytes(b) for b in answer["buffers"]] == [b[::-1] for b in buffers]


def test_output_above_ten_megabytes_arrives_whole(start: Start) -> None:
    client = start().wait().client

    status, text = execute(client, "print('x' * 30_000_000)")

    assert (status, len(text)) == ("ok", 30_000_001)


def test_much_output_arrives_in_order(start: Start) -> None:
    client = start().wait().client

    _, text = execute(client, "for i in range(3000): print(i, flush=True)")

    assert text == "".join(f"{i}\n" for i in range(3000))


def test_the_debugger_answers_on_control(start: Start) -> None:
    client = start().wait().client
    content = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}

    client.control_channel.send(client.session.msg("debug_request", content))

    reply = client.get_control_msg(timeout=60)
    assert (reply["msg_type"], reply["content"]["success"]) == ("debug_reply", True)


def test_a_subscriber_is_welcomed(start: Start) -> None:
    kernel = start().wait()
    socket = kernel.manager.connect_iopub()
    socket.subscribe(b"a unique topic")

    assert socket.poll(20_000)
    topic, *frames = socket.recv_multipart()
    _, parts = kernel.client.session.feed_identities(frames)
    message = kernel.client.session.deserialize(parts)

    assert topic == b"a unique topic"
    assert message["msg_type"] == "iopub_welcome"
    assert message["content"] == {"subscription": "a unique topic"}
    socket.close(0)


def test_what_is_signed_with_another_key_is_ignored(start: Start) -> None:
    kernel = start().wait()
    stranger = Session(key=b"another key", session=kernel.client.session.session)
    request = kernel.client.session.msg("execute_request", {"code": "intruded = 1"})

    stranger.send(kernel.client.shell_channel.socket, request)

    status, text = execute(kernel.client, "print('intruded' in globals())")
    assert (status, text) == ("ok", "False\n")
    assert "wrong signature" in kernel.printed()


def test_garbage_on_the_sockets_harms_nobody(start: Start) -> None:
    kernel = start().wait()
    session = kernel.client.session
    socket = kernel.client.shell_channel.socket
    socket.send_multipart([b"no message"])
    socket.send_multipart([b"<IDS|MSG>"])
    for header in (b"{}", b"[]", b"\xff", b'{"msg_id": 1}', b""):
        parts = [header, b"{}", b"{}", b"{}"]
        socket.send_multipart([b"<IDS|MSG>", session.sign(parts), *parts])

    assert execute(kernel.client, "print('fine')") == ("ok", "fine\n")


@pytest.mark.parametrize(
    "traits",
    [
        {"transport_encryption": "required"},
        {"transport": "ipc"},
        {"transport": "ipc", "transport_encryption": "required"},
    ],
    ids=["curve", "ipc", "ipc with curve"],
)
def test_other_transports(start: Start, traits: dict[str, str], tmp_path: Path) -> None:
    if traits.get("transport") == "ipc":
        traits["ip"] = str(tmp_path / "k")[-100:]
    kernel = start(**traits).wait()

    assert execute(kernel.client, "print('fine')") == ("ok", "fine\n")
    info = json.loads(Path(kernel.manager.connection_file).read_text())
    assert ("curve_secretkey" in info) == ("transport_encryption" in traits)
    assert kernel.client.hb_channel.is_beating()


# -- its life --------------------------------------------------------------------------------


def test_the_token_stands_in_no_command_line_and_no_log(start: Start, far: StockServer) -> None:
    kernel = start().wait()

    for pid in (kernel.pid, guardian_of(kernel.pid)):
        assert far.token not in Path(f"/proc/{pid}/cmdline").read_text()
        assert far.token not in Path(f"/proc/{pid}/environ").read_text()
    assert far.token not in kernel.printed()


def guardian_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def interrupt_by_message(kernel: Kernel) -> None:
    kernel.manager.interrupt_kernel()


def interrupt_by_signal(kernel: Kernel) -> None:
    os.kill(kernel.pid, signal.SIGINT)


@pytest.mark.parametrize("interrupt", [interrupt_by_message, interrupt_by_signal])
def test_interrupt(start: Start, interrupt: Callable[[Kernel], None]) -> None:
    kernel = start().wait()
    msg_id = kernel.client.execute("print('on', flush=True)\nwhile True: pass")
    next_output(kernel.client, "stream")

    interrupt(kernel)

    assert reply_to(kernel.client, msg_id)["content"]["ename"] == "KeyboardInterrupt"
    assert execute(kernel.client, "print('fine')") == ("ok", "fine\n")


def test_shutdown_removes_the_remote_kernel(start: Start, far: StockServer) -> None:
    kernel = start().wait()

    kernel.manager.shutdown_kernel()

    assert far.kernels() == []


def test_restart_is_a_new_remote_kernel(start: Start, far: StockServer) -> None:
    kernel = start().wait()
    execute(kernel.client, "x = 1")
    [before] = far.kernels()

    kernel.manager.restart_kernel()
    kernel.wait()

    assert execute(kernel.client, "print('x' in globals())") == ("ok", "False\n")
    [after] = far.kernels()
    assert after["id"] != before["id"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_remote_kernel_goes_when_the_proxy_is_killed(
    start: Start, far: StockServer, number: int
) -> None:
    kernel = start().wait()
    guardian = guardian_of(kernel.pid)

    os.kill(kernel.pid, number)

    wait_until(lambda: not far.kernels(), "the remote kernel is gone")
    wait_until(lambda: not Path(f"/proc/{guardian}").exists(), "the guardian is gone")


def test_the_remote_kernel_goes_although_proxy_and_guardian_are_killed_in_turn(
    start: Start, far: StockServer
) -> None:
    kernel = start().wait()

    os.kill(guardian_of(kernel.pid), signal.SIGKILL)
    kernel.manager.shutdown_kernel()

    assert far.kernels() == []


def test_nothing_is_left_when_the_proxy_is_killed_while_it_asks_for_a_kernel(
    install: Install, start: Start, far: StockServer, network: Network
) -> None:
    install(network.url)
    before = network.carried
    kernel = start(network.url)
    wait_until(lambda: network.carried > before, "the kernel is asked for")
    guardian = guardian_of(kernel.pid)

    os.kill(kernel.pid, signal.SIGKILL)

    wait_until(lambda: not Path(f"/proc/{guardian}").exists(), "the guardian is gone", 90)
    assert far.kernels() == []


def test_the_remote_kernel_goes_when_the_manager_is_killed(
    install: Install, far: StockServer
) -> None:
    install(far.url)
    script = """
import sys
from jupyter_client.manager import start_new_kernel
start_new_kernel(kernel_name="sorna-python3")
print("ready", flush=True)
sys.stdin.read()
"""
    manager = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert manager.stdout and manager.stdout.readline() == b"ready\n"
    assert len(far.kernels()) == 1

    manager.kill()
    manager.communicate()

    wait_until(lambda: not far.kernels(), "the remote kernel is gone")


def test_the_environment_that_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sorna_jupyter.remote.remote_kernel import environment_to_pass

    monkeypatch.setattr(os, "environ", {"KERNEL_A": "1", "KERNEL_ID": "2", "B": "3", "C": "4"})

    assert environment_to_pass(["B", "D"]) == {"KERNEL_A": "1", "B": "3"}


# -- what can go wrong -----------------------------------------------------------------------


def test_a_remote_kernel_that_is_deleted_ends_the_local_one(start: Start, far: StockServer) -> None:
    kernel = start().wait()
    kernel.client.execute("print('on', flush=True)\nwhile True: pass")
    next_output(kernel.client, "stream")
    [model] = far.kernels()

    assert far.ask("DELETE", f"/api/kernels/{model['id']}").status_code == 204

    last_words = next_output(kernel.client, "stream")["content"]
    wait_until(lambda: not kernel.manager.is_alive(), "the proxy has ended")
    assert last_words["name"] == "stderr"
    assert f"Kernel does not exist: {model['id']}" in last_words["text"]
    assert f"Kernel does not exist: {model['id']}" in kernel.printed()
    assert kernel.manager.provisioner.process.returncode == 1


def test_a_remote_kernel_that_died_and_was_restarted_says_so(start: Start) -> None:
    kernel = start().wait()

    msg_id = kernel.client.execute("import os; os._exit(3)")

    assert reply_to(kernel.client, msg_id)["content"]["ename"] == "KernelRestarted"
    kernel.wait()
    assert execute(kernel.client, "print('fine')") == ("ok", "fine\n")


def run_proxy(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    connection = {f"{name}_port": free_port() for name in ("shell", "iopub", "stdin", "hb")}
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection | {"control_port": free_port(), "ip": "127.0.0.1"}))
    return subprocess.run(
        [sys.executable, "-P", "-m", "sorna_jupyter.remote.proxy", "-f", str(file), *args],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(
    ("token", "name", "says"),
    [
        ("wrong", "python3", "does not accept this token; type: jupyter sorna login"),
        (StockServer.token, "cobol", "cobol"),
        (None, "python3", "There is no token for http://127.0.0.1"),
    ],
)
def test_a_kernel_that_can_not_be_made_is_one_clear_sentence(
    far: StockServer, tmp_path: Path, token: str | None, name: str, says: str
) -> None:
    if token:
        credentials.save(far.url, token)

    ended = run_proxy(tmp_path, "--url", far.url, "--kernel-name", name)

    assert ended.returncode == 1
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.usefixtures("near")
def test_a_server_that_does_not_answer_is_one_clear_sentence(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    credentials.save(url, "token")

    ended = run_proxy(tmp_path, "--url", url, "--kernel-name", "python3")

    assert ended.returncode == 1
    assert f"{url} does not answer: " in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


# -- network cuts ----------------------------------------------------------------------------


def nobody_is_connected(far: StockServer) -> bool:
    return [model["connections"] for model in far.kernels()] == [0]


def test_a_cell_goes_on_through_a_network_cut(
    start: Start, far: StockServer, network: Network, tmp_path: Path
) -> None:
    kernel = start(network.url).wait()
    flag = tmp_path / "go on"
    code = f"""
import os, time
print("before", flush=True)
while not os.path.exists({str(flag)!r}): time.sleep(0.05)
print("meanwhile", flush=True)
"""
    msg_id = kernel.client.execute(code)
    assert next_output(kernel.client, "stream")["content"]["text"] == "before\n"

    network.cut()
    wait_until(lambda: nobody_is_connected(far), "the server noticed")
    flag.touch()
    wait_until(lambda: far.kernels()[0]["execution_state"] == "idle", "the cell is done")
    network.restore()

    assert text_of(list(outputs_of(kernel.client, msg_id))) == "meanwhile\n"
    assert reply_to(kernel.client, msg_id)["content"]["status"] == "ok"


def test_what_is_typed_during_a_network_cut_runs_afterwards(
    start: Start, far: StockServer, network: Network
) -> None:
    kernel = start(network.url).wait()
    network.cut()
    wait_until(lambda: nobody_is_connected(far), "the server noticed")

    msg_ids = [kernel.client.execute(f"print({i})") for i in range(50)]
    network.restore()

    for i, msg_id in enumerate(msg_ids):
        assert text_of(list(outputs_of(kernel.client, msg_id))) == f"{i}\n"
        assert reply_to(kernel.client, msg_id)["content"]["status"] == "ok"


def test_a_request_that_a_cut_swallowed_is_answered_with_an_error(
    start: Start, network: Network
) -> None:
    kernel = start(network.url).wait()
    network.swallow()
    before = network.swallowed
    msg_id = kernel.client.execute("print('never')")
    wait_until(lambda: network.swallowed > before + 100, "the request is under way")

    network.cut()
    network.restore()

    assert reply_to(kernel.client, msg_id)["content"]["ename"] == "ConnectionLost"
    assert [m["msg_type"] for m in outputs_of(kernel.client, msg_id)] == ["error"]
    assert execute(kernel.client, "print('fine')") == ("ok", "fine\n")


def test_a_network_that_stays_away_ends_the_local_kernel(
    install: Install,
    start: Start,
    network: Network,
    far: StockServer,
    near: Path,  # noqa: F811
) -> None:
    install(network.url)
    spec_file = near / "kernels/sorna-python3/kernel.json"
    spec = json.loads(spec_file.read_text())
    spec_file.write_text(json.dumps(spec | {"argv": [*spec["argv"], "--reconnect-timeout", "0"]}))
    kernel = start().wait()

    network.cut()

    assert "could not be reached" in next_output(kernel.client, "stream")["content"]["text"]
    wait_until(lambda: not kernel.manager.is_alive(), "the proxy has ended")
    assert len(far.kernels()) == 1

    # The guardian, which goes on alone, now removes the kernel; the fixture waits for it.
    network.restore()


def test_the_network_is_away_while_it_is_shut_down(
    start: Start, far: StockServer, network: Network
) -> None:
    kernel = start(network.url).wait()
    network.cut()

    kernel.manager.shutdown_kernel()
    assert len(far.kernels()) == 1
    network.restore()

    wait_until(lambda: not far.kernels(), "the guardian removed the remote kernel")

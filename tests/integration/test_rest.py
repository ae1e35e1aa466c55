"""Code over REST on real kernels of a real gateway: the Python client and `jupyter sorna run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import nbformat
import pexpect
import pytest
import websocket

from sorna_jupyter import Client
from sorna_jupyter.exceptions import InvalidRequest, NotAllowed, NotFound, Unavailable
from sorna_jupyter.remote.client import Kernel, RunFailed
from tests.gateways import Gateway, command, wait_until


@pytest.fixture
def client(local_gateway: Gateway) -> Iterator[Client]:
    client = Client(local_gateway.url, local_gateway.token)
    yield client
    client.close()


@pytest.fixture
def kernel(client: Client) -> Iterator[Kernel]:
    with client.kernel("python3") as kernel:
        yield kernel


# -- the Python client -----------------------------------------------------------------------


def test_variables_live_from_run_to_run(kernel: Kernel) -> None:
    kernel.execute("x = 6 * 7")

    result = kernel.execute("print('x is', x); x")

    assert result.text == "x is 42\n42\n"
    assert result.stdout == "x is 42\n"
    assert result.execution_count == 2


def test_the_kernel_is_gone_after_with(client: Client) -> None:
    with client.kernel() as kernel:
        assert kernel.id in [k.id for k in client.kernels()]

    assert kernel.id not in [k.id for k in client.kernels()]


def test_another_program_attaches_to_the_same_kernel_and_leaves_it(
    client: Client, kernel: Kernel
) -> None:
    kernel.execute("x = 'shared'")

    with client.attach(kernel.id) as same:
        assert same.execute("print(x)").text == "shared\n"

    assert kernel.execute("print(x)").text == "shared\n"


def test_output_is_seen_as_it_comes(kernel: Kernel) -> None:
    code = "print('first', flush=True)\nname = input()\nprint('then', name)"
    seen: list[Any] = []

    def answer(prompt: str, password: bool) -> str:
        assert seen == [{"output_type": "stream", "name": "stdout", "text": "first\n"}]
        return "Ada"

    result = kernel.execute(code, on_output=seen.append, stdin=answer)

    assert result.text == "first\nthen Ada\n"


def test_input_is_answered_from_lines_and_then_ends(kernel: Kernel) -> None:
    code = "a = input('a? '); b = input('b? '); print(a + b); input()"

    result = kernel.execute(code, stdin=["1", "2"])

    assert result.stdout == "12\n"
    assert result.error is not None and result.error["ename"] == "EOFError"


def test_input_that_nobody_answers_is_an_error_at_once(kernel: Kernel) -> None:
    result = kernel.execute("input()")

    assert result.error is not None and result.error["ename"] == "StdinNotImplementedError"


def test_every_kind_of_output_is_a_notebooks(kernel: Kernel) -> None:
    result = kernel.execute("""
import sys
from IPython.display import HTML, JSON, Image, clear_output, display
print('gone'); clear_output(wait=True)
print('out'); print('err', file=sys.stderr)
handle = display(HTML('<b>old</b>'), display_id=True)
display(JSON({'a': 1}))
handle.update(HTML('<b>new</b>'))
1 / 0
""")

    assert result.status == "error"
    kinds = [output["output_type"] for output in result.outputs]
    assert kinds == ["stream", "stream", "display_data", "display_data", "error"]
    assert result.outputs[0]["text"] == "out\n"
    assert result.data("text/html") == ["<b>new</b>"]
    assert result.data("application/json") == [{"a": 1}]
    cell = nbformat.v4.new_code_cell("x", outputs=result.outputs)
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))


def test_a_failed_run_raises_when_checked(kernel: Kernel) -> None:
    with pytest.raises(RunFailed, match="ZeroDivisionError: division by zero"):
        kernel.execute("1 / 0").check()


def test_a_checked_run_that_took_too_long_says_so(kernel: Kernel) -> None:
    """Not the `KeyboardInterrupt` that ended it."""
    with pytest.raises(RunFailed, match="timeout: interrupted after 0.5 s"):
        kernel.execute("import time; time.sleep(60)", timeout=0.5).check()


def test_what_the_server_does_not_understand_is_an_invalid_request(kernel: Kernel) -> None:
    with pytest.raises(InvalidRequest, match="NUL"):
        kernel.execute("print('\0')")


def test_a_timeout_interrupts_and_says_so_and_the_kernel_lives(kernel: Kernel) -> None:
    result = kernel.execute("x = 1\nimport time; time.sleep(60)", timeout=0.5)

    assert result.status == "timeout"
    assert result.reason == "interrupted after 0.5 s"
    assert result.error is not None and result.error["ename"] == "KeyboardInterrupt"
    assert kernel.execute("print(x)").text == "1\n"


def test_code_that_fails_does_not_abort_what_waits_behind_it(kernel: Kernel) -> None:
    first = kernel.submit("import time; time.sleep(0.5); 1 / 0")
    second = kernel.submit("print('still run')")

    assert second.result(wait=20).text == "still run\n"
    assert first.result().status == "error"


def test_interrupt_and_restart(kernel: Kernel) -> None:
    run = kernel.submit("x = 1\nprint('begun')\nimport time; time.sleep(60)")
    assert next(e for e in run.events() if e["type"] == "output")
    kernel.interrupt()
    assert run.result(wait=20).problem.startswith("KeyboardInterrupt")

    run = kernel.submit("print('begun')\ntime.sleep(60)")
    assert next(e for e in run.events() if e["type"] == "output")
    kernel.restart()

    lost = run.result(wait=20)
    assert (lost.status, lost.reason) == ("lost", "the kernel was restarted")
    assert kernel.execute("'x' in globals()").text == "False\n"


def test_a_kernel_that_dies_says_why_and_its_runs_can_still_be_read(kernel: Kernel) -> None:
    run = kernel.submit("print('last words', flush=True)\nimport os; os.kill(os.getpid(), 9)")

    result = run.result(wait=30)

    assert result.status == "lost"
    assert result.reason is not None and "SIGKILL" in result.reason
    with pytest.raises(NotFound, match="SIGKILL"):
        kernel.execute("1")


def test_questions_an_editor_asks(kernel: Kernel) -> None:
    kernel.execute("a_long_name = 1")

    assert "a_long_name" in kernel.complete("print(a_lo", 10)["matches"]
    assert "Prints the values" in kernel.inspect("print")["data"]["text/plain"]
    assert kernel.is_complete("for i in range(3):")["status"] == "incomplete"


def test_a_kernel_that_is_busy_says_so_when_asked(kernel: Kernel) -> None:
    run = kernel.submit("print('begun')\nimport time; time.sleep(60)")
    assert next(e for e in run.events() if e["type"] == "output")

    with pytest.raises(Unavailable, match="busy"):
        kernel.complete("pri")

    kernel.interrupt()


def test_one_shot(client: Client) -> None:
    before = {kernel.id for kernel in client.kernels()}

    result = client.run("import os; print(os.environ['A'])", env={"A": "one"})

    assert result.text == "one\n"
    wait_until(lambda: {kernel.id for kernel in client.kernels()} <= before, "its kernel is gone")


def test_ten_thousand_lines_arrive_each_once_and_in_order(kernel: Kernel) -> None:
    seen: list[str] = []

    result = kernel.execute(
        "for i in range(10_000): print(i, flush=i % 100 == 0)",
        on_output=lambda output: seen.append(output["text"]),
    )

    expected = "".join(f"{i}\n" for i in range(10_000))
    assert result.stdout == expected
    assert "".join(seen) == expected


def test_a_wrong_token_says_what_to_type(local_gateway: Gateway) -> None:
    with pytest.raises(NotAllowed, match="jupyter sorna login"):
        Client(local_gateway.url, "wrong").kernels()


def test_what_a_client_can_not_have_is_told_to_it_and_not_to_the_log(
    local_gateway: Gateway, client: Client
) -> None:
    unknown = str(uuid.uuid4())
    before = len(local_gateway.output)

    with pytest.raises(NotFound):
        client.attach(unknown)
    with pytest.raises(NotAllowed):
        Client(local_gateway.url, "wrong").attach(unknown)
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(local_gateway.websocket_url(f"/api/kernels/{unknown}/channels"))

    client.kernels()  # what there is to log is logged by now
    assert unknown not in local_gateway.output
    assert "authenticate" not in local_gateway.output[before:]


def test_a_server_that_is_not_there_is_told(local_gateway: Gateway) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        Client("http://127.0.0.1:9", "token").kernels()


# -- jupyter sorna run -----------------------------------------------------------------------


def run(gateway: Gateway, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """As the user on whose machine the gateway runs: it is found without being named."""
    return gateway.home.run("jupyter", "sorna", "run", *args, **options)


def test_run_streams_both_outputs_and_shows_results(local_gateway: Gateway) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); 6 * 7"

    done = run(local_gateway, "-c", code)

    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n42\n", "err\n")


def test_run_takes_a_file_or_its_stdin(local_gateway: Gateway) -> None:
    (local_gateway.home.work / "code.py").write_text("print('from a file: ä')\n")

    assert run(local_gateway, "code.py").stdout == "from a file: ä\n"
    assert run(local_gateway, "-", input="print('piped')").stdout == "piped\n"
    assert run(local_gateway, input="print('piped')").stdout == "piped\n"


def test_run_on_a_kernel_that_runs_already_leaves_it(
    local_gateway: Gateway, kernel: Kernel
) -> None:
    done = run(local_gateway, "--kernel", kernel.id[:13], "-c", "x = 'set by the command line'")

    assert done.returncode == 0, done.stderr
    assert kernel.execute("print(x)").text == "set by the command line\n"


def test_run_tells_of_errors_on_stderr_and_by_its_exit_status(local_gateway: Gateway) -> None:
    failed = run(local_gateway, "-c", "1 / 0")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "ZeroDivisionError" in failed.stderr
    assert "\x1b[" not in failed.stderr

    timed_out = run(local_gateway, "--timeout", "0.5", "-c", "import time; time.sleep(60)")
    assert timed_out.returncode == 1
    unknown = run(local_gateway, "-k", "fortran", "-c", "1")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "No kernelspec is named 'fortran'; there are: " in unknown.stderr
    assert "Traceback" not in unknown.stderr
    missing = run(local_gateway, "no-such-file.py")
    assert missing.returncode == 2
    assert "no-such-file.py" in missing.stderr


def test_run_in_a_terminal_asks_for_input(local_gateway: Gateway) -> None:
    terminal = pexpect.spawn(
        command("jupyter"),
        ["sorna", "run", "-c", "print('hello', input('name? '))"],
        env=local_gateway.home.env,
        encoding="utf-8",
        timeout=60,
    )

    terminal.expect_exact("name? ")
    terminal.sendline("Ada")
    terminal.expect_exact("hello Ada")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_ctrl_c_interrupts_the_run_and_leaves_no_kernel(
    local_gateway: Gateway, client: Client
) -> None:
    before = {kernel.id for kernel in client.kernels()}
    code = "print('begun', flush=True)\nimport time\ntry: time.sleep(60)\nfinally: print('tidied')"
    process = subprocess.Popen(
        [command("jupyter"), "sorna", "run", "-c", code],
        env=local_gateway.home.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"

    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)

    assert rest == "tidied\n"
    assert "KeyboardInterrupt" in stderr
    assert process.returncode == 130
    assert {kernel.id for kernel in client.kernels()} <= before


def test_ctrl_c_while_it_waits_its_turn_interrupts_nobody(
    local_gateway: Gateway, kernel: Kernel
) -> None:
    others = kernel.submit("print('begun')\nname = input()", stdin=lambda prompt, password: "")
    assert next(e for e in others.events() if e["type"] == "input_request")
    process = subprocess.Popen(
        [command("jupyter"), "sorna", "run", "--kernel", kernel.id, "-c", "print('mine')"],
        env=local_gateway.home.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(kernel.runs()) == 2, "it is queued")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)

    assert process.returncode == 130
    others.input("still asked")
    assert others.result(wait=20).ok


# -- connections -----------------------------------------------------------------------------


def test_a_clients_stream_survives_a_cut_connection(
    new_gateway: Callable[..., Gateway],
) -> None:
    """The client's socket is cut under it; it comes back and has every line once."""
    gateway = new_gateway("--runtime=local")
    client = Client(gateway.url, gateway.token)
    with client.kernel() as kernel:
        run = kernel.submit(
            "import time\nfor i in range(20): print(i, flush=True); time.sleep(0.1)"
        )
        text = ""
        for event in run.events():
            if event["type"] == "output":
                text += event["output"]["text"]
                _cut_connections_of(os.getpid(), gateway)
            elif event["type"] == "append":
                text += event["text"]

    assert text == "".join(f"{i}\n" for i in range(20))
    assert json.loads(json.dumps(run.result().outputs))[0]["text"] == text


def _cut_connections_of(pid: int, gateway: Gateway) -> None:
    import socket

    port = int(gateway.url.rsplit(":", 1)[1])
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as sock:
                if sock.family == socket.AF_INET and sock.getpeername()[1] == port:
                    sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue

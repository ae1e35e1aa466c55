"""Starting, stopping, being killed, and coming back: what stays is what was meant to stay."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.gateways import Gateway, Home, wait_until

NewGateway = Callable[..., Gateway]


@pytest.fixture(params=["local", "docker"])
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "docker":
        # Its image is built once, and everything below finds it
        request.getfixturevalue("docker_gateway")
    return f"--runtime={request.param}"


def with_x(gateway: Gateway) -> str:
    """A kernel in which x is 42."""
    gateway.wait_for_image("python3")
    kernel_id = gateway.start_kernel(name="python3")
    result = gateway.execute(kernel_id, "x = 42")
    assert result["status"] == "ok", result
    return kernel_id


def nothing_is_left(home: Home, timeout: float = 1) -> None:
    try:
        wait_until(lambda: not home.leftovers(), "nothing is left", timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}: {home.leftovers()}") from None


@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
    ids=["Ctrl-C", "SIGTERM", "terminal closed"],
)
def test_a_stopped_gateway_leaves_nothing(
    new_gateway: NewGateway, runtime: str, signum: int
) -> None:
    gateway = new_gateway(runtime)
    with_x(gateway)
    with_x(gateway)

    assert gateway.stop(signum) == 0

    nothing_is_left(gateway.home)
    assert not (gateway.data_dir / "gateway.json").exists()


def test_a_gateway_stopped_while_a_cell_runs_leaves_nothing(
    new_gateway: NewGateway, runtime: str
) -> None:
    gateway = new_gateway(runtime)
    kernel_id = with_x(gateway)
    endless = gateway.post(
        f"/api/kernels/{kernel_id}/execute",
        {"code": "while True: pass"},
        headers={"Prefer": "respond-async"},
    )
    assert endless.status_code == 202, endless.text

    assert gateway.stop() == 0

    nothing_is_left(gateway.home)


def test_secrets_are_readable_by_their_owner_only(new_gateway: NewGateway) -> None:
    gateway = new_gateway("--runtime=local")

    open_to_others = [
        str(path)
        for path in [gateway.data_dir, *gateway.data_dir.rglob("*")]
        if path.lstat().st_mode & 0o077 and (path.is_dir() or path.suffix == ".json")
    ]

    assert open_to_others == []
    assert gateway.token not in "".join(gateway.home.processes().values())


def test_a_second_start_on_the_same_data_is_refused_clearly(new_gateway: NewGateway) -> None:
    first = new_gateway("--runtime=local")
    kernel_id = with_x(first)

    second = Gateway.start("--runtime=local", home=first.home, wait=False)
    assert second.wait(60) != 0

    assert first.url in second.output
    assert "Traceback" not in second.output
    assert first.text(kernel_id, "print(x)") == "42\n"
    assert first.stop() == 0
    nothing_is_left(first.home)


def test_a_taken_port_is_told_or_the_next_one_is_used(new_gateway: NewGateway) -> None:
    first = new_gateway("--runtime=local")
    port = first.url.rpartition(":")[2]

    second = new_gateway("--runtime=local", f"--port={port}")

    assert second.url != first.url
    assert second.stop() == 0
    assert first.get("/api/kernels").status_code == 200


def test_kept_kernels_are_adopted_by_the_next_start(new_gateway: NewGateway, runtime: str) -> None:
    first = new_gateway(runtime, "--keep-kernels")
    kernel_id = with_x(first)
    assert first.stop() == 0

    second = new_gateway(runtime, home=first.home)

    assert kernel_id in [kernel["id"] for kernel in second.get("/api/kernels").json()]
    assert second.text(kernel_id, "print(x)") == "42\n"
    assert second.stop() == 0
    nothing_is_left(second.home)


def test_kernels_of_a_killed_gateway_are_adopted(new_gateway: NewGateway, runtime: str) -> None:
    first = new_gateway(runtime)
    kernel_id = with_x(first)
    first.process.kill()
    first.wait()

    second = new_gateway(runtime, home=first.home)

    wait_until(lambda: _running(second, kernel_id), "the kernel is back", 30)
    assert second.text(kernel_id, "print(x)") == "42\n"
    assert second.stop() == 0
    nothing_is_left(second.home)


def test_a_killed_gateway_that_nobody_follows_leaves_nothing(
    new_gateway: NewGateway, runtime: str
) -> None:
    gateway = new_gateway(runtime, "--orphan-timeout=4")
    with_x(gateway)
    gateway.process.kill()
    gateway.wait()

    assert gateway.home.processes()  # the agent waits for a while
    nothing_is_left(gateway.home, timeout=60)


def test_a_killed_agent_costs_no_container(
    new_gateway: NewGateway, docker_gateway: Gateway
) -> None:
    gateway = new_gateway("--runtime=docker")
    kernel_id = with_x(gateway)
    [agent] = [p for p, argv in gateway.home.processes().items() if "sorna_agent.app" in argv]

    os.kill(agent, signal.SIGKILL)

    assert gateway.text(kernel_id, "print(x)") == "42\n"
    other = wait_until(lambda: _started(gateway), "the agent is back and starts kernels", 60)
    assert gateway.text(kernel_id, "print(x)") == "42\n"
    assert gateway.text(other, "print(43)") == "43\n"
    assert gateway.stop() == 0
    nothing_is_left(gateway.home)


def _running(gateway: Gateway, kernel_id: str) -> bool:
    response = gateway.get(f"/api/kernels/{kernel_id}")
    return response.status_code == 200 and response.json()["execution_state"] in ("idle", "busy")


def _started(gateway: Gateway) -> str | None:
    response = gateway.post("/api/kernels", {"name": "python3"})
    return response.json()["id"] if response.status_code == 201 else None

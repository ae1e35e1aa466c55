"""What clients get wrong is answered with a clear JSON error; the server goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from tests.acceptance.engines import SecondEngine
from tests.gateways import Gateway, wait_until

NO_SUCH_KERNEL = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def the_server_goes_on_without_orphans(docker_gateway: Gateway) -> Iterator[None]:
    yield
    kernels = docker_gateway.get("/api/kernels").json()
    wait_until(
        lambda: len(docker_gateway.home.containers()) == len(kernels),
        "there is a container for each kernel, and no other",
    )


def complaint(response: requests.Response) -> str:
    """The message of a JSON error, as every one of them must have it."""
    assert response.headers["Content-Type"].startswith("application/json"), response.text[:80]
    body = response.json()
    assert body["message"], body
    assert "reason" in body
    assert "Traceback" not in response.text
    message: str = body["message"]
    return message


KERNEL_BODIES: list[tuple[Any, int, str]] = [
    ({"name": "no-such-kernel"}, 404, "no-such-kernel"),
    ({"name": 7}, 400, "name"),
    ({"name": "python3", "env": ["A=1"]}, 400, "env"),
    ({"name": "python3", "env": {"A": 1}}, 400, "env"),
    ({"name": "python3", "limits": {"memory": "plenty"}}, 400, "plenty"),
    ({"name": "python3", "limits": {"memory": -5}}, 400, "memory"),
    ({"name": "python3", "limits": {"horses": 5}}, 400, "horses"),
    ({"name": "python3", "limits": {"pids": 1_000_000}}, 403, "pids"),
    ({"name": "python3", "idle_timeout": "soon"}, 400, "idle_timeout"),
    ({"name": "python3", "kernel_id": "../../etc/passwd"}, 400, "id"),
    ({"name": "python3", "path": "../../../etc"}, 400, "path"),
    ([1, 2, 3], 400, ""),
    ("python3", 400, ""),
]


@pytest.mark.parametrize(("body", "status", "hint"), KERNEL_BODIES, ids=str)
def test_a_kernel_that_cannot_be_is_refused(
    docker_gateway: Gateway, body: Any, status: int, hint: str
) -> None:
    response = docker_gateway.post("/api/kernels", body)

    assert response.status_code == status, response.text
    assert hint in complaint(response)


@pytest.mark.parametrize("path", ["/api/kernels", "/api/run", "/api/sessions"])
@pytest.mark.parametrize("data", [b"{", b"nonsense", b"\xff\xfe", b'{"name": "python3"'])
def test_bad_json_is_told(docker_gateway: Gateway, path: str, data: bytes) -> None:
    response = docker_gateway.request("POST", path, data=data)

    assert response.status_code == 400, response.text
    complaint(response)


@pytest.mark.parametrize("path", ["/api/kernels", "/api/run", "/api/kernels/{id}/execute"])
def test_a_body_of_100_mb_is_refused(
    docker_gateway: Gateway, docker_kernel: str, path: str
) -> None:
    body = b'{"name": "' + b"x" * 100_000_000 + b'"}'

    try:
        response = docker_gateway.request("POST", path.format(id=docker_kernel), data=body)
    except requests.ConnectionError:
        return  # refused while it was still being sent
    assert response.status_code == 413, response.text
    complaint(response)


@pytest.mark.parametrize("kernel_id", [NO_SUCH_KERNEL, "a-b-c-d-e", "nonsense", "..%2f..%2fetc"])
@pytest.mark.parametrize(
    ("method", "tail"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/interrupt"),
        ("POST", "/restart"),
        ("POST", "/execute"),
        ("POST", "/complete"),
        ("GET", "/runs/some-run"),
    ],
)
def test_a_kernel_that_is_not_there_is_a_404(
    docker_gateway: Gateway, kernel_id: str, method: str, tail: str
) -> None:
    response = docker_gateway.request(
        method, f"/api/kernels/{kernel_id}{tail}", json={"code": "1"} if tail else None
    )

    assert response.status_code == 404, response.text
    complaint(response)


@pytest.mark.parametrize(
    "body",
    [{}, {"code": 5}, {"code": "1", "timeout": "long"}, {"code": "1", "timeout": -1}, {"cod": ""}],
    ids=str,
)
def test_an_execution_that_cannot_be_is_refused(
    docker_gateway: Gateway, docker_kernel: str, body: dict[str, Any]
) -> None:
    response = docker_gateway.post(f"/api/kernels/{docker_kernel}/execute", body)

    assert response.status_code == 400, response.text
    complaint(response)


@pytest.mark.parametrize(
    "literal",
    [
        rb"print('a\u0000b')",
        rb"print('\ud800')",
        rb"x = '\udfff'",
        rb"\ud83d",
        rb"print(ascii('\\ud800'))",
    ],
    ids=["NUL", "high surrogate", "low surrogate", "surrogate alone", "escaped surrogate"],
)
def test_code_with_odd_characters_gets_an_answer(
    docker_gateway: Gateway, docker_kernel: str, literal: bytes
) -> None:
    response = docker_gateway.request(
        "POST",
        f"/api/kernels/{docker_kernel}/execute",
        data=b'{"code": "' + literal + b'", "timeout": 20}',
    )

    if response.status_code == 200:
        assert response.json()["status"] in ("ok", "error")
    else:
        assert response.status_code == 400
        complaint(response)
    assert docker_gateway.text(docker_kernel, "print(6 * 7)") == "42\n"


def test_the_same_kernel_id_twice_is_a_conflict(
    docker_gateway: Gateway, docker_kernel: str
) -> None:
    response = docker_gateway.post("/api/kernels", {"kernel_id": docker_kernel})

    assert response.status_code == 409, response.text
    assert docker_kernel in complaint(response)


def test_more_memory_than_the_machine_has_is_refused(docker_gateway: Gateway) -> None:
    response = docker_gateway.post("/api/kernels", {"limits": {"memory": 1 << 50}})

    assert response.status_code in (403, 503), response.text
    complaint(response)


def test_an_image_that_cannot_be_had_is_told(
    base_image: str, new_gateway: Callable[..., Gateway]
) -> None:
    gateway = new_gateway("--runtime=docker", "--base-image=sorna-no-such-base:nowhere")

    def failed() -> bool:
        images = gateway.get("/sorna/images").json()
        return any(image["state"] == "failed" for image in images)

    wait_until(failed, "the build fails", 120)
    response = gateway.post("/api/kernels", {"name": "python3"})

    assert response.status_code == 503, response.text
    assert "image" in complaint(response).lower()
    assert gateway.get("/api/kernels").json() == []
    assert gateway.home.containers() == []


@pytest.fixture
def second_engine(docker_gateway: Gateway) -> Iterator[SecondEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("needs root and dockerd for a second engine")
    engine = SecondEngine()
    engine.start()
    [python3] = [i for i in docker_gateway.get("/sorna/images").json() if i["name"] == "python3"]
    engine.take_image(python3["reference"])
    yield engine
    engine.start()
    engine.remove()


@pytest.mark.timeout(600)
def test_an_engine_that_stops_in_the_middle_is_told_and_comes_back(
    second_engine: SecondEngine, new_gateway: Callable[..., Gateway]
) -> None:
    gateway = new_gateway("--runtime=docker", env={"DOCKER_HOST": second_engine.host})
    gateway.wait_for_image("python3", 60)
    kernel_id = gateway.start_kernel(name="python3")
    assert gateway.text(kernel_id, "print(42)") == "42\n"

    second_engine.stop()
    refused = gateway.post("/api/kernels", {"name": "python3"})

    assert refused.status_code == 503, refused.text
    assert complaint(refused)
    assert gateway.get("/api/kernels").status_code == 200

    second_engine.start()
    wait_until(
        lambda: gateway.get(f"/api/kernels/{kernel_id}").status_code == 404,
        "the kernel that stopped with its engine is dead",
        60,
    )
    reason = complaint(gateway.get(f"/api/kernels/{kernel_id}"))
    assert len(reason) > len(f"Kernel does not exist: {kernel_id}"), reason

    def starts_again() -> str | None:
        response = gateway.post("/api/kernels", {"name": "python3"})
        return response.json()["id"] if response.status_code == 201 else None

    fresh = wait_until(starts_again, "kernels start again", 60)
    assert gateway.text(fresh, "print(43)") == "43\n"
    gateway.stop_kernel(fresh)
    wait_until(lambda: second_engine.containers() == [], "no container is left", 60)
    assert gateway.stop() == 0

"""Questions, what is refused and how, and what the server says of itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sorna_jupyter.faces import rest
from sorna_jupyter.http import log_request
from sorna_jupyter.openapi import document
from tests.rest.parts import NDJSON, UNKNOWN, RestApp, refusal
from tests.waiting import until

# -- questions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "body", "asked"),
    [
        ("complete", {"code": "äb"}, {"code": "äb", "cursor_pos": 2}),
        ("complete", {"code": "abc", "cursor_pos": 1}, {"code": "abc", "cursor_pos": 1}),
        (
            "inspect",
            {"code": "abc", "detail_level": 1},
            {"code": "abc", "cursor_pos": 3, "detail_level": 1},
        ),
        ("is_complete", {"code": "for"}, {"code": "for"}),
    ],
)
async def test_a_question_is_answered_with_the_replys_content(
    app: RestApp, question: str, body: Any, asked: Any
) -> None:
    assert await app.app.json("POST", f"{app.kernel}/{question}", body) == {"echo": asked}


async def test_a_busy_kernel_can_not_be_asked_and_it_is_said_when_to_come_again(
    app: RestApp,
) -> None:
    await app.start("wait")

    response = await app.app.fetch("POST", f"{app.kernel}/complete", {"code": "x"})

    assert response.code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert "did not answer" in json.loads(response.body)["message"]


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"code": "half \\ud800 pair"}', "surrogate"),
        (b'{"code": "\\udc00"}', "surrogate"),
        (b"[]", "Expected `object`"),
        (b"", "missing required field `code`"),
        ({"code": 1}, "$.code"),
        ({"code": "a\0b"}, "NUL"),
        ({"code": "x", "tiemout": 3}, "tiemout"),
        ({"code": "x", "timeout": -1}, "$.timeout"),
        ({"code": "x", "timeout": 0}, "$.timeout"),
        ({"code": "x", "timeout": 1e300}, "$.timeout"),
        ({"code": "x", "timeout": "5"}, "$.timeout"),
        ({"code": "x", "stdin": 5}, "$.stdin"),
        ({"code": "x", "stdin": [1]}, "$.stdin"),
        ({"code": "x", "silent": "yes"}, "$.silent"),
        (b"[" * 100_000, "Expected `object`"),
    ],
)
async def test_a_body_that_is_wrong_is_400_and_says_where(
    app: RestApp, body: Any, says: str
) -> None:
    message = await refusal(app, 400, "POST", f"{app.kernel}/execute", body)

    assert says in message
    assert app.words.requests == []


@pytest.mark.parametrize("path", ["execute", "complete", "inspect", "is_complete"])
async def test_a_kernel_that_is_not_there_is_404(app: RestApp, path: str) -> None:
    message = await refusal(app, 404, "POST", f"/api/kernels/{UNKNOWN}/{path}", {"code": "x"})

    assert UNKNOWN in message


async def test_runs_that_are_not_there_are_404(app: RestApp) -> None:
    await refusal(app, 404, "GET", f"{app.kernel}/runs/{UNKNOWN}")
    await refusal(app, 404, "GET", f"/api/kernels/{UNKNOWN}/runs")
    await refusal(app, 404, "GET", f"/api/run/{UNKNOWN}")
    await refusal(app, 404, "POST", f"{app.kernel}/runs/{UNKNOWN}/input", {"value": "x"})


async def test_an_unknown_kernelspec_is_404_and_names_those_there_are(app: RestApp) -> None:
    message = await refusal(app, 404, "POST", "/api/run", {"code": "x", "name": "fortran"})

    assert "python3" in message


@pytest.mark.parametrize(
    "body",
    [
        {"env": {"A=B": "1"}},
        {"env": {"A": "nul\0"}},
        {"env": {"A": 1}},
        {"limits": {"memory": -1}},
        {"limits": {"memory": "much"}},
        {"limits": {"ram": 1}},
        {"name": 1},
    ],
)
async def test_a_kernel_that_can_not_be_made_for_one_run_is_400(app: RestApp, body: Any) -> None:
    await refusal(app, 400, "POST", "/api/run", {"code": "x", **body})

    assert len(app.app.agents.created) == 1


async def test_other_methods_are_405_in_json(app: RestApp) -> None:
    await refusal(app, 405, "GET", f"{app.kernel}/execute")
    await refusal(app, 405, "DELETE", f"{app.kernel}/runs")
    await refusal(app, 405, "PUT", "/api/run", {})


async def test_what_is_not_ours_to_give_is_406_and_nothing_is_run(app: RestApp) -> None:
    response = await app.execute("say x", {"Accept": "text/html"})

    assert response.code == 406
    assert app.words.requests == []


@pytest.mark.parametrize("number", ["-1", "x", "1e3", "9" * 40, "²"])
async def test_a_from_that_is_no_number_is_400(app: RestApp, number: str) -> None:
    run = json.loads((await app.execute("say x")).body)
    path = f"{app.kernel}/runs/{run['id']}?from={number.encode().decode('latin1')}"

    await refusal(app, 400, "GET", path, headers=NDJSON)


async def test_a_body_of_100_mb_is_413_and_never_held(app: RestApp) -> None:
    """Also without a Content-Length, and as curl does it, which asks before it sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.app.port)
    head = (
        f"POST {app.kernel}/execute HTTP/1.1\r\nHost: localhost\r\n"
        "Authorization: token the-servers-own-token\r\n"
    )
    chunk = b"x" * 1_000_000

    writer.write(f"{head}Content-Length: 100000000\r\n\r\n".encode())
    for _ in range(100):
        writer.write(chunk)
        await writer.drain()
    assert b" 413 " in await reader.readline()
    await reader.readuntil(b"}")

    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(20):
        writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    assert b" 413 " in await reader.readline()
    await reader.readuntil(b"}")

    writer.write(f"{head}Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n".encode())
    assert b" 413 " in await reader.readline()
    writer.close()
    assert app.words.requests == []
    assert (await app.execute("say alive")).code == 200


async def test_code_up_to_the_limit_is_taken(app: RestApp) -> None:
    response = await app.execute("say x\n" + "#" * 9_000_000)

    assert json.loads(response.body)["status"] == "ok"


async def test_a_refusal_is_no_warning_in_the_log_and_a_failure_is(
    app: RestApp, caplog: pytest.LogCaptureFixture
) -> None:
    app.app.server.web_app.settings["log_function"] = log_request
    caplog.set_level("INFO")
    secret = "?token=a-guess"

    for method, path, options in (
        ("GET", f"{app.kernel}/runs/{UNKNOWN}", {}),
        ("GET", f"/api/kernels{secret}", {"token": None}),
        ("PUT", f"{app.kernel}/execute", {}),
        ("POST", f"{app.kernel}/execute", {"body": b"{"}),
        ("GET", f"{app.kernel}/messages", {"headers": {"Accept": "application/json"}}),
        ("GET", f"/api/kernels/{UNKNOWN}/channels", {}),
        ("GET", f"{app.kernel}/channels", {"token": None}),
        ("GET", "/no/such/page", {}),
    ):
        response = await app.app.fetch(method, path, **options)
        assert 400 <= response.code < 500
        line = f"{response.code} {method} {path.removesuffix(secret)} (127.0.0.1)"
        await until(lambda line=line: line in caplog.text)
    assert [r for r in caplog.records if r.levelname not in ("INFO", "DEBUG")] == []
    assert "a-guess" not in caplog.text

    await app.start("wait")
    assert (await app.app.fetch("POST", f"{app.kernel}/complete", {"code": "x"})).code == 503

    loud = [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert any("did not answer" in r.getMessage() for r in loud)
    assert any(r.getMessage().startswith(f"503 POST {app.kernel}/complete (") for r in loud)


# -- the server ------------------------------------------------------------------------------


async def test_healthz_needs_no_token_and_everything_else_does(app: RestApp) -> None:
    healthy = await app.app.fetch("GET", "/healthz", token=None)
    assert (healthy.code, json.loads(healthy.body)["status"]) == (200, "ok")

    assert (await app.app.fetch("HEAD", "/healthz", token=None)).code == 200

    for pattern, _ in rest.handlers():
        if pattern == "/healthz":
            continue
        path = pattern.replace("\\", "").replace("(?P<question>complete|inspect|is_complete)", "x")
        path = path.replace(rest.KERNEL_ID.replace("\\", ""), app.kernel_id)
        path = path.replace(rest.RUN_ID.replace("\\", ""), UNKNOWN).replace("/x", "/complete")
        for method in ("GET", "POST"):
            response = await app.app.fetch(method, path, token=None)
            assert response.code == 403, (method, path)
            response = await app.app.fetch(method, path, token="wrong")
            assert response.code == 403, (method, path)


async def test_the_openapi_document_is_valid_and_names_every_route(app: RestApp) -> None:
    validator = pytest.importorskip("openapi_spec_validator")

    served = await app.app.json("GET", "/sorna/openapi.json")

    validator.validate(served)
    assert served["openapi"].startswith("3.1")
    ours = {p for p, _ in rest.handlers() if not p.startswith("/sorna")}
    known = set(served["paths"])
    for pattern in ours:
        path = pattern.replace(rest.KERNEL_ID, "{kernel_id}").replace(rest.RUN_ID, "{run_id}")
        for question in ("complete", "inspect", "is_complete"):
            assert path.replace("(?P<question>complete|inspect|is_complete)", question) in known


def test_every_operation_has_a_name_of_its_own_that_generated_clients_may_keep() -> None:
    names = [
        operation.get("operationId")
        for path in document("/")["paths"].values()
        for method, operation in path.items()
        if method != "parameters"
    ]

    assert sorted(names) == [
        "answer_one_shot",
        "answer_run",
        "check_health",
        "complete",
        "execute",
        "get_kernel",
        "get_one_shot",
        "get_run",
        "inspect",
        "interrupt_kernel",
        "is_complete",
        "list_kernels",
        "list_runs",
        "read_messages",
        "restart_kernel",
        "run_one_shot",
        "start_kernel",
        "stop_kernel",
    ]


async def test_answers_leave_at_once(app: RestApp) -> None:
    """Without TCP_NODELAY every small answer would wait 40 ms for the client's delayed ACK."""
    await app.execute("say warm")
    loop = asyncio.get_running_loop()
    took = []
    for _ in range(10):
        begun = loop.time()
        await app.execute("say a\nsay b\nsay c", NDJSON)
        took.append(loop.time() - begun)

    assert min(took) < 0.03

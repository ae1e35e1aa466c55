"""Our REST in a whole jupyter_server; the kernel is played by a few words that it understands."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from sorna_jupyter.faces import rest
from sorna_jupyter.http import log_request
from sorna_jupyter.openapi import document
from sorna_jupyter.protocol import KernelStatus
from sorna_jupyter.runs import Runs
from tests.jupyter_app import App, Attached, record, running_app
from tests.waiting import until

UNKNOWN = "00000000-0000-4000-8000-000000000000"
NDJSON = {"Accept": "application/x-ndjson"}
SSE = {"Accept": "text/event-stream"}
ASYNC = {"Prefer": "respond-async"}


class Words:
    """A kernel that understands words: `say X`, `plot`, `fail`, `ask`, `wait`; one a line."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.go_on = asyncio.Event()
        self.requests: list[Any] = []

    async def serve(self) -> None:
        while True:
            _, (header, _, _, content) = await self._next()
            request = {"header": header, "content": content}
            self.requests.append(request)
            if header["msg_type"] == "execute_request":
                await self._execute(header, content["code"])
            else:
                kind = header["msg_type"].replace("request", "reply")
                self.attached.emit("shell", kind, {"echo": content}, parent=header)

    async def _execute(self, parent: Any, code: str) -> None:
        def tell(msg_type: str, content: Any, channel: str = "iopub") -> None:
            self.attached.emit(channel, msg_type, content, parent=parent)

        tell("status", {"execution_state": "busy"})
        tell("execute_input", {"execution_count": 1, "code": code})
        reply: Any = {"status": "ok", "execution_count": 1}
        for line in code.splitlines():
            word, _, rest_of_line = line.partition(" ")
            if word == "say":
                tell("stream", {"name": "stdout", "text": rest_of_line + "\n"})
            elif word == "plot":
                png = base64.b64encode(b"png").decode()
                tell("display_data", {"data": {"image/png": png}, "metadata": {}})
            elif word == "ask":
                tell("input_request", {"prompt": rest_of_line, "password": False}, "stdin")
                _, (_, _, _, answer) = await self._next()
                tell("stream", {"name": "stdout", "text": answer["value"]})
            elif word == "wait":
                await self.go_on.wait()
            elif word == "fail":
                error = {"ename": "Fail", "evalue": "as told", "traceback": ["Fail"]}
                tell("error", error)
                reply = {"status": "error", **error}
        tell("execute_reply", reply, "shell")
        tell("status", {"execution_state": "idle"})

    async def _next(self) -> tuple[str, list[Any]]:
        channel, parts = await self.attached.sent.get()
        return channel, [json.loads(part) for part in parts]


class RestApp:
    """The server with our face in it, and one kernel."""

    def __init__(self, app: App, kernel_id: str, words: Words) -> None:
        self.app = app
        self.kernel_id = kernel_id
        self.kernel = f"/api/kernels/{kernel_id}"
        self.words = words

    async def execute(self, code: str, headers: Any = None, **body: Any) -> Any:
        path = f"{self.kernel}/execute"
        return await self.app.fetch("POST", path, {"code": code, **body}, headers=headers)

    async def start(self, code: str, **body: Any) -> tuple[str, Any]:
        """Location and state of a run that goes on."""
        response = await self.execute(code, ASYNC, **body)
        assert response.code == 202, response.body
        assert response.headers["Preference-Applied"] == "respond-async"
        return response.headers["Location"], json.loads(response.body)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[RestApp]:
    async with running_app(tmp_path) as app:
        runs = Runs(app.kernels, answer_timeout=0.2)
        app.server.web_app.settings["sorna_runs"] = runs
        app.server.web_app.add_handlers(".*$", rest.handlers())
        kernel_id = await app.start_kernel()
        runs._session(app.kernels.get(kernel_id))
        words = Words(app.agents.attached[-1])
        serving = asyncio.create_task(words.serve())
        yield RestApp(app, kernel_id, words)
        await runs.close()
        serving.cancel()


async def refusal(app: RestApp, status: int, method: str, path: str, body: Any = None, **o: Any):
    response = await app.app.fetch(method, path, body, **o)
    assert response.code == status, response.body
    answer = json.loads(response.body)
    assert answer.keys() == {"message", "reason"}
    assert b"Traceback" not in response.body
    return answer["message"]


def events(body: bytes) -> list[Any]:
    return [json.loads(line) for line in body.splitlines() if line]


# -- one answer when it is finished ----------------------------------------------------------


async def test_json_is_the_whole_run_when_it_is_over(app: RestApp) -> None:
    response = await app.execute("say hello\nsay again\nplot")

    run = json.loads(response.body)
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Content-Location"] == f"{app.kernel}/runs/{run['id']}"
    timings = run.pop("timings")
    assert timings.keys() == {"created", "started", "finished", "seconds"}
    assert run == {
        "id": app.words.requests[0]["header"]["msg_id"],
        "kernel_id": app.kernel_id,
        "status": "ok",
        "execution_count": 1,
        "error": None,
        "reason": None,
        "input_request": None,
        "outputs": [
            {"output_type": "stream", "name": "stdout", "text": "hello\nagain\n"},
            {"output_type": "display_data", "data": {"image/png": "cG5n"}, "metadata": {}},
        ],
        "truncated": False,
        "next_event": 7,
    }


async def test_code_that_fails_is_an_answer_and_no_http_error(app: RestApp) -> None:
    response = await app.execute("fail")

    run = json.loads(response.body)
    assert (response.code, run["status"]) == (200, "error")
    assert run["error"] == {"ename": "Fail", "evalue": "as told", "traceback": ["Fail"]}
    assert run["outputs"][0]["output_type"] == "error"


async def test_stdin_given_up_front_is_answered(app: RestApp) -> None:
    response = await app.execute("ask name? \nask age? ", stdin="Ada\n36\n")

    assert json.loads(response.body)["outputs"][0]["text"] == "Ada36"


async def test_json_answers_when_the_run_waits_for_input_and_goes_on_after_it(
    app: RestApp,
) -> None:
    response = await app.execute("ask name? ", allow_stdin=True)
    run = json.loads(response.body)
    assert run["status"] == "waiting-input"
    assert run["input_request"] == {"prompt": "name? ", "password": False}
    location = response.headers["Content-Location"]

    answered = await app.app.fetch("POST", f"{location}/input", {"value": "Ada"})
    assert (answered.code, answered.body) == (204, b"")

    run = await app.app.json("GET", location, headers={"Prefer": "wait=10"})
    assert run["status"] == "ok"
    assert run["outputs"][0]["text"] == "Ada"
    await refusal(app, 409, "POST", f"{location}/input", {"value": "again"})


# -- as it goes ------------------------------------------------------------------------------


async def test_ndjson_is_one_event_a_line_and_the_last_is_the_run(app: RestApp) -> None:
    response = await app.execute("say a\nsay b\nplot", NDJSON)

    assert response.headers["Content-Type"] == "application/x-ndjson"
    told = events(response.body)
    assert [event["seq"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told] == [
        *["status"] * 3,
        *["output", "append", "output", "result"],
    ]
    assert told[0]["run_id"] == told[-1]["run"]["id"]
    assert told[-1]["run"]["status"] == "ok"


async def test_server_sent_events_have_id_name_and_data(app: RestApp) -> None:
    response = await app.execute("say a", SSE)

    blocks = response.body.decode().strip().split("\n\n")
    for number, block in enumerate(blocks):
        id_line, event_line, data_line = block.split("\n")
        data = json.loads(data_line.removeprefix("data: "))
        assert id_line == f"id: {number}"
        assert event_line == f"event: {data['type']}"
        assert data["seq"] == number
    assert data["run"]["outputs"][0]["text"] == "a\n"


async def test_output_arrives_before_the_run_is_over(app: RestApp) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()
    request = HTTPRequest(
        f"{app.app.url}{app.kernel}/execute",
        "POST",
        headers={"Authorization": "token the-servers-own-token", **NDJSON},
        body=json.dumps({"code": "say early\nwait\nsay late"}),
        streaming_callback=got.put_nowait,
    )
    fetching = asyncio.ensure_future(AsyncHTTPClient().fetch(request))

    seen = b""
    async with asyncio.timeout(10):
        while b"early" not in seen:
            seen += await got.get()
        app.words.go_on.set()
        await fetching
    while not got.empty():
        seen += got.get_nowait()

    assert events(seen)[-1]["run"]["outputs"][0]["text"] == "early\nlate\n"


async def test_the_run_goes_on_when_its_reader_leaves_and_can_be_read_again(app: RestApp) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", app.app.port)
    body = json.dumps({"code": "say early\nwait\nsay late"}).encode()
    writer.write(
        f"POST {app.kernel}/execute HTTP/1.1\r\nHost: localhost\r\n"
        "Authorization: token the-servers-own-token\r\nAccept: application/x-ndjson\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    async with asyncio.timeout(10):
        await reader.readuntil(b"early")
    writer.close()

    (summary,) = await app.app.json("GET", f"{app.kernel}/runs")
    assert summary["status"] == "running"
    assert "outputs" not in summary
    app.words.go_on.set()
    path = f"{app.kernel}/runs/{summary['id']}"
    run = await app.app.json("GET", path, headers={"Prefer": "wait=10"})
    assert run["outputs"][0]["text"] == "early\nlate\n"


async def test_a_stream_is_taken_up_where_it_was_left(app: RestApp) -> None:
    everything = events((await app.execute("say a\nsay b\nsay c", NDJSON)).body)
    path = f"{app.kernel}/runs/{everything[0]['run_id']}"

    by_query = await app.app.fetch("GET", f"{path}?from=4", headers=NDJSON)
    by_header = await app.app.fetch("GET", path, headers={"Last-Event-ID": "3", **SSE})

    assert events(by_query.body) == everything[4:]
    assert by_header.body.startswith(b"id: 4\n")


# -- later -----------------------------------------------------------------------------------


async def test_respond_async_answers_at_once_and_the_run_is_read_from_its_location(
    app: RestApp,
) -> None:
    location, run = await app.start("say early\nwait")
    assert run["status"] in ("queued", "running")

    assert (await app.app.json("GET", location))["status"] in ("queued", "running")
    app.words.go_on.set()
    run = await app.app.json("GET", location, headers={"Prefer": "wait=10"})

    assert run["status"] == "ok"
    assert location == f"{app.kernel}/runs/{run['id']}"


async def test_respond_async_with_wait_gives_quick_code_its_answer(app: RestApp) -> None:
    response = await app.execute("say quick", {"Prefer": "respond-async, wait=10"})

    assert response.code == 200
    assert json.loads(response.body)["status"] == "ok"


async def test_a_run_can_be_read_after_its_kernel_died(app: RestApp) -> None:
    location, _ = await app.start("say last words\nwait")
    await app.app.json("GET", f"{app.kernel}/runs")
    kernel = app.app.kernels.get(app.kernel_id)
    await app.app.kernels._end(kernel, KernelStatus.DEAD, "killed: out of memory")

    run = await app.app.json("GET", location)

    assert run["status"] == "lost"
    assert run["reason"] == "the kernel ended: killed: out of memory"


# -- one shot --------------------------------------------------------------------------------


async def test_one_shot_has_a_kernel_of_its_own_which_is_gone_after_it(app: RestApp) -> None:
    asking = asyncio.ensure_future(
        app.app.fetch("POST", "/api/run", {"code": "say hi", "env": {"A": "1"}})
    )
    async with asyncio.timeout(10):
        await until(lambda: len(app.app.agents.attached) == 2)
        serving = asyncio.create_task(Words(app.app.agents.attached[-1]).serve())
        response = await asking
        run = json.loads(response.body)
        while len(await app.app.json("GET", "/api/kernels")) > 1:
            await asyncio.sleep(0.001)
    serving.cancel()

    assert run["outputs"][0]["text"] == "hi\n"
    assert run["kernel_id"] != app.kernel_id
    assert app.app.agents.created[-1].env == {"A": "1"}
    assert response.headers["Content-Location"] == f"/api/run/{run['id']}"
    assert (await app.app.json("GET", f"/api/run/{run['id']}"))["status"] == "ok"


async def test_another_users_run_does_not_exist_when_its_kernel_is_long_forgotten(
    app: RestApp,
) -> None:
    run = json.loads((await app.execute("say secret")).body)
    await app.app.kernels.stop(app.kernel_id)
    app.app.kernels._ended.clear()
    token = await app.app.user("bob")

    for path in (f"{app.kernel}/runs", f"{app.kernel}/runs/{run['id']}", f"/api/run/{run['id']}"):
        assert (await app.app.fetch("GET", path, token=token)).code == 404
        assert (await app.app.fetch("GET", path)).code == 200
    answer = f"{app.kernel}/runs/{run['id']}/input"
    assert (await app.app.fetch("POST", answer, {"value": "x"}, token=token)).code == 404


async def test_another_users_run_does_not_exist(app: RestApp) -> None:
    location, run = await app.start("wait")
    stranger = await app.app.user("eve")

    for path in (location, f"/api/run/{run['id']}", f"{app.kernel}/runs"):
        await refusal(app, 404, "GET", path, token=stranger)
    for path in (f"{location}/input", f"/api/run/{run['id']}/input"):
        await refusal(app, 404, "POST", path, {"value": "x"}, token=stranger)
    await refusal(app, 404, "POST", f"{app.kernel}/execute", {"code": "say x"}, token=stranger)
    await refusal(app, 404, "POST", f"{app.kernel}/complete", {"code": "x"}, token=stranger)


# -- messages --------------------------------------------------------------------------------


class Follower:
    """A plain socket that reads `GET …/messages`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def get(cls, app: RestApp, accept: str, query: str = "follow=1") -> Follower:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.app.port)
        writer.write(
            f"GET {app.kernel}/messages?{query} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n"
            "Authorization: token the-servers-own-token\r\n\r\n".encode()
        )
        return cls(reader, writer)

    async def head(self) -> str:
        async with asyncio.timeout(10):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def chunk(self) -> bytes:
        """Of the chunked body; nothing at its end."""
        async with asyncio.timeout(10):
            size = int(await self.reader.readline(), 16)
            return (await self.reader.readexactly(size + 2))[:-2]


@pytest.mark.parametrize(
    ("accept", "quiet"), [("application/x-ndjson", b"\n"), ("text/event-stream", b": quiet\n\n")]
)
async def test_a_follower_of_a_silent_kernel_is_answered_at_once_and_kept(
    app: RestApp, monkeypatch: pytest.MonkeyPatch, accept: str, quiet: bytes
) -> None:
    follower = await Follower.get(app, accept)

    head = await follower.head()
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {accept}\r\n" in head
    assert await follower.chunk() == quiet
    cursor = await app.app.agents.relay.cursor()
    cursor.take(1, 2, [record("news")])
    assert b'"text": "news"' in await follower.chunk()
    follower.writer.close()

    monkeypatch.setattr(rest.MessagesHandler, "quiet_for", 0.01)
    follower = await Follower.get(app, accept)
    await follower.head()
    assert [await follower.chunk() for _ in range(3)] == [quiet] * 3
    follower.writer.close()


async def test_a_follower_that_leaves_has_no_cursor_any_more(app: RestApp) -> None:
    follower = await Follower.get(app, "application/x-ndjson")
    await follower.head()
    relay = app.app.agents.relay
    await relay.cursor()
    kernel = app.app.kernels.get(app.kernel_id)
    assert len(kernel.readings) == 1

    follower.writer.close()

    await until(lambda: not relay.cursors)
    assert kernel.readings == []


async def test_a_followers_answer_ends_with_its_kernel(app: RestApp) -> None:
    follower = await Follower.get(app, "application/x-ndjson")
    await follower.head()
    assert await follower.chunk() == b"\n"

    await app.app.kernels.stop(app.kernel_id)

    assert await follower.chunk() == b""
    assert app.app.agents.relay.cursors == []
    follower.writer.close()


async def test_what_the_journal_keeps_no_more_is_a_gap_before_the_rest(app: RestApp) -> None:
    asking = asyncio.ensure_future(app.app.fetch("GET", f"{app.kernel}/messages?since=3"))
    cursor = await app.app.agents.relay.cursor()
    assert cursor.next == 3

    cursor.lose(3, 16, 9120)
    cursor.take(17, 19, [record("seventeen"), record("eighteen")])
    response = await asking

    gap, *rest_of_it = events(response.body)
    reason = "it was more than the agent keeps"
    lost = {"from": 3, "to": 16, "messages": 14, "bytes": 9120, "reason": reason}
    assert gap == {"gap": lost}
    assert [(m["seq"], m["content"]["text"]) for m in rest_of_it] == [
        (17, "seventeen"),
        (18, "eighteen"),
    ]


async def test_a_gap_that_is_all_there_is_is_told_too(app: RestApp) -> None:
    asking = asyncio.ensure_future(
        app.app.fetch("GET", f"{app.kernel}/messages?since=1", headers=SSE)
    )
    cursor = await app.app.agents.relay.cursor()

    cursor.lose(1, 16, 9120)
    cursor.take(17, 17, [])
    response = await asking

    assert response.body.startswith(b'id: 16\nevent: gap\ndata: {"gap":{"from":1,"to":16,')
    assert response.body.count(b"\n\n") == 1


async def test_messages_of_a_kernel_that_is_not_there_are_404(app: RestApp) -> None:
    for query in ("", "?follow=1"):
        await refusal(app, 404, "GET", f"/api/kernels/{UNKNOWN}/messages{query}")
    await refusal(app, 400, "GET", f"{app.kernel}/messages?since=x")


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

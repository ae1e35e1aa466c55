"""Code that is run: answered whole, as it goes, or later; and kernels made for one run."""

from __future__ import annotations

import asyncio
import json

from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from sorna_jupyter.protocol import KernelStatus
from tests.rest.parts import NDJSON, SSE, RestApp, Words, events, refusal
from tests.waiting import until

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

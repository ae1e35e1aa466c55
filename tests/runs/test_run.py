"""One run's life, from plain events."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from sorna_jupyter.run import InputRequest, RunStatus
from tests.runs.parts import PRINT, new_run, read


async def test_a_run_tells_its_life_in_numbered_events() -> None:
    run = new_run()

    run.start()
    run.start(execution_count=5)
    run.take_output("stream", PRINT)
    run.take_output("stream", PRINT)
    run.take_reply(b'{"status": "ok", "execution_count": 5}')
    run.end(*run.verdict())

    events = await read(run)
    assert [event["seq"] for event in events] == list(range(6))
    assert [event["type"] for event in events] == [
        *["status"] * 3,
        *["output", "append", "result"],
    ]
    assert [event["status"] for event in events[:3]] == ["queued", "running", "running"]
    result = events[-1]["run"]
    assert result["status"] == "ok"
    assert result["execution_count"] == 5
    assert result["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "xx"}]
    assert result["next_event"] == 6
    assert result["timings"]["seconds"] >= 0


async def test_a_reader_may_begin_at_any_event() -> None:
    run = new_run()
    run.take_output("stream", PRINT)
    run.end(RunStatus.OK)

    everything = await read(run)

    for start in range(len(everything) + 2):
        assert await read(run, start) == everything[start:]


async def test_a_reader_follows_while_it_goes_on() -> None:
    run = new_run()
    seen: list[str] = []
    told = asyncio.Event()

    async def follow() -> None:
        async for batch in run.follow():
            seen.extend(event.type for event in batch)
            told.set()

    reader = asyncio.create_task(follow())
    await told.wait()
    assert seen == ["status"]
    told.clear()
    run.take_output("stream", PRINT)
    await told.wait()
    assert seen == ["status", "output"]
    run.end(RunStatus.OK)
    await reader
    assert seen == ["status", "output", "result"]


async def test_a_reader_is_told_that_nothing_happens() -> None:
    batches = new_run().follow(start=1, quiet_for=0.01)

    assert [await anext(batches) for _ in range(3)] == [[], [], []]


async def test_a_reader_that_is_too_late_gets_the_whole_list_instead() -> None:
    run = new_run(max_bytes=2000)
    for number in range(100):
        run.take_output("clear_output", b'{"wait": true}')
        run.take_output("stream", json.dumps({"text": f"step {number}"}).encode())
    run.end(RunStatus.OK)

    first, *others = await read(run)

    assert first["type"] == "reset"
    assert first["outputs"][0]["text"] == "step 99"
    assert [event["type"] for event in others] == ["result"]
    assert others[0]["seq"] == first["seq"] + 1


async def test_a_late_reader_of_a_run_that_goes_on_misses_nothing_after_the_reset() -> None:
    run = new_run(max_bytes=2000)
    for number in range(100):
        run.take_output("clear_output", b'{"wait": true}')
        run.take_output("stream", json.dumps({"text": f"step {number}"}).encode())
    batches = run.follow()

    (reset,) = await anext(batches)
    run.take_output("stream", PRINT)
    (appended,) = await anext(batches)

    assert reset.type == "reset"
    assert appended.type == "append"
    assert appended.seq == reset.seq + 1


async def test_output_that_comes_after_the_end_is_kept_but_tells_no_event() -> None:
    run = new_run()
    run.end(RunStatus.OK)
    before = await read(run)

    run.take_output("stream", PRINT)

    after = await read(run)
    assert [event["type"] for event in after] == [event["type"] for event in before]
    assert after[-1]["run"]["outputs"][0]["text"] == "x"


def test_the_first_end_stands() -> None:
    run = new_run()

    run.end(RunStatus.LOST, "the kernel was restarted")
    run.end(RunStatus.OK)

    assert (run.status, run.reason) == (RunStatus.LOST, "the kernel was restarted")


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (b'{"status": "ok"}', RunStatus.OK),
        (b'{"status": "error", "ename": "E", "evalue": "v"}', RunStatus.ERROR),
        (b'{"status": "aborted"}', RunStatus.ABORTED),
        (b'{"status": "abort"}', RunStatus.ABORTED),
    ],
)
def test_the_reply_is_the_verdict(reply: bytes, status: RunStatus) -> None:
    run = new_run()

    run.take_reply(reply)

    assert run.verdict()[0] is status


def test_what_belongs_into_a_pager_is_an_output() -> None:
    run = new_run()
    payload = [{"source": "page", "start": 0, "data": {"text/plain": "help"}}, {"source": "other"}]

    run.take_reply(json.dumps({"status": "ok", "payload": payload}).encode())

    assert msgspec.to_builtins(run.result().outputs) == [
        {"output_type": "display_data", "data": {"text/plain": "help"}, "metadata": {}}
    ]


async def test_a_run_that_waits_for_input_is_settled_and_says_what_is_asked() -> None:
    run = new_run()
    settled = asyncio.create_task(run.settled())
    await asyncio.sleep(0)
    assert not settled.done()

    run.wait_for_input(InputRequest("name? "))
    await settled

    assert run.result().status is RunStatus.WAITING_INPUT
    assert run.result().input_request == InputRequest("name? ")

"""A run on its kernel: what is asked, what answers, input and timeouts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from sorna_jupyter.exceptions import (
    AgentUnreachable,
    Conflict,
)
from sorna_jupyter.protocol import Batch, KernelMessage
from sorna_jupyter.run import EOF, Execute, Run, RunStatus
from sorna_jupyter.runs import Runs
from tests.runs.parts import KERNEL_ID, PlayedKernels
from tests.waiting import until

# -- runs on a kernel ------------------------------------------------------------------------


async def test_the_request_carries_the_runs_id_and_what_was_asked(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x = 1", silent=True))

    channel, header, content = await kernels.sent.get()
    assert channel == "shell"
    assert (header["msg_id"], header["msg_type"]) == (run.id, "execute_request")
    assert (header["session"], header["username"]) == (kernels.attached[0][0], "ada")
    assert content == {
        "code": "x = 1",
        "silent": True,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": False,
    }


async def test_all_runs_of_a_kernel_share_one_client_session(
    kernels: PlayedKernels, runs: Runs
) -> None:
    first = runs.submit(KERNEL_ID, Execute(code="1"))
    second = runs.submit(KERNEL_ID, Execute(code="2"))

    kernels.busy(first)
    kernels.says("iopub", "stream", {"text": "of the first"}, first.id)
    kernels.finish(second)

    assert len(kernels.attached) == 1
    assert (first.status, second.status) == (RunStatus.RUNNING, RunStatus.OK)
    assert second.result().outputs == []


@pytest.mark.parametrize("idle_first", [True, False])
async def test_a_run_ends_with_reply_and_idle_in_either_order(
    kernels: PlayedKernels, runs: Runs, idle_first: bool
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))
    kernels.busy(run)
    ends = [kernels.idle, kernels.reply]

    ends.pop(not idle_first)(run)
    assert not run.is_over
    kernels.says("iopub", "stream", {"text": "late"}, run.id)
    ends.pop()(run)

    assert run.status is RunStatus.OK
    assert len(run.result().outputs) == 1


async def test_a_run_is_queued_until_the_kernel_takes_it_up(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x", timeout=0.01))

    await asyncio.sleep(0.05)  # longer than its timeout, which counts from its start
    assert run.status is RunStatus.QUEUED
    kernels.says("iopub", "execute_input", {"code": "x", "execution_count": 9}, run.id)

    assert run.status is RunStatus.RUNNING
    assert run.execution_count == 9
    assert run.timings.started is not None


async def test_a_later_cell_updates_the_display_of_a_run_that_is_over(
    kernels: PlayedKernels, runs: Runs
) -> None:
    shown = {"data": {"text/plain": "1"}, "transient": {"display_id": "d"}}
    run = runs.submit(KERNEL_ID, Execute(code="x"))
    kernels.says("iopub", "display_data", shown, run.id)
    kernels.finish(run)

    shown["data"] = {"text/plain": "2"}
    kernels.says("iopub", "update_display_data", shown, "a notebook's cell")

    assert msgspec.to_builtins(run.result().outputs)[0]["data"] == {"text/plain": "2"}


async def test_others_messages_are_not_ours(kernels: PlayedKernels, runs: Runs) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    kernels.says("iopub", "stream", {"text": "not yours"}, "a notebook's cell")
    kernels.says("iopub", "status", {"execution_state": "idle"}, "a notebook's cell")

    assert run.status is RunStatus.QUEUED
    assert run.result().outputs == []


@pytest.mark.parametrize(
    ("msg_type", "content"),
    [
        *[("stream", 1), ("stream", {"text": 5}), ("display_data", {"data": []})],
        *[("status", []), ("execute_input", {"execution_count": "one"})],
    ],
)
async def test_a_message_that_is_none_is_passed_over(
    kernels: PlayedKernels, runs: Runs, msg_type: str, content: Any
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    kernels.says("iopub", msg_type, content, run.id)
    kernels.finish(run)

    assert run.status is RunStatus.OK


async def test_nested_ten_thousand_deep_is_passed_over(kernels: PlayedKernels, runs: Runs) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))
    deep = b'{"data": {"application/json": ' + b"[" * 10_000 + b"]" * 10_000 + b"}}"
    header = json.dumps({"msg_type": "display_data"}).encode()
    parent = json.dumps({"msg_id": run.id}).encode()
    message = KernelMessage.of(KERNEL_ID, 1, "", "iopub", [header, parent, b"{}", deep])

    kernels.attached[0][1].on_kernel_messages(Batch([message]))
    kernels.finish(run)

    assert run.status is RunStatus.OK


# -- input -----------------------------------------------------------------------------------


async def input_reply(kernels: PlayedKernels, runs: Runs, run: Run) -> Any:
    """What the kernel is told when it asks for input."""
    while not kernels.sent.empty():
        kernels.sent.get_nowait()
    kernels.says("stdin", "input_request", {"prompt": "? ", "password": False}, run.id)
    if kernels.sent.empty():
        return None
    channel, header, content = kernels.sent.get_nowait()
    assert (channel, header["msg_type"]) == ("stdin", "input_reply")
    assert header["parent"]["msg_id"] == "kernel-input_request"
    return content["value"]


@pytest.mark.parametrize("stdin", ["one\ntwo", "one\ntwo\n", ["one", "two"]])
async def test_lines_given_up_front_are_answers_and_then_it_is_the_end_of_file(
    kernels: PlayedKernels, runs: Runs, stdin: str | list[str]
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x", stdin=stdin))
    assert kernels.sent.get_nowait()[2]["allow_stdin"]

    answers = [await input_reply(kernels, runs, run) for _ in range(3)]

    assert answers == ["one", "two", EOF]
    assert run.status is not RunStatus.WAITING_INPUT


async def test_after_the_given_lines_someone_may_be_asked(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x", stdin="one", allow_stdin=True))

    assert await input_reply(kernels, runs, run) == "one"
    assert await input_reply(kernels, runs, run) is None
    assert run.status is RunStatus.WAITING_INPUT

    runs.answer(run, "by hand")
    assert kernels.sent.get_nowait()[2] == {"value": "by hand"}
    assert run.status is RunStatus.RUNNING
    with pytest.raises(Conflict):
        runs.answer(run, "again")


# -- timeouts --------------------------------------------------------------------------------


async def test_a_timeout_interrupts_the_kernel_and_says_so(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x", timeout=0.01))
    kernels.busy(run)
    await until(lambda: kernels.interrupts)

    kernels.reply(run, status="error", ename="KeyboardInterrupt", evalue="")
    kernels.idle(run)

    assert run.status is RunStatus.TIMEOUT
    assert run.reason == "interrupted after 0.01 s"
    assert run.error is not None and run.error.ename == "KeyboardInterrupt"


async def test_code_that_ignores_the_interrupt_is_given_up_and_it_is_said(
    kernels: PlayedKernels,
) -> None:
    runs = Runs(kernels, interrupt_grace=0.01)  # type: ignore[arg-type]  # played
    run = runs.submit(KERNEL_ID, Execute(code="x", timeout=0.01))
    kernels.busy(run)

    async with asyncio.timeout(10):
        await run.over.wait()

    assert run.status is RunStatus.TIMEOUT
    assert run.reason == "interrupted after 0.01 s; 0.01 s later the code still went on"


async def test_an_interrupt_that_fails_is_told(kernels: PlayedKernels) -> None:
    runs = Runs(kernels, interrupt_grace=0.01)  # type: ignore[arg-type]  # played
    kernels.interrupt_failure = AgentUnreachable("no answer")
    run = runs.submit(KERNEL_ID, Execute(code="x", timeout=0.01))
    kernels.busy(run)

    async with asyncio.timeout(10):
        await run.over.wait()

    assert run.reason is not None and "could not be: no answer" in run.reason


async def test_an_idle_that_never_comes_does_not_hold_the_result_back(
    kernels: PlayedKernels,
) -> None:
    runs = Runs(kernels, settle_time=0.01)  # type: ignore[arg-type]  # played
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    kernels.reply(run)
    async with asyncio.timeout(10):
        await run.over.wait()

    assert run.status is RunStatus.OK


async def test_an_idle_without_a_reply_is_a_loss(kernels: PlayedKernels) -> None:
    runs = Runs(kernels, settle_time=0.01)  # type: ignore[arg-type]  # played
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    kernels.idle(run)
    async with asyncio.timeout(10):
        await run.over.wait()

    assert run.status is RunStatus.LOST

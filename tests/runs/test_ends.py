"""Runs whose kernel goes, runs that are let go, and those of another gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from sorna_jupyter.exceptions import (
    AgentUnreachable,
    InvalidRequest,
    RunNotFound,
    Unavailable,
)
from sorna_jupyter.protocol import Gap, KernelStatus
from sorna_jupyter.run import Execute, RunStatus
from sorna_jupyter.runs import SESSION, Runs
from tests.runs.parts import KERNEL_ID, PlayedKernels
from tests.waiting import until

# -- kernels that go -------------------------------------------------------------------------


async def test_a_restart_loses_what_runs_and_what_waits(kernels: PlayedKernels, runs: Runs) -> None:
    running = runs.submit(KERNEL_ID, Execute(code="x"))
    queued = runs.submit(KERNEL_ID, Execute(code="y"))
    kernels.busy(running)

    kernels.is_now(KernelStatus.RESTARTING)
    kernels.is_now(KernelStatus.RUNNING)
    after = runs.submit(KERNEL_ID, Execute(code="z"))
    kernels.finish(after)

    for run in (running, queued):
        assert (run.status, run.reason) == (RunStatus.LOST, "the kernel was restarted")
    assert after.status is RunStatus.OK


async def test_a_death_loses_the_run_and_gives_its_reason(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))
    kernels.says("iopub", "stream", {"text": "last words"}, run.id)

    kernels.is_now(KernelStatus.DEAD, "killed: out of memory")

    assert (run.status, run.reason) == (
        RunStatus.LOST,
        "the kernel ended: killed: out of memory",
    )
    assert len(runs.get(run.id, KERNEL_ID).result().outputs) == 1
    assert kernels.attached == []


async def test_a_lost_agent_may_come_back_so_the_run_waits(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    kernels.is_now(KernelStatus.LOST, "its agent is lost")
    with pytest.raises(Unavailable):
        runs.submit(KERNEL_ID, Execute(code="y"))
    kernels.is_now(KernelStatus.RUNNING)
    kernels.finish(run)

    assert run.status is RunStatus.OK


async def test_when_the_gateway_stops_its_runs_are_lost(kernels: PlayedKernels) -> None:
    runs = Runs(kernels)  # type: ignore[arg-type]  # played
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    await runs.close()

    assert (run.status, run.reason) == (RunStatus.LOST, "the gateway was stopped")


async def test_code_that_can_not_be_sent_is_no_run(kernels: PlayedKernels, runs: Runs) -> None:
    kernels.failure = AgentUnreachable()

    with pytest.raises(AgentUnreachable):
        runs.submit(KERNEL_ID, Execute(code="x"))

    assert runs.list(KERNEL_ID) == []


async def test_code_with_nul_is_refused(runs: Runs) -> None:
    with pytest.raises(InvalidRequest):
        runs.submit(KERNEL_ID, Execute(code="x\0y"))


# -- what is kept ----------------------------------------------------------------------------


async def test_the_oldest_runs_are_let_go_when_there_are_too_many(kernels: PlayedKernels) -> None:
    runs = Runs(kernels, keep_count=2)  # type: ignore[arg-type]  # played
    done = [runs.submit(KERNEL_ID, Execute(code=str(n))) for n in range(4)]
    going_on = runs.submit(KERNEL_ID, Execute(code="long"))
    for run in done:
        kernels.finish(run)

    assert runs.list(KERNEL_ID) == [*done[2:], going_on]
    with pytest.raises(RunNotFound):
        runs.get(done[0].id)


async def test_the_oldest_runs_are_let_go_when_they_are_too_big(kernels: PlayedKernels) -> None:
    runs = Runs(kernels, keep_size=1000)  # type: ignore[arg-type]  # played
    done = [runs.submit(KERNEL_ID, Execute(code="x" * 900)) for _ in range(3)]
    for run in done:
        kernels.finish(run)

    assert runs.list(KERNEL_ID) == done[2:]


async def test_runs_are_let_go_with_age_and_so_is_the_unused_session(
    kernels: PlayedKernels,
) -> None:
    runs = Runs(kernels, keep_for=0.01, linger=0.01)  # type: ignore[arg-type]  # played
    kernels.finish(runs.submit(KERNEL_ID, Execute(code="x")))

    await until(lambda: not runs.list(KERNEL_ID) and not kernels.attached)


async def test_a_run_is_found_only_under_its_own_kernel(kernels: PlayedKernels, runs: Runs) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="x"))

    with pytest.raises(RunNotFound):
        runs.get(run.id, "00000000-2222-4333-8444-555555555555")


# -- runs of another gateway -----------------------------------------------------------------


def told_by_the_journal(run_id: str) -> list[tuple[str, str, Any, dict[str, str]]]:
    parent = {
        "msg_id": run_id,
        "msg_type": "execute_request",
        "session": SESSION,
        "date": "2026-01-02T03:04:05Z",
    }
    return [
        ("iopub", "status", {"execution_state": "busy"}, parent),
        ("iopub", "execute_input", {"code": "print(1)", "execution_count": 3}, parent),
        ("iopub", "stream", {"name": "stdout", "text": "1\n"}, parent),
        ("shell", "execute_reply", {"status": "ok", "execution_count": 3}, parent),
        ("iopub", "status", {"execution_state": "idle"}, parent),
    ]


async def test_a_run_that_another_gateway_made_is_read_back_from_the_journal(
    runs: Runs, kernels: PlayedKernels
) -> None:
    kernels.journal = told_by_the_journal("r1")

    run = await runs.find("r1", KERNEL_ID)

    result = run.result()
    assert (result.status, result.execution_count) == (RunStatus.OK, 3)
    assert [output["text"] for output in msgspec.to_builtins(result.outputs)] == ["1\n"]
    assert (run.request.code, run.owner) == ("print(1)", kernels.kernel.owner)
    assert result.timings.created.year == 2026
    assert [run.id for run in await runs.list_all(KERNEL_ID)] == ["r1"]


async def test_a_run_that_goes_on_is_followed_from_where_another_gateway_left_it(
    runs: Runs, kernels: PlayedKernels
) -> None:
    *begun, reply, idle = told_by_the_journal("r1")
    kernels.journal = begun

    run = await runs.find("r1", KERNEL_ID)
    assert run.status is RunStatus.RUNNING

    kernels.says(*reply)
    kernels.says(*idle)
    assert run.status is RunStatus.OK


async def test_a_run_that_nobody_made_is_not_found(runs: Runs, kernels: PlayedKernels) -> None:
    with pytest.raises(RunNotFound):
        await runs.find("r1", KERNEL_ID)


async def test_where_the_answer_fell_out_of_the_journal_the_run_is_lost_not_waited_for(
    runs: Runs, kernels: PlayedKernels
) -> None:
    run = runs.submit(KERNEL_ID, Execute(code="1"))
    await kernels.sent.get()
    _, listener = kernels.attached[-1]

    listener.on_kernel_gap(Gap(KERNEL_ID, 5, 9, 1000, "the disk was full"))
    for _ in range(2):
        _, question, _ = await kernels.sent.get()
        kernels.says("shell", "kernel_info_reply", {"status": "ok"}, question["msg_id"])
    await asyncio.wait_for(run.over.wait(), 5)

    assert run.status is RunStatus.LOST
    assert "the disk was full" in (run.reason or "")
    assert "the disk was full" in str(msgspec.to_builtins(run.result().outputs))

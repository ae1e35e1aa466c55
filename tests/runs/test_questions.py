"""What an editor asks, and kernels that are made for one run."""

from __future__ import annotations

import asyncio

import pytest

from sorna_jupyter.exceptions import (
    AgentUnreachable,
    Conflict,
    Unavailable,
)
from sorna_jupyter.protocol import KernelStatus
from sorna_jupyter.run import Execute
from sorna_jupyter.runs import Runs
from tests.runs.parts import KERNEL_ID, PlayedKernels

# -- questions -------------------------------------------------------------------------------


async def test_a_question_gets_the_content_of_its_reply(kernels: PlayedKernels, runs: Runs) -> None:
    asking = asyncio.create_task(runs.ask(KERNEL_ID, "complete_request", {"code": "a"}))
    _, header, content = await kernels.sent.get()
    assert content == {"code": "a"}

    kernels.says("shell", "complete_reply", {"matches": ["abc"]}, header["msg_id"])

    assert await asking == {"matches": ["abc"]}


async def test_a_kernel_that_is_busy_can_not_be_asked(kernels: PlayedKernels) -> None:
    runs = Runs(kernels, answer_timeout=0.01)  # type: ignore[arg-type]  # played
    kernels.kernel.execution_state = "busy"

    with pytest.raises(Unavailable, match=r"did not answer within 0.01 s: it is busy"):
        await runs.ask(KERNEL_ID, "complete_request", {"code": "a"})


async def test_a_question_to_a_kernel_that_dies_fails_at_once(
    kernels: PlayedKernels, runs: Runs
) -> None:
    asking = asyncio.create_task(runs.ask(KERNEL_ID, "complete_request", {"code": "a"}))
    await kernels.sent.get()

    kernels.is_now(KernelStatus.DEAD, "exit code 1")

    with pytest.raises(Conflict, match="exit code 1"):
        await asking


# -- one shot --------------------------------------------------------------------------------


async def test_a_kernel_made_for_one_run_is_stopped_after_it(
    kernels: PlayedKernels, runs: Runs
) -> None:
    run = await runs.run_once(Execute(code="x"), owner="ada", name="python3", env={"A": "1"})
    assert kernels.options["env"] == {"A": "1"}
    assert kernels.stopped == []

    kernels.finish(run)
    await runs.close()

    assert kernels.stopped == [(KERNEL_ID, "its one run is over")]


async def test_a_kernel_made_for_one_run_is_stopped_when_that_can_not_start(
    kernels: PlayedKernels, runs: Runs
) -> None:
    kernels.failure = AgentUnreachable()

    with pytest.raises(AgentUnreachable):
        await runs.run_once(Execute(code="x"), owner="ada")

    assert [kernel_id for kernel_id, _ in kernels.stopped] == [KERNEL_ID]


async def test_a_kernel_made_for_one_run_is_stopped_with_the_gateway(
    kernels: PlayedKernels,
) -> None:
    runs = Runs(kernels)  # type: ignore[arg-type]  # played
    await runs.run_once(Execute(code="x"), owner="ada")

    await runs.close()

    assert [kernel_id for kernel_id, _ in kernels.stopped] == [KERNEL_ID]

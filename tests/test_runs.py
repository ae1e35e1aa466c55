"""Runs: one run's life from plain events, then `Runs` on a kernel that the test plays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from sorna_jupyter.exceptions import (
    AgentUnreachable,
    Conflict,
    InvalidRequest,
    KernelNotFound,
    RunNotFound,
    SornaError,
    Unavailable,
)
from sorna_jupyter.kernels import Kernel
from sorna_jupyter.protocol import Batch, Gap, KernelMessage, KernelStatus, Limits
from sorna_jupyter.run import EOF, Execute, InputRequest, Run, RunStatus
from sorna_jupyter.runs import SESSION, Runs
from tests.waiting import until

KERNEL_ID = "11111111-2222-4333-8444-555555555555"
PRINT = b'{"name": "stdout", "text": "x"}'


def new_run(max_bytes: int = 1 << 20, **request: Any) -> Run:
    return Run("run-1", KERNEL_ID, "ada", Execute(code="x", **request), max_bytes)


async def read(run: Run, start: int = 0) -> list[Any]:
    """Every event from `start` to the end of a run that is over, as a client parses it."""
    assert run.is_over
    events = [event async for batch in run.follow(start) for event in batch]
    parsed = [json.loads(event.data) for event in events]
    assert [(e.seq, e.type) for e in events] == [(p["seq"], p["type"]) for p in parsed]
    return parsed


# -- one run ---------------------------------------------------------------------------------


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


# -- runs on a kernel ------------------------------------------------------------------------


class PlayedKernels:
    """In place of `Kernels`: one kernel, played by the test."""

    def __init__(self) -> None:
        self.kernel = Kernel(
            KERNEL_ID, "python3", "ada", "a", KernelStatus.RUNNING, 0.0, "", Limits(), None
        )
        self.sent: asyncio.Queue[tuple[str, Any, Any]] = asyncio.Queue()
        self.attached: list[tuple[str, Any]] = []
        self.interrupts: list[str] = []
        self.stopped: list[tuple[str, str]] = []
        self.journal: list[tuple[str, str, Any, dict[str, str]]] = []
        self.is_behind = False
        self.failure: SornaError | None = None
        self.interrupt_failure: SornaError | None = None

    # what `Runs` calls

    def get(self, kernel_id: str) -> Kernel:
        if kernel_id != KERNEL_ID:
            raise KernelNotFound(kernel_id)
        return self.kernel

    def attach(
        self, kernel_id: str, session_id: str, listener: Any, *, resumes: bool = False
    ) -> PlayedKernels:
        assert resumes
        self.attached.append((session_id, listener))
        return self

    async def catch_up(self) -> None:
        """What an earlier gateway left in the journal."""
        self.is_behind = True
        for message in self.journal:
            self.says(*message)
        self.is_behind = False

    def acknowledge(self, seq: int) -> None:
        self.journal.clear()

    def close(self) -> None:
        self.attached.pop()

    def send(self, channel: str, parts: list[bytes]) -> None:
        if self.failure:
            raise self.failure
        header, parent, _, content = map(json.loads, parts)
        self.sent.put_nowait((channel, {**header, "parent": parent}, content))

    async def interrupt(self, kernel_id: str) -> None:
        self.interrupts.append(kernel_id)
        if self.interrupt_failure:
            raise self.interrupt_failure

    async def start(self, **options: Any) -> Kernel:
        self.options = options
        return self.kernel

    async def stop(self, kernel_id: str, reason: str) -> None:
        self.stopped.append((kernel_id, reason))

    # what the test does

    def says(self, channel: str, msg_type: str, content: Any, parent: str | dict[str, str]) -> None:
        session_id, listener = self.attached[-1]
        header = {"msg_id": f"kernel-{msg_type}", "msg_type": msg_type}
        parent_header = {"msg_id": parent} if isinstance(parent, str) else parent
        parts = [json.dumps(part).encode() for part in (header, parent_header, {}, content)]
        session = "" if channel == "iopub" else session_id
        message = KernelMessage.of(KERNEL_ID, 1, session, channel, parts)
        listener.on_kernel_messages(Batch([message]))

    def is_now(self, status: KernelStatus, reason: str = "") -> None:
        self.kernel.status, self.kernel.reason = status, reason
        for _, listener in list(self.attached):
            listener.on_kernel_event(self.kernel)

    def busy(self, run: Run) -> None:
        self.says("iopub", "status", {"execution_state": "busy"}, run.id)

    def idle(self, run: Run) -> None:
        self.says("iopub", "status", {"execution_state": "idle"}, run.id)

    def reply(self, run: Run, **content: Any) -> None:
        self.says("shell", "execute_reply", {"status": "ok", **content}, run.id)

    def finish(self, run: Run) -> None:
        self.busy(run)
        self.reply(run)
        self.idle(run)


@pytest.fixture
def kernels() -> PlayedKernels:
    return PlayedKernels()


@pytest.fixture
async def runs(kernels: PlayedKernels) -> AsyncIterator[Runs]:
    runs = Runs(kernels, interrupt_grace=30, answer_timeout=30)  # type: ignore[arg-type]  # played
    yield runs
    await runs.close()


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


# -- input


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


# -- timeouts


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


# -- kernels that go


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


# -- what is kept


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


# -- questions


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


# -- one shot


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
    _, question, _ = await kernels.sent.get()
    kernels.says("shell", "kernel_info_reply", {"status": "ok"}, question["msg_id"])
    await asyncio.wait_for(run.over.wait(), 5)

    assert run.status is RunStatus.LOST
    assert "the disk was full" in (run.reason or "")
    assert "the disk was full" in str(msgspec.to_builtins(run.result().outputs))

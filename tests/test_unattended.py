"""Cells whose client is gone, on a real contents manager and registry; the test is the kernel."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager

from sorna_jupyter.exceptions import AgentUnreachable, NotebookNotWritten, SornaError
from sorna_jupyter.kernels import Kernel
from sorna_jupyter.notebooks import Notebooks, SornaContentsManager
from sorna_jupyter.open_cells import LEAST_REWRITTEN, OpenCells
from sorna_jupyter.protocol import Gap, KernelMessage, KernelStatus, Limits
from sorna_jupyter.registry import SessionRow
from sorna_jupyter.unattended import UnattendedCells
from tests.disks import fill
from tests.waiting import until

KERNEL_ID = "11111111-2222-4333-8444-555555555555"
PATH = "folder/work.ipynb"
CODE = {"a": "slow()", "b": "after()", "c": "last()"}


class Journal:
    """In place of `Kernels.messages`."""

    def __init__(self) -> None:
        self.items: list[KernelMessage | Gap] = []
        self.is_over = False
        self.failure: SornaError | None = None
        self.readers = 0
        self._news = asyncio.Event()

    async def messages(
        self, kernel_id: str, since: int, *, follow: bool
    ) -> AsyncGenerator[list[KernelMessage | Gap], None]:
        self.readers += 1
        try:
            place = since - 1
            while True:
                while place < len(self.items):
                    yield [self.items[place]]
                    place += 1
                if self.failure:
                    raise self.failure
                if not follow or self.is_over:
                    return
                await self._news.wait()
        finally:
            self.readers -= 1

    def tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def lose(self, reason: str) -> None:
        seq = len(self.items) + 1
        self.items.append(Gap(KERNEL_ID, seq, seq, None, reason))
        self.tell()

    def say(self, msg_id: str, msg_type: str, channel: str = "iopub", **content: Any) -> int:
        parts = [{"msg_type": msg_type}, {"msg_id": msg_id}, {}, content]
        seq = len(self.items) + 1
        encoded = [json.dumps(part).encode() for part in parts]
        self.items.append(KernelMessage.of(KERNEL_ID, seq, "", channel, encoded))
        self.tell()
        return seq

    def begin(self, msg_id: str, count: int = 1) -> None:
        self.say(msg_id, "status", execution_state="busy")
        self.say(msg_id, "execute_input", code="", execution_count=count)

    def print(self, msg_id: str, text: str) -> None:
        self.say(msg_id, "stream", name="stdout", text=text)

    def end(self, msg_id: str) -> int:
        seq = self.say(msg_id, "execute_reply", "shell", status="ok")
        self.say(msg_id, "status", execution_state="idle")
        return seq


class FakeRegistry:
    """Knows one admin, one other user, and who has which notebook."""

    def __init__(self) -> None:
        self.sessions = [SessionRow("s", PATH, "work", "notebook", KERNEL_ID, "ada")]
        self.is_admin = True

    async def find_user(self, name: str) -> Any:
        return self

    async def list_sessions(self, owner: str) -> list[SessionRow]:
        return [session for session in self.sessions if session.owner == owner]


class Bench:
    """A notebook, its kernel, and a client."""

    def __init__(self, root: Path, contents: Any) -> None:
        self.file = root / PATH
        self.contents = contents
        self.journal = Journal()
        self.registry = FakeRegistry()
        self.notebooks = Notebooks(contents, self.registry)  # type: ignore[arg-type]  # made up
        self.record = root / "open-cells.jsonl"
        self.cells = self.make()
        self.kernel = Kernel(
            id=KERNEL_ID,
            name="python3",
            owner="ada",
            agent_id="agent",
            status=KernelStatus.RUNNING,
            created_at=0.0,
            path="",
            limits=Limits(),
            idle_timeout=None,
            execution_state="busy",
        )
        self.write({name: (code, []) for name, code in CODE.items()})

    def make(self) -> UnattendedCells:
        """What a gateway has when it starts."""
        return UnattendedCells(
            self.journal.messages,
            self.notebooks,
            OpenCells(self.record),
            grace=0.05,
            interval=0.01,
            close_timeout=2,
        )

    def start_gateway_anew(self) -> None:
        """The former was killed: none of it does anything any more."""
        for clients in self.cells._clients.values():
            for client in clients.values():
                client.come_back()
        self.cells = self.make()
        self.cells.resume([self.kernel])

    def write(self, cells: dict[str, tuple[str, list[Any]]]) -> None:
        """Someone else saves the notebook."""
        found = [nbformat.v4.new_code_cell(c, id=n, outputs=o) for n, (c, o) in cells.items()]
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=found)))

    def read(self) -> dict[str, str]:
        """What the cells show."""
        try:
            nb = nbformat.reads(self.file.read_text(), as_version=4)
        except nbformat.reader.NotJSONError:
            return {}  # it is being written
        return {
            cell.id: "".join(output.get("text", "?") for output in cell.outputs)
            for cell in nb.cells
        }

    async def shows(self, **texts: str) -> None:
        wanted = dict.fromkeys(CODE, "") | texts
        try:
            await until(lambda: self.read() == wanted, 5)
        except TimeoutError:
            assert self.read() == wanted

    def execute(self, *names: str, session: str = "client") -> None:
        for name in names:
            header, metadata = {"msg_id": f"{session}-{name}"}, {"cellId": name}
            request = [header, {}, metadata, {"code": CODE[name], "silent": False}]
            parts = [json.dumps(part).encode() for part in request]
            self.cells.executed(self.kernel, session, parts)

    def leave(self, session: str = "client") -> None:
        self.cells.disconnected(KERNEL_ID, session)

    def change(self, status: KernelStatus, reason: str = "") -> None:
        self.kernel.status, self.kernel.reason = status, reason
        self.cells.on_kernel_change(self.kernel)

    @property
    def is_forgotten(self) -> bool:
        return not self.cells._clients and not self.cells._tasks and not self.journal.readers


@pytest.fixture(params=[SornaContentsManager, FileContentsManager])
async def idle_bench(tmp_path: Path, request: Any) -> AsyncIterator[Bench]:
    contents = request.param(root_dir=str(tmp_path))
    contents.notary.data_dir = str(tmp_path / "signatures")
    (tmp_path / "signatures").mkdir()
    bench = Bench(tmp_path, contents)
    yield bench
    await bench.cells.close()


@pytest.fixture
def bench(idle_bench: Bench) -> Bench:
    """Its client has executed cell a, and the kernel has begun with it."""
    idle_bench.execute("a")
    idle_bench.journal.begin("client-a")
    return idle_bench


# -- what is written -------------------------------------------------------------------------


async def test_outputs_are_written_as_they_come_and_at_the_end(bench: Bench) -> None:
    bench.execute("b")
    bench.journal.print("client-a", "1\n")
    bench.leave()

    await bench.shows(a="1\n")
    bench.journal.print("client-a", "2\n")
    await bench.shows(a="1\n2\n")
    bench.journal.end("client-a")
    bench.journal.begin("client-b", 2)
    bench.journal.print("client-b", "3\n")
    bench.journal.end("client-b")
    await bench.shows(a="1\n2\n", b="3\n")

    await until(lambda: bench.is_forgotten)
    nb = nbformat.read(bench.file, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2, None]
    nbformat.validate(nb)


async def test_a_client_whose_cells_were_all_answered_leaves_nothing_to_do(bench: Bench) -> None:
    reply = bench.journal.end("client-a")
    bench.cells.answered(KERNEL_ID, "client", "client-a", reply)
    bench.cells.acknowledged(KERNEL_ID, "client", reply)

    bench.leave()

    assert bench.is_forgotten


async def test_an_answer_that_never_arrived_is_none(bench: Bench) -> None:
    bench.journal.print("client-a", "x")
    reply = bench.journal.end("client-a")
    bench.cells.answered(KERNEL_ID, "client", "client-a", reply)
    bench.cells.acknowledged(KERNEL_ID, "client", reply - 1)

    bench.leave()

    await bench.shows(a="x")


async def test_cells_that_were_answered_but_not_saved_are_written_too(bench: Bench) -> None:
    bench.execute("b")
    bench.journal.print("client-a", "1")
    reply = bench.journal.end("client-a")
    bench.cells.answered(KERNEL_ID, "client", "client-a", reply)
    bench.cells.acknowledged(KERNEL_ID, "client", reply)
    bench.journal.begin("client-b")
    bench.journal.print("client-b", "2")

    bench.leave()

    await bench.shows(a="1", b="2")


async def test_what_the_client_has_saved_stays_as_it_saved_it(bench: Bench) -> None:
    bench.execute("b")
    bench.journal.print("client-a", "1")
    reply = bench.journal.end("client-a")
    bench.cells.answered(KERNEL_ID, "client", "client-a", reply)
    bench.cells.acknowledged(KERNEL_ID, "client", reply)
    bench.write({name: (code, []) for name, code in CODE.items()})  # with its outputs cleared
    bench.journal.begin("client-b")
    bench.journal.print("client-b", "2")

    bench.leave()

    await bench.shows(b="2")


async def test_a_kernel_that_is_restarted_ends_its_cells_with_the_reason(bench: Bench) -> None:
    bench.execute("b")
    bench.leave()
    await until(lambda: bench.journal.readers)
    bench.change(KernelStatus.RESTARTING)
    bench.journal.print("client-a", "its last words\n")
    bench.change(KernelStatus.RUNNING)

    await bench.shows(a="its last words\n[The kernel was restarted]\n")
    await until(lambda: bench.is_forgotten)


async def test_a_kernel_that_dies_ends_its_cells_with_the_reason(bench: Bench) -> None:
    bench.journal.print("client-a", "x\n")
    bench.leave()
    await bench.shows(a="x\n")
    bench.change(KernelStatus.DEAD, "killed: out of memory (limit 512 MiB)")

    reason = "[The kernel ended: killed: out of memory (limit 512 MiB)]\n"
    await bench.shows(a="x\n" + reason)
    await until(lambda: bench.is_forgotten)


async def test_a_kernel_that_is_lost_and_comes_back_goes_on(bench: Bench) -> None:
    bench.leave()
    await until(lambda: bench.journal.readers)
    bench.change(KernelStatus.LOST)
    bench.change(KernelStatus.RUNNING)
    bench.journal.print("client-a", "x")
    bench.journal.end("client-a")

    await bench.shows(a="x")
    await until(lambda: bench.is_forgotten)


async def test_an_end_that_is_lost_is_known_from_the_idle_kernel(bench: Bench) -> None:
    bench.leave()
    await until(lambda: bench.journal.readers)
    bench.journal.lose("the relay was away")
    await bench.shows(a="[some of the kernel's messages are lost: the relay was away]\n")
    assert not bench.is_forgotten
    bench.kernel.execution_state = "idle"

    await until(lambda: bench.is_forgotten)


async def test_a_journal_that_can_not_be_read_says_so(bench: Bench) -> None:
    bench.journal.failure = AgentUnreachable("the agent is away")
    bench.leave()

    await bench.shows(a="[The rest can't be read: the agent is away]\n")
    await until(lambda: bench.is_forgotten)


async def test_what_is_no_message_disturbs_no_other(bench: Bench) -> None:
    bench.journal.say("client-a", "stream", name=1)
    bench.journal.print("client-a", "x")
    bench.leave()

    await bench.shows(a="x")


async def test_when_the_server_stops_what_is_there_is_written(bench: Bench) -> None:
    bench.leave()
    await until(lambda: bench.journal.readers)
    bench.journal.print("client-a", "x")

    await bench.cells.close()

    assert bench.read()["a"] == "x"
    assert bench.is_forgotten


# -- a gateway that is started anew ----------------------------------------------------------


async def test_a_gateway_started_anew_goes_on_with_the_cells_of_who_does_not_come_back(
    bench: Bench,
) -> None:
    bench.execute("a", "b")
    bench.journal.begin("client-a")
    bench.journal.print("client-a", "1 ")
    bench.leave()
    await bench.shows(a="1 ")

    bench.start_gateway_anew()
    bench.journal.print("client-a", "2 ")
    bench.journal.end("client-a")
    bench.journal.begin("client-b", 2)
    await bench.shows(a="1 2 ")
    bench.start_gateway_anew()
    bench.journal.print("client-b", "3")
    bench.journal.end("client-b")

    await bench.shows(a="1 2 ", b="3")
    await until(lambda: bench.is_forgotten)
    assert bench.make().open_cells.clients == {}


async def test_a_client_that_comes_back_to_a_gateway_started_anew_has_its_file_to_itself(
    bench: Bench,
) -> None:
    bench.execute("a")

    bench.start_gateway_anew()
    bench.cells.connected(bench.kernel, "client")
    bench.journal.begin("client-a")
    bench.journal.print("client-a", "seen")
    seq = bench.journal.end("client-a")
    bench.cells.answered(KERNEL_ID, "client", "client-a", seq)
    bench.cells.acknowledged(KERNEL_ID, "client", seq)
    bench.leave()

    assert bench.is_forgotten
    await bench.shows()


async def test_what_was_answered_or_ended_or_executed_anew_is_nothing_to_go_on_with(
    bench: Bench,
) -> None:
    bench.execute("a", session="early")
    bench.execute("b")
    bench.cells.answered(KERNEL_ID, "client", "client-b", 5)
    bench.cells.acknowledged(KERNEL_ID, "client", 5)
    bench.execute("a", session="late")
    bench.execute("c", session="of another kernel")
    bench.kernel.id = "another"

    bench.start_gateway_anew()

    assert bench.is_forgotten
    bench.kernel.id = KERNEL_ID


async def test_when_the_server_stops_and_kernels_go_on_the_next_goes_on_with_their_cells(
    bench: Bench,
) -> None:
    bench.execute("a")
    bench.journal.begin("client-a")
    bench.leave()
    await until(lambda: bench.journal.readers)

    await bench.cells.close()
    bench.start_gateway_anew()
    bench.journal.print("client-a", "on and on")
    bench.journal.end("client-a")

    await bench.shows(a="on and on")


async def test_the_record_is_private_and_does_not_grow_for_ever(bench: Bench) -> None:
    CODE["long"] = "#" * (LEAST_REWRITTEN // 100)
    for _ in range(1000):
        bench.execute("long")
    del CODE["long"]

    assert bench.record.stat().st_size < 2 * LEAST_REWRITTEN
    assert bench.record.stat().st_mode & 0o777 == 0o600
    [executions] = OpenCells(bench.record).clients.values()
    assert [e.cell_id for e in executions.values()].count("long") == 1


async def test_a_record_cut_short_or_on_a_full_disk_costs_no_more_than_that(
    bench: Bench, little_disk: Path
) -> None:
    bench.execute("a", "b")
    bench.record.write_bytes(bench.record.read_bytes()[:-5])
    [[execution]] = [e.values() for e in OpenCells(bench.record).clients.values()]
    assert execution.cell_id == "a"

    bench.record = little_disk / "open-cells.jsonl"
    bench.cells = bench.make()
    bench.execute("a")
    fill(little_disk / "filler")
    for _ in range(100):
        bench.execute("b")
    (little_disk / "filler").unlink()
    bench.execute("c")

    [executions] = OpenCells(bench.record).clients.values()
    assert [e.cell_id for e in executions.values()] == ["a", "b", "c"]


# -- what is not -----------------------------------------------------------------------------


async def test_a_client_that_comes_back_in_time_finds_its_file_as_it_was(bench: Bench) -> None:
    bench.journal.print("client-a", "x")
    bench.leave()
    bench.cells.connected(bench.kernel, "client")
    bench.execute("c", session="other")
    bench.leave("other")  # goes later, and is written when the first would have been
    bench.journal.begin("other-c")
    bench.journal.print("other-c", "y")

    await bench.shows(c="y")


async def test_a_client_that_comes_back_late_ends_the_writing(bench: Bench) -> None:
    bench.journal.print("client-a", "1")
    bench.leave()
    await bench.shows(a="1")

    bench.cells.connected(bench.kernel, "client")
    await until(lambda: not bench.journal.readers and not bench.cells._tasks)
    bench.journal.print("client-a", "2")
    assert bench.read()["a"] == "1"

    bench.leave()
    await bench.shows(a="12")


async def test_code_that_was_edited_meanwhile_stays(bench: Bench) -> None:
    bench.execute("b")
    bench.journal.print("client-a", "1")
    bench.leave()
    await bench.shows(a="1")
    bench.write({"a": ("a_newer_edit()", []), "b": (CODE["b"], []), "c": (CODE["c"], [])})
    bench.journal.print("client-a", "2")
    bench.journal.end("client-a")
    bench.journal.begin("client-b")
    bench.journal.print("client-b", "3")
    bench.journal.end("client-b")

    await bench.shows(b="3")


async def test_a_cell_that_someone_else_executes_again_is_theirs(bench: Bench) -> None:
    bench.execute("b")
    bench.leave()
    await until(lambda: bench.journal.readers)
    bench.execute("a", session="other")
    bench.journal.print("client-a", "1")
    bench.journal.end("client-a")
    bench.journal.begin("client-b")
    bench.journal.print("client-b", "2")
    bench.journal.end("client-b")

    await bench.shows(b="2")


@pytest.mark.parametrize(
    "session",
    [
        SessionRow("s", PATH, "work", "notebook", KERNEL_ID, "bob"),
        SessionRow("s", PATH, "work", "console", KERNEL_ID, "ada"),
        SessionRow("s", PATH, "work", "notebook", "another-kernel", "ada"),
    ],
)
async def test_only_the_owners_notebooks_of_this_kernel_are_written(
    idle_bench: Bench, session: SessionRow
) -> None:
    idle_bench.registry.sessions = [session]

    assert await idle_bench.notebooks.paths(KERNEL_ID, "ada") == []


async def test_nobody_writes_by_way_of_a_cell_what_they_may_not_write(idle_bench: Bench) -> None:
    idle_bench.registry.is_admin = False

    assert await idle_bench.notebooks.paths(KERNEL_ID, "ada") == []


async def test_a_session_whose_file_is_not_here_is_no_hindrance(bench: Bench) -> None:
    elsewhere = SessionRow("e", "elsewhere.ipynb", "", "notebook", KERNEL_ID, "ada")
    bench.registry.sessions.insert(0, elsewhere)
    bench.journal.print("client-a", "x")
    bench.leave()

    await bench.shows(a="x")


# -- the file --------------------------------------------------------------------------------


async def test_who_saves_between_reading_and_writing_wins(idle_bench: Bench) -> None:
    seen = []

    def change(notebook: Any, saved_at: float) -> bool:
        seen.append(notebook["cells"][0]["source"])
        if len(seen) == 1:
            idle_bench.write({"a": ("newer()", [])})
            os.utime(idle_bench.file, (saved_at + 1, saved_at + 1))
        notebook["cells"][0]["outputs"] = [nbformat.v4.new_output("stream", text="x")]
        return True

    await idle_bench.notebooks.edit(PATH, change)

    assert seen == ["slow()", "newer()"]
    assert idle_bench.read() == {"a": "x"}


@pytest.mark.parametrize("path", ["missing.ipynb", "../outside.ipynb", "folder"])
async def test_a_file_that_can_not_be_written_is_told(idle_bench: Bench, path: str) -> None:
    with pytest.raises(NotebookNotWritten) as error:
        await idle_bench.notebooks.edit(path, lambda notebook, saved_at: True)

    assert str(error.value).startswith(f"{path}: ")


async def test_nobody_reads_a_notebook_in_the_middle_of_its_being_written(tmp_path: Path) -> None:
    contents = SornaContentsManager(root_dir=str(tmp_path))
    bench = Bench(tmp_path, contents)
    big = [nbformat.v4.new_output("stream", text=f"line {i}\n" * 20_000) for i in range(10)]

    def change(notebook: Any, saved_at: float) -> bool:
        notebook["cells"][0]["outputs"] = [dict(output) for output in big]
        return True

    async def read() -> int:
        model = await contents.get(PATH, type="notebook")
        return len(model["content"]["cells"])

    edits = [bench.notebooks.edit(PATH, change) for _ in range(5)]
    reads = [read() for _ in range(20)]
    results = await asyncio.gather(*edits, *reads)

    assert results[5:] == [3] * 20
    assert not list(bench.file.parent.glob("*.invalid"))

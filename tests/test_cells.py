"""Cells of a notebook: folded from messages, merged into the file's content, from plain values."""

from __future__ import annotations

import json
from typing import Any

import nbformat
import pytest

from sorna_jupyter.cells import Cells, Execution, read_execution
from sorna_jupyter.protocol import Gap, KernelMessage

KERNEL_ID = "11111111-2222-4333-8444-555555555555"
CODE = "print('a')"


def execution(cell_id: str = "a", code: str = CODE, **more: Any) -> Execution:
    return Execution(f"msg-{cell_id}", cell_id, code, **{"since": 1, **more})


def message(
    msg_type: str, content: Any, cell_id: str = "a", channel: str = "iopub", seq: int = 1
) -> KernelMessage:
    header, parent = {"msg_type": msg_type}, {"msg_id": f"msg-{cell_id}"}
    parts = [json.dumps(part).encode() for part in (header, parent, {}, content)]
    return KernelMessage.of(KERNEL_ID, seq, "", channel, parts)


def status(state: str, cell_id: str = "a") -> KernelMessage:
    return message("status", {"execution_state": state}, cell_id)


def printed(text: str, cell_id: str = "a") -> KernelMessage:
    return message("stream", {"name": "stdout", "text": text}, cell_id)


def fold(cells: Cells, *messages: KernelMessage) -> Cells:
    for item in messages:
        cells.take(item)
    return cells


def one_cell(*messages: KernelMessage, **more: Any) -> Cells:
    return fold(Cells([execution(**more)], 1 << 20), *messages)


def notebook(**codes: str) -> Any:
    """With cells of these ids and codes."""
    cells = [nbformat.v4.new_code_cell(code, id=name) for name, code in codes.items()]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *cells])


def text(place: Any) -> list[str]:
    return [output["text"] for output in place["outputs"]]


# -- the request -----------------------------------------------------------------------------


def request(metadata: Any, content: Any) -> list[bytes]:
    return [json.dumps(part).encode() for part in ({"msg_id": "m"}, {}, metadata, content)]


def test_the_cell_is_what_jupyterlab_puts_into_the_metadata() -> None:
    parts = request({"deletedCells": [], "cellId": "c"}, {"code": "x", "silent": False})

    assert read_execution(parts, 7) == Execution("m", "c", "x", 7)


@pytest.mark.parametrize(
    ("metadata", "content"),
    [
        ({}, {"code": "x"}),
        ({"cellId": ""}, {"code": "x"}),
        ({"deeper": {"cellId": "c"}}, {"code": "x"}),
        ({"cellId": "c"}, {"code": "x", "silent": True}),
    ],
)
def test_other_requests_have_no_cell(metadata: Any, content: Any) -> None:
    assert read_execution(request(metadata, content), 1) is None


def test_a_malformed_request_is_an_error_that_can_be_caught() -> None:
    with pytest.raises(ValueError):
        read_execution([b"{}", b"{}", b'{"cellId": 1}', b"{}"], 1)


# -- folding ---------------------------------------------------------------------------------


def test_a_cell_shows_what_a_front_end_would() -> None:
    plot = {"data": {"image/png": "iVBORw0KGgo="}, "metadata": {}}
    cells = one_cell(
        status("busy"),
        message("execute_input", {"code": CODE, "execution_count": 4}),
        printed("a"),
        printed("b"),
        message("display_data", plot),
        status("idle"),
    )
    nb = notebook(a=CODE)

    assert cells.are_over
    assert cells.merge_into(nb, saved_at=0.0)
    place = nb.cells[1]
    assert place.execution_count == 4
    assert place.outputs == [
        {"output_type": "stream", "name": "stdout", "text": "ab"},
        {"output_type": "display_data", **plot},
    ]
    assert place.metadata.trusted
    nbformat.validate(nb)


def test_output_of_other_clients_is_not_the_cells() -> None:
    cells = one_cell(status("busy"), printed("mine"), printed("not mine", "b"), status("idle", "b"))
    nb = notebook(a=CODE)
    cells.merge_into(nb, 0.0)

    assert not cells.are_over
    assert text(nb.cells[1]) == ["mine"]


def test_a_cell_updates_the_display_of_another() -> None:
    shown = {"data": {"text/plain": "0 %"}, "transient": {"display_id": "d"}}
    updated = {"data": {"text/plain": "100 %"}, "transient": {"display_id": "d"}}
    cells = fold(
        Cells([execution("a"), execution("b")], 1 << 20),
        message("display_data", shown),
        message("update_display_data", updated, "b"),
    )
    nb = notebook(a=CODE, b=CODE)
    cells.merge_into(nb, 0.0)

    assert nb.cells[1].outputs[0]["data"] == {"text/plain": "100 %"}
    assert nb.cells[2].outputs == []


def test_a_pager_is_shown_below_the_cell_if_the_reply_comes() -> None:
    page = {"source": "page", "data": {"text/plain": "help"}, "start": 0}
    reply = {"status": "ok", "execution_count": 2, "payload": [page, {"source": "set_next_input"}]}
    cells = one_cell(status("busy"), message("execute_reply", reply, channel="shell"))
    nb = notebook(a=CODE)
    cells.merge_into(nb, 0.0)

    assert nb.cells[1].outputs[0]["data"] == {"text/plain": "help"}


def test_a_cell_that_was_aborted_is_empty_as_in_a_front_end() -> None:
    cells = one_cell(
        status("busy"),
        message("execute_reply", {"status": "aborted", "execution_count": 3}, channel="shell"),
        status("idle"),
    )
    nb = notebook(a=CODE)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="of an earlier execution")]
    nb.cells[1].execution_count = 1

    assert cells.merge_into(nb, 0.0)
    assert (nb.cells[1].outputs, nb.cells[1].execution_count) == ([], None)


def test_lost_messages_are_told_in_the_cell_that_runs() -> None:
    cells = fold(
        Cells([execution("a"), execution("b"), execution("c")], 1 << 20),
        status("busy", "a"),
        status("idle", "a"),
        status("busy", "b"),
    )
    cells.lose(Gap(KERNEL_ID, 4, 9, 1234, "more than 64 MiB"))
    nb = notebook(a=CODE, b=CODE, c=CODE)
    cells.merge_into(nb, 0.0)

    told = ["[6 of the kernel's messages are lost: more than 64 MiB]\n"]
    assert [text(place) for place in nb.cells[1:]] == [[], told, []]


def test_what_is_lost_before_anything_is_read_is_told_in_the_first_cell() -> None:
    cells = Cells([execution("a"), execution("b")], 1 << 20)
    cells.lose(Gap(KERNEL_ID, 1, 1, None, "the relay was away"))
    fold(cells, printed("rest"))
    nb = notebook(a=CODE, b=CODE)
    cells.merge_into(nb, 0.0)

    assert text(nb.cells[1]) == [
        "[some of the kernel's messages are lost: the relay was away]\n",
        "rest",
    ]


def test_a_cell_whose_end_may_be_lost_is_over_when_the_next_one_is_seen() -> None:
    cells = fold(Cells([execution("a"), execution("b")], 1 << 20), status("busy", "a"))
    cells.lose(Gap(KERNEL_ID, 2, 9, None, "the relay was away"))
    assert cells.are_doubtful

    fold(cells, status("busy", "b"))
    assert not cells.are_doubtful
    assert [cell.is_over for cell in cells] == [True, False]

    fold(cells, status("idle", "b"))
    assert cells.are_over


def test_the_kernels_end_is_told_where_it_ran_and_nowhere_else() -> None:
    cells = fold(Cells([execution("a"), execution("b")], 1 << 20), status("busy"), printed("x"))
    cells.end("The kernel was restarted")
    nb = notebook(a=CODE, b=CODE)
    nb.cells[2].outputs = [nbformat.v4.new_output("stream", text="old")]
    cells.merge_into(nb, 0.0)

    assert cells.are_over
    assert text(nb.cells[1]) == ["x", "[The kernel was restarted]\n"]
    assert text(nb.cells[2]) == ["old"]


@pytest.mark.parametrize("content", [[], {"name": 1}, "x"])
def test_what_is_no_message_is_an_error_that_can_be_caught(content: Any) -> None:
    with pytest.raises(ValueError):
        one_cell(message("stream", content))


# -- merging ---------------------------------------------------------------------------------


def test_merging_again_changes_nothing_until_there_is_more() -> None:
    cells = one_cell(status("busy"), printed("a"))
    nb = notebook(a=CODE)

    assert [cells.merge_into(nb, 0.0), cells.merge_into(nb, 1.0)] == [True, False]
    fold(cells, printed("b"))
    assert cells.merge_into(nb, 2.0)
    assert text(nb.cells[1]) == ["ab"]


def test_code_that_was_edited_meanwhile_stays_with_what_it_shows() -> None:
    cells = one_cell(status("busy"), printed("a"))
    nb = notebook(a="something_else()")

    assert not cells.merge_into(nb, 0.0)
    nb.cells[1].source = CODE
    assert not cells.merge_into(nb, 1.0), "edited once, it is left for good"
    assert [cell.why_unwritten for cell in cells] == ["its code is another now"]


def test_a_cell_that_nobody_saved_is_in_no_notebook() -> None:
    cells = one_cell(status("busy"), printed("a"))

    assert not cells.merge_into(notebook(b=CODE), 0.0)
    assert [cell.why_unwritten for cell in cells] == ["no notebook of this kernel has it"]


def test_a_cell_that_someone_else_executes_is_theirs() -> None:
    cells = one_cell(status("busy"), printed("a"))
    cells.leave("a", "it was executed again")

    assert not cells.merge_into(notebook(a=CODE), 0.0)


def test_a_cell_that_waits_keeps_what_it_shows() -> None:
    cells = one_cell()
    nb = notebook(a=CODE)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="old")]

    assert not cells.merge_into(nb, 0.0)


def test_answered_cells_are_written_unless_the_client_has_saved_them() -> None:
    executions = [execution("a", answered_at=10.0), execution("b", answered_at=20.0)]
    cells = fold(Cells(executions, 1 << 20), status("busy", "a"), printed("x", "a"))
    nb = notebook(a=CODE, b=CODE)

    assert not cells.merge_into(nb, saved_at=15.0)
    fold(cells, status("busy", "b"), printed("y", "b"))
    assert cells.merge_into(nb, saved_at=30.0), "it was we who saved since"
    assert [text(place) for place in nb.cells[1:]] == [[], ["y"]]


def test_a_file_without_ids_is_known_by_its_code_if_that_stands_there_once() -> None:
    cells = fold(
        Cells([execution("a", "once"), execution("b", "twice")], 1 << 20),
        *(printed("x", "a"), printed("y", "b")),
    )
    nb = notebook(a="once", b="twice", c="twice")
    for place in nb.cells:
        del place["id"]

    assert cells.merge_into(nb, 0.0)
    assert [text(place) for place in nb.cells[1:]] == [["x"], [], []]

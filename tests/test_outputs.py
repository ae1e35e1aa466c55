"""Folding a kernel's messages into outputs, from plain values."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import nbformat
import pytest
from nbformat.v4 import output_from_msg

from sorna_jupyter.outputs import Outputs, decode

MiB = 1 << 20

STREAM = {"name": "stdout", "text": "hello\n"}
PLOT = {
    "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
    "metadata": {"image/png": {"width": 640}},
}
RESULT = {
    "execution_count": 3,
    "data": {"text/plain": "42", "application/json": {"a": [1, None, 2.5]}},
    "metadata": {},
}
ERROR = {"ename": "ValueError", "evalue": "no", "traceback": ["\x1b[31mline\x1b[0m", "ValueError"]}


def fold(*messages: tuple[str, Any], max_bytes: int = MiB) -> tuple[Outputs, list[Any]]:
    """The outputs after these messages, and the changes in JSON's terms."""
    outputs = Outputs(max_bytes)
    changes = []
    for msg_type, content in messages:
        changes += outputs.apply(msg_type, json.dumps(content).encode())
    return outputs, msgspec.to_builtins(changes)


def as_notebook(outputs: Outputs) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.to_builtins(outputs.as_list())
    return found


def replay(changes: list[Any]) -> list[Any]:
    """What a client has that applies each change to its own list."""
    held: list[Any] = []
    for change in changes:
        match change["type"]:
            case "output":
                assert change["index"] == len(held)
                held.append(dict(change["output"]))
            case "append":
                assert held[change["index"]]["name"] == change["name"]
                held[change["index"]]["text"] += change["text"]
            case "replace":
                held[change["index"]] = change["output"]
            case "clear":
                held.clear()
    return held


def display(display_id: str, text: str) -> dict[str, Any]:
    data = {"text/plain": text}
    return {"data": data, "metadata": {}, "transient": {"display_id": display_id}}


@pytest.mark.parametrize(
    ("msg_type", "content"),
    [
        ("stream", STREAM),
        ("display_data", PLOT),
        ("execute_result", RESULT),
        ("error", ERROR),
        ("display_data", display("d", "x")),
    ],
)
def test_an_output_is_what_nbformat_makes_of_the_message(msg_type: str, content: Any) -> None:
    outputs, _ = fold((msg_type, content))

    expected = output_from_msg({"header": {"msg_type": msg_type}, "content": content})
    assert as_notebook(outputs) == [expected]


def test_all_outputs_together_are_a_valid_notebook_cell() -> None:
    outputs, _ = fold(
        ("stream", STREAM), ("display_data", PLOT), ("execute_result", RESULT), ("error", ERROR)
    )

    cell = nbformat.v4.new_code_cell("x", outputs=as_notebook(outputs))
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))


def test_text_of_one_stream_is_merged() -> None:
    outputs, changes = fold(
        ("stream", {"name": "stdout", "text": "a"}),
        ("stream", {"name": "stdout", "text": "b\n"}),
        ("stream", {"name": "stdout", "text": "c"}),
    )

    assert as_notebook(outputs) == [{"output_type": "stream", "name": "stdout", "text": "ab\nc"}]
    assert [change["type"] for change in changes] == ["output", "append", "append"]


def test_streams_that_alternate_keep_their_order() -> None:
    outputs, _ = fold(
        ("stream", {"name": "stdout", "text": "1"}),
        ("stream", {"name": "stderr", "text": "2"}),
        ("stream", {"name": "stdout", "text": "3"}),
    )

    assert [(o["name"], o["text"]) for o in as_notebook(outputs)] == [
        ("stdout", "1"),
        ("stderr", "2"),
        ("stdout", "3"),
    ]


def test_text_after_a_plot_stays_after_it() -> None:
    outputs, _ = fold(("stream", STREAM), ("display_data", PLOT), ("stream", STREAM))

    kinds = [o["output_type"] for o in as_notebook(outputs)]
    assert kinds == ["stream", "display_data", "stream"]


def test_clear_output_empties_the_list() -> None:
    outputs, changes = fold(("stream", STREAM), ("clear_output", {"wait": False}))

    assert as_notebook(outputs) == []
    assert changes[-1]["type"] == "clear"


def test_clear_output_that_waits_clears_with_the_next_output() -> None:
    outputs = Outputs(MiB)
    outputs.apply("stream", json.dumps(STREAM).encode())

    assert outputs.apply("clear_output", b'{"wait": true}') == []
    assert len(outputs.as_list()) == 1

    changes = msgspec.to_builtins(outputs.apply("stream", b'{"name": "stdout", "text": "new"}'))
    assert [change["type"] for change in changes] == ["clear", "output"]
    assert as_notebook(outputs) == [{"output_type": "stream", "name": "stdout", "text": "new"}]


def test_clearing_what_is_empty_is_no_change() -> None:
    assert fold(("clear_output", {"wait": False}))[1] == []


def test_an_update_replaces_every_display_of_its_id_and_no_other() -> None:
    outputs, changes = fold(
        ("display_data", display("a", "1")),
        ("display_data", display("b", "2")),
        ("display_data", display("a", "3")),
        ("update_display_data", display("a", "new")),
    )

    texts = [o["data"]["text/plain"] for o in as_notebook(outputs)]
    assert texts == ["new", "2", "new"]
    assert [(c["type"], c["index"]) for c in changes[-2:]] == [("replace", 0), ("replace", 2)]


def test_an_updated_result_keeps_its_execution_count() -> None:
    outputs, _ = fold(
        ("execute_result", {"execution_count": 7, **display("a", "1")}),
        ("update_display_data", display("a", "2")),
    )

    assert as_notebook(outputs) == [
        {
            "output_type": "execute_result",
            "execution_count": 7,
            "data": {"text/plain": "2"},
            "metadata": {},
        }
    ]


def test_an_update_of_a_display_that_was_cleared_is_nothing() -> None:
    outputs, _ = fold(
        ("display_data", display("a", "1")),
        ("clear_output", {"wait": False}),
        ("update_display_data", display("a", "2")),
    )

    assert as_notebook(outputs) == []
    assert not outputs.shows("a")


@pytest.mark.parametrize("msg_type", ["comm_msg", "status", "execute_input", "debug_event"])
def test_messages_that_are_no_output_change_nothing(msg_type: str) -> None:
    assert fold((msg_type, {"anything": 1}))[1] == []


def test_a_client_that_applies_the_changes_has_the_same_list() -> None:
    outputs, changes = fold(
        ("stream", STREAM),
        ("stream", {"name": "stdout", "text": "x" * 100}),
        ("display_data", display("a", "1")),
        ("execute_result", {"execution_count": 1, **display("b", "2")}),
        ("update_display_data", display("a", "1b")),
        ("clear_output", {"wait": True}),
        ("stream", {"name": "stderr", "text": "again"}),
        ("stream", {"name": "stderr", "text": " and again"}),
        ("display_data", display("a", "3")),
        ("update_display_data", display("a", "3b")),
        ("error", ERROR),
    )

    assert replay(changes) == as_notebook(outputs)


def test_too_much_output_is_left_out_and_the_last_output_says_so() -> None:
    line = ("stream", {"name": "stdout", "text": "x" * 100})
    outputs, changes = fold(*[line] * 50, ("display_data", PLOT), max_bytes=1000)

    first, last = as_notebook(outputs)
    assert outputs.truncated
    assert outputs.size <= 1000
    assert set(first["text"]) == {"x"}
    assert last["name"] == "stderr"
    assert "1000 bytes" in last["text"]
    assert replay(changes) == [first, last]


def test_a_cleared_list_has_room_again() -> None:
    big = ("stream", {"name": "stdout", "text": "x" * 2000})
    outputs, _ = fold(big, ("clear_output", {"wait": True}), ("stream", STREAM), max_bytes=1000)

    assert not outputs.truncated
    assert [o["text"] for o in as_notebook(outputs)] == ["hello\n"]


def test_an_update_that_is_too_big_does_not_grow_the_list() -> None:
    outputs, _ = fold(
        ("display_data", display("a", "1")),
        ("update_display_data", display("a", "x" * 2000)),
        max_bytes=1000,
    )

    assert outputs.truncated
    assert as_notebook(outputs)[0]["data"] == {"text/plain": "1"}


def test_a_million_parts_of_text_are_joined_once() -> None:
    outputs = Outputs(64 * MiB)
    part = b'{"name": "stdout", "text": "0123456789"}'
    for _ in range(100_000):
        outputs.apply("stream", part)

    (stream,) = as_notebook(outputs)
    assert len(stream["text"]) == 1_000_000


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"text": "half \\ud800 pair"}', "half \ufffd pair"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        (b'{"text": "raw \xff byte"}', "raw \ufffd byte"),
        (b'{"text": "\\u0000"}', "\0"),
    ],
)
def test_text_that_is_none_is_repaired_and_the_rest_kept(data: bytes, text: str) -> None:
    outputs = Outputs(MiB)

    outputs.apply("stream", data)

    assert as_notebook(outputs)[0]["text"] == text
    msgspec.json.encode(outputs.as_list())


def test_not_a_number_becomes_null() -> None:
    assert decode(b'{"a": NaN, "b": [Infinity, 1]}', dict[str, Any]) == {"a": None, "b": [None, 1]}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"nonsense", b'{"name": 1}', b'{"text": {}}', b'"x"', b"\xff\xfe"]
)
def test_content_that_is_no_output_is_refused(data: bytes) -> None:
    outputs = Outputs(MiB)

    with pytest.raises(ValueError):
        outputs.apply("stream", data)

    assert outputs.as_list() == []

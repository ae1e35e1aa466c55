"""Folds a kernel's messages into the outputs that a notebook would show. Pure: no I/O, no clock.

An output is exactly what nbformat 4 says. Each message changes the list; the change is returned as
events that someone who holds an older list can apply, so that a list and a stream of it agree.
Used by `run`.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# -- outputs, as in a notebook ---------------------------------------------------------------


class Stream(msgspec.Struct, tag_field="output_type", tag="stream"):
    name: str
    """`stdout` or `stderr`"""
    text: str


class DisplayData(msgspec.Struct, tag_field="output_type", tag="display_data"):
    data: dict[str, Any]
    """by MIME type"""
    metadata: dict[str, Any]


class ExecuteResult(msgspec.Struct, tag_field="output_type", tag="execute_result"):
    execution_count: int | None
    data: dict[str, Any]
    """by MIME type"""
    metadata: dict[str, Any]


class ErrorOutput(msgspec.Struct, tag_field="output_type", tag="error"):
    ename: str
    evalue: str
    traceback: list[str]


Output = Stream | DisplayData | ExecuteResult | ErrorOutput


# -- what happens to the list ----------------------------------------------------------------


class OutputAdded(msgspec.Struct, tag_field="type", tag="output"):
    """`output` is new, at `index`: the end of the list."""

    index: int
    output: Output
    seq: int = -1


class TextAppended(msgspec.Struct, tag_field="type", tag="append"):
    """The stream output at `index` got more `text`. `name`: which stream it is."""

    index: int
    name: str
    text: str
    seq: int = -1


class OutputReplaced(msgspec.Struct, tag_field="type", tag="replace"):
    """The output at `index` is now `output` (`update_display_data`)."""

    index: int
    output: Output
    seq: int = -1


class OutputsCleared(msgspec.Struct, tag_field="type", tag="clear"):
    """The list is empty now (`clear_output`; one that waits comes with what it waited for)."""

    seq: int = -1


Change = OutputAdded | TextAppended | OutputReplaced | OutputsCleared


# -- what kernels send -----------------------------------------------------------------------


class _StreamContent(msgspec.Struct):
    name: str = "stdout"
    text: str = ""


class _DisplayContent(msgspec.Struct):
    data: dict[str, Any] = {}
    metadata: dict[str, Any] | None = None
    transient: dict[str, Any] | None = None
    execution_count: int | None = None


class _ErrorContent(msgspec.Struct):
    ename: str = ""
    evalue: str = ""
    traceback: list[str] = []


class _ClearContent(msgspec.Struct):
    wait: bool = False


class _Text:
    """A stream output while it grows; joined when asked for: there may be a million parts."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.parts = [text]

    def output(self) -> Stream:
        self.parts = ["".join(self.parts)]
        return Stream(self.name, self.parts[0])


class Outputs:
    """One run's ordered outputs."""

    def __init__(self, max_bytes: int) -> None:
        """Keeps at most `max_bytes`; the rest is left out, and the last output says so."""
        self.max_bytes = max_bytes
        self.size = 0
        self.truncated = False
        self._items: list[_Text | Output] = []
        self._sizes: list[int] = []
        self._displays: dict[str, list[int]] = {}
        self._clear_before_next = False

    def as_list(self) -> list[Output]:
        return [item.output() if isinstance(item, _Text) else item for item in self._items]

    def shows(self, display_id: str) -> bool:
        return display_id in self._displays

    def apply(self, msg_type: str, content: bytes) -> list[Change]:
        """What an iopub message changes; nothing if it is of another kind.

        Raises `ValueError` for content that is not what the message type promises.
        """
        size = len(content)
        match msg_type:
            case "stream":
                stream = decode(content, _StreamContent)
                return self._append(stream.name, stream.text, size)
            case "display_data" | "execute_result":
                display = decode(content, _DisplayContent)
                metadata = display.metadata or {}
                if msg_type == "display_data":
                    output: Output = DisplayData(display.data, metadata)
                else:
                    output = ExecuteResult(display.execution_count, display.data, metadata)
                return self._add(output, size, _display_id(display))
            case "error":
                error = decode(content, _ErrorContent)
                return self._add(ErrorOutput(error.ename, error.evalue, error.traceback), size)
            case "update_display_data":
                return self._update(decode(content, _DisplayContent), size)
            case "clear_output":
                if decode(content, _ClearContent).wait:
                    self._clear_before_next = True
                    return []
                return self._clear()
        return []

    def add_page(self, data: dict[str, Any]) -> list[Change]:
        """What belongs into a pager (`print?`); JupyterLab too shows it as a display."""
        return self._add(DisplayData(data, {}), len(msgspec.json.encode(data)))

    # -- the four changes --------------------------------------------------------------------

    def _add(self, output: Output, size: int, display_id: str | None = None) -> list[Change]:
        changes = self._begin()
        if not self._has_room(size):
            return changes + self._truncate()
        if display_id is not None:
            self._displays.setdefault(display_id, []).append(len(self._items))
        item = _Text(output.name, output.text) if isinstance(output, Stream) else output
        self._items.append(item)
        self._sizes.append(size)
        self.size += size
        return [*changes, OutputAdded(len(self._items) - 1, output)]

    def _append(self, name: str, text: str, size: int) -> list[Change]:
        # Only to the last output: text that came after a plot stays after it.
        last = self._items[-1] if self._items and not self._clear_before_next else None
        if not isinstance(last, _Text) or last.name != name:
            return self._add(Stream(name, text), size)
        if not self._has_room(size):
            return self._truncate()
        last.parts.append(text)
        self._sizes[-1] += size
        self.size += size
        return [TextAppended(len(self._items) - 1, name, text)]

    def _update(self, display: _DisplayContent, size: int) -> list[Change]:
        changes: list[Change] = []
        for index in self._displays.get(_display_id(display) or "", ()):
            if not self._has_room(size - self._sizes[index]):
                return changes + self._truncate()
            output = self._items[index]
            metadata = display.metadata or {}
            if isinstance(output, ExecuteResult):
                output = ExecuteResult(output.execution_count, display.data, metadata)
            else:
                output = DisplayData(display.data, metadata)
            self._items[index] = output
            self.size += size - self._sizes[index]
            self._sizes[index] = size
            changes.append(OutputReplaced(index, output))
        return changes

    def _clear(self) -> list[Change]:
        self._clear_before_next = False
        had_some = bool(self._items)
        self._items.clear()
        self._sizes.clear()
        self._displays.clear()
        self.size = 0
        self.truncated = False
        return [OutputsCleared()] if had_some else []

    def _begin(self) -> list[Change]:
        return self._clear() if self._clear_before_next else []

    def _has_room(self, size: int) -> bool:
        return not self.truncated and self.size + size <= self.max_bytes

    def _truncate(self) -> list[Change]:
        if self.truncated:
            return []
        self.truncated = True
        note = f"\n[more than {self.max_bytes} bytes of output: the rest is left out]\n"
        self._items.append(_Text("stderr", note))
        self._sizes.append(len(note))
        return [OutputAdded(len(self._items) - 1, Stream("stderr", note))]


def _display_id(display: _DisplayContent) -> str | None:
    display_id = (display.transient or {}).get("display_id")
    return display_id if isinstance(display_id, str) else None


def decode(data: bytes, kind: type[T]) -> T:
    """`data`, JSON that a kernel wrote, as a `kind`. Raises `ValueError`.

    A kernel that prints half a surrogate pair or a file's raw bytes writes JSON that is none;
    then what can't be text becomes U+FFFD.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(_repair(data), type=kind)


def _repair(data: bytes) -> bytes:
    value = json.loads(data.decode("utf-8", "replace"), parse_constant=lambda name: None)
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

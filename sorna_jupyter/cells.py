"""Notebook cells as the kernel executed them, and how their outputs go into the notebook. No I/O.

The kernel's messages are folded into outputs as a run's are (`outputs`); `Cells.merge_into` puts
them where a front-end would have put them. Used by `unattended`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from sorna_jupyter.outputs import Outputs, decode
from sorna_jupyter.protocol import Gap, Header, KernelMessage, Status


@dataclass
class Execution:
    """A front-end's request to execute a cell."""

    msg_id: str
    cell_id: str
    code: str
    since: int
    """no message before this number can be of it"""
    answered_at: float | None = None
    """Unix time at which its client got the answer, and so all of its outputs"""


class _Metadata(msgspec.Struct):
    cell_id: str = msgspec.field(name="cellId", default="")


class _Request(msgspec.Struct):
    code: str = ""
    silent: bool = False


def read_execution(parts: list[bytes], since: int) -> Execution | None:
    """The cell in an `execute_request`, if a cell is in it.

    JupyterLab and Notebook name it in the metadata. Raises `ValueError` for what is no request.
    """
    if b'"cellId"' not in parts[2]:
        return None
    cell_id = decode(parts[2], _Metadata).cell_id
    request = decode(parts[3], _Request)
    if not cell_id or request.silent:
        return None
    return Execution(decode(parts[0], Header).msg_id, cell_id, request.code, since)


class Cell:
    """What one execution of a cell has put out so far."""

    def __init__(self, execution: Execution, max_bytes: int) -> None:
        self.execution = execution
        self.outputs = Outputs(max_bytes)
        self.execution_count: int | None = None
        self.has_begun = False
        self.is_over = False
        self.is_doubtful = False
        """whether its end may be among messages that are lost"""
        self.was_found = False
        """whether its place in the notebook was looked at already"""
        self.left = ""
        """why its place in the notebook is left as it is; empty: it is not"""

    @property
    def goes_on(self) -> bool:
        return self.has_begun and not self.is_over

    @property
    def why_unwritten(self) -> str:
        """Empty if it stands in a notebook."""
        return self.left if self.was_found else "no notebook of this kernel has it"

    def say(self, text: str) -> None:
        """A note of ours among its outputs."""
        self.outputs.apply("stream", msgspec.json.encode({"name": "stderr", "text": text}))

    def put_into(self, place: dict[str, Any]) -> bool:
        """Make the notebook's cell `place` show it; returns whether that is a change."""
        outputs = msgspec.to_builtins(self.outputs.as_list())
        if (place["outputs"], place["execution_count"]) == (outputs, self.execution_count):
            return False
        place["outputs"], place["execution_count"] = outputs, self.execution_count
        # As a front-end does: whoever executed a cell trusts what it shows.
        place["metadata"]["trusted"] = True
        return True


class Cells:
    """The cells of one client session."""

    def __init__(self, executions: Iterable[Execution], max_bytes: int) -> None:
        """`max_bytes`: of one cell's outputs."""
        self._cells = {e.msg_id: Cell(e, max_bytes) for e in executions}

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells.values())

    @property
    def since(self) -> int:
        """The number of the first message that may be of one of them."""
        return min(cell.execution.since for cell in self)

    @property
    def are_over(self) -> bool:
        return all(cell.is_over for cell in self)

    @property
    def are_doubtful(self) -> bool:
        """Whether all that are not over may be so, unseen."""
        return all(cell.is_over or cell.is_doubtful for cell in self)

    # -- what the kernel says

    def take(self, message: KernelMessage) -> None:
        """Raises `ValueError` for what is no message."""
        header, content = decode(message.parts[0], Header), message.parts[3]
        if header.msg_type == "update_display_data":
            self._update_display(content)
            return
        cell = self._cells.get(decode(message.parts[1], Header).msg_id)
        if cell is None:
            return
        self._clear_doubts(cell)
        match header.msg_type:
            case "status":
                cell.has_begun = True
                cell.is_over |= decode(content, Status).execution_state == "idle"
            case "execute_input" | "execute_reply":
                self._take_count(cell, decode(content, _Counted))
            case _ if message.channel == "iopub":
                cell.has_begun = True
                cell.outputs.apply(header.msg_type, content)

    def _take_count(self, cell: Cell, content: _Counted) -> None:
        if content.status != "aborted" and content.execution_count is not None:
            cell.execution_count = content.execution_count
        for payload in content.payload or ():
            if payload.get("source") == "page" and isinstance(payload.get("data"), dict):
                cell.outputs.add_page(payload["data"])

    def _update_display(self, content: bytes) -> None:
        for cell in self:
            cell.outputs.apply("update_display_data", content)

    def _clear_doubts(self, seen: Cell) -> None:
        """One cell at a time: what was executed before one that is seen is over."""
        seen.is_doubtful = False
        for cell in self:
            if cell is seen:
                return
            cell.is_over |= cell.is_doubtful

    def lose(self, gap: Gap) -> None:
        """Messages are lost; whoever goes on, or may have begun with them, says so."""
        running = [cell for cell in self if cell.goes_on]
        waiting = [cell for cell in self if not cell.has_begun and not cell.is_over]
        for cell in running + waiting:
            cell.is_doubtful = True
        count = "some" if gap.messages is None else str(gap.messages)
        for cell in running or waiting[:1]:
            cell.say(f"[{count} of the kernel's messages are lost: {gap.reason}]\n")

    def end(self, reason: str) -> None:
        """Nothing more will come. `reason`: empty if nobody need be told."""
        for cell in self:
            if cell.goes_on and reason:
                cell.say(f"[{reason}]\n")
            cell.is_over = True

    # -- into the notebook

    def leave(self, cell_id: str, why: str) -> None:
        """Someone else looks after that cell now."""
        for cell in self:
            if cell.execution.cell_id == cell_id and not cell.left:
                cell.left = why

    def merge_into(self, notebook: dict[str, Any], saved_at: float) -> bool:
        """Put what the cells show into a notebook that was saved at `saved_at` (Unix time).

        Never over what someone did meanwhile. Returns whether the notebook is another now.
        """
        changed = False
        for cell in self:
            place = None if cell.left else _find_place(notebook, cell.execution)
            if place is None:
                continue
            cell.left = _why_not(cell, place, saved_at)
            cell.was_found = True
            if cell.has_begun and not cell.left:
                changed |= cell.put_into(place)
        return changed


class _Counted(msgspec.Struct):
    """What `execute_input` and `execute_reply` have in common, and the latter's more."""

    status: str = "ok"
    execution_count: int | None = None
    payload: list[dict[str, Any]] | None = None


def _find_place(notebook: dict[str, Any], execution: Execution) -> dict[str, Any] | None:
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in codes:
        if cell.get("id") == execution.cell_id:
            found: dict[str, Any] = cell
            return found
    # Before nbformat 4.5, cells have no ids in the file; front-ends make some up.
    same = [cell for cell in codes if "id" not in cell and cell["source"] == execution.code]
    return same[0] if len(same) == 1 else None


def _why_not(cell: Cell, place: dict[str, Any], saved_at: float) -> str:
    """Why this place is not to be written to; empty if it is."""
    if place["source"] != cell.execution.code:
        return "its code is another now"
    answered_at = cell.execution.answered_at
    if not cell.was_found and answered_at is not None and saved_at >= answered_at:
        return "its client saved it"
    return ""

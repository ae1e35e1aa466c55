"""A gateway's cursor in a kernel's journal, when its connection was cut: the test is the relay."""

from __future__ import annotations

from typing import Any

import pytest

from sorna_jupyter.cursors import Cursor
from sorna_jupyter.protocol import Batch, Gap, make_message, pack_record

RECORD = pack_record(0, 0, b"", make_message("stream", {}))


class Link:
    """Remembers what the cursor asks for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def new_name(self) -> bytes:
        return b"c1"

    def subscribe(self, cursor: Cursor) -> None:
        self.asked.append(cursor.next)

    def credit(self, cursor: Cursor, size: int) -> None: ...


class Reader:
    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.gaps: list[tuple[int, int]] = []

    def on_batch(self, batch: Batch) -> None:
        self.numbers += [message.seq for message in batch.messages]

    def on_gap(self, gap: Gap) -> None:
        self.gaps.append((gap.first, gap.last))


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def cursor(reader: Reader) -> Cursor:
    cursor = Cursor(Link(), "k1", 5, reader, 1000)  # type: ignore[arg-type]  # all that it needs
    cursor.take(5, 20, [RECORD] * 2)
    return cursor


def test_what_comes_behind_a_hole_is_not_taken_but_asked_for_again(cursor: Cursor, reader: Reader):
    cursor.take(9, 20, [RECORD] * 2)
    cursor.lose(11, 12, 100)
    assert cursor.request()[3:4] == [(7).to_bytes(8, "big")]

    cursor.take(7, 20, [RECORD] * 4)
    cursor.lose(11, 12, 100)

    assert reader.numbers == [5, 6, 7, 8, 9, 10]
    assert reader.gaps == [(11, 12)]


def test_what_comes_again_is_not_told_again(cursor: Cursor, reader: Reader):
    cursor.lose(7, 12, 100)

    cursor.take(5, 20, [RECORD] * 2)
    cursor.lose(7, 12, 100)
    cursor.take(13, 20, [RECORD])

    assert reader.numbers == [5, 6, 13]
    assert reader.gaps == [(7, 12)]

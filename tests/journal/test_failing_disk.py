"""A disk that is full, read-only or away."""

import logging
import os
from pathlib import Path

import pytest

from sorna_agent.journal import HEADER_SIZE, SEGMENTS, Journal
from tests.disks import fill as fill_disk
from tests.journal.parts import (
    MEMORY,
    RETENTION,
    contents,
    crashed,
    file_size_limit,
    fill,
    numbered,
    segments_of,
)


def test_a_full_disk_costs_history_but_no_record_that_is_in_memory(
    little_disk: Path, caplog: pytest.LogCaptureFixture
):
    (little_disk / "others").write_bytes(b"x" * (40 << 10))
    journal = Journal(little_disk / "kernel", memory=MEMORY, retention=RETENTION * 4)

    while journal.on_disk:
        fill(journal, journal.last + 5)
        assert journal.last < 1000
    kept, last = journal.first, journal.last

    assert 1 < kept < last  # what memory did not hold is gone, and said so
    assert journal.dropped(1) == (kept - 1, 96 * (kept - 1))
    assert contents(journal) == numbered(kept, last)
    assert segments_of(little_disk / "kernel") == []
    fill(journal, last + 50)
    with (little_disk / "others").open("ab", buffering=0) as others:
        assert others.write(b"x" * (100 << 10)) < 100 << 10  # all that the journal had freed
    journal.sweep(1000)
    fill(journal, last + 100)
    assert not journal.on_disk
    assert contents(journal) == numbered(kept, last + 100)
    messages = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert ["No space left" in r.getMessage() for r in messages] == [True]

    (little_disk / "others").unlink()
    journal.sweep(1000)
    assert journal.on_disk
    fill(journal, last + 110)
    assert contents(journal) == numbered(kept, last + 110)
    assert journal._recent_size <= MEMORY
    copy = crashed(journal, little_disk / "kernel")
    again = Journal(copy)
    assert contents(again) == numbered(kept, last + 110)
    assert again.dropped(1) == (kept - 1, 96 * (kept - 1))
    again.close()


def test_a_disk_that_fails_when_a_segment_is_full_confuses_no_numbers(little_disk: Path):
    journal = Journal(little_disk / "kernel", memory=MEMORY, retention=SEGMENTS * 16_000)
    fill(journal, 60)
    fill_disk(little_disk / "others")

    while journal.on_disk:  # what is written is so because a segment is full
        journal.append(*numbered(journal.next, journal.next))
    for last in range(journal.next, 2000):
        fill(journal, last)

        assert contents(journal) == numbered(journal.first, last)
        assert journal.dropped(1) == (journal.first - 1, 96 * (journal.first - 1))
    assert journal.first > 1000
    (little_disk / "others").unlink()
    journal.close()


def test_in_memory_alone_it_keeps_to_its_retention(tmp_path: Path):
    with file_size_limit(1000):
        journal = Journal(tmp_path, retention=RETENTION, memory=MEMORY)
        fill(journal, 1000)
        journal.sweep(1000)
        fill(journal, 2000)

    assert not journal.on_disk
    assert RETENTION * 7 / 8 - 200 < journal.size <= RETENTION
    assert contents(journal) == numbered(journal.first, 2000)
    assert segments_of(tmp_path) == []
    journal.sweep(1000)
    assert journal.on_disk
    assert contents(journal) == numbered(journal.first, 2000)
    journal.close()


def test_a_disk_that_fails_half_way_through_the_return_loses_nothing(tmp_path: Path):
    journal = Journal(tmp_path, retention=RETENTION, memory=MEMORY)
    with file_size_limit(0):
        fill(journal, 50)
    for limit in (0, HEADER_SIZE, 500, 1500, RETENTION // SEGMENTS + 500):
        with file_size_limit(limit):
            journal.sweep(1000)
            fill(journal, journal.last + 10)
        assert contents(journal) == numbered(1, journal.last)

    journal.sweep(1000)

    assert journal.on_disk
    assert contents(journal) == numbered(1, journal.last)
    journal.close()


def test_a_directory_that_cannot_be_made_leaves_memory(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")

    journal = Journal(tmp_path / "file" / "kernel", first=5)
    fill(journal, 10)

    assert not journal.on_disk
    assert contents(journal) == numbered(5, 10)
    (tmp_path / "file").unlink()
    journal.sweep(1000)
    assert journal.on_disk
    journal.close()
    again = Journal(tmp_path / "file" / "kernel")
    assert contents(again) == numbered(5, 10)
    again.close()


def test_a_file_that_someone_truncates_is_a_gap_and_not_an_error(tmp_path: Path):
    journal = Journal(tmp_path, memory=MEMORY)
    fill(journal, 180)
    fill(journal, 200)
    os.truncate(segments_of(tmp_path)[0], 1000)

    assert journal.read_from(100, 1000) == []

    assert not journal.on_disk
    assert 100 < journal.first < 200
    assert contents(journal) == numbered(journal.first, 200)
    assert journal.dropped(100) == (journal.first - 100, 96 * (journal.first - 100))
    journal.close()

"""What a journal promises, on disk and in memory alone."""

import os
from pathlib import Path

import pytest

from sorna_agent.journal import OVERHEAD, SEGMENTS, Journal
from tests.journal.parts import (
    MEMORY,
    RETENTION,
    Clock,
    contents,
    crashed,
    fill,
    numbered,
    segments_of,
    size_of,
)

# -- plain contract --------------------------------------------------------------------------


def test_an_empty_journal_has_nothing_and_its_next_number_is_one(directory: Path | None):
    journal = Journal(directory)

    assert (journal.first, journal.last, journal.next, journal.size) == (1, 0, 1, 0)
    assert not journal.was_recovered
    assert journal.read_from(1, 1000) == []
    with pytest.raises(IndexError):
        journal.read(1)
    journal.close()


def test_numbers_begin_where_one_says_and_have_no_holes(directory: Path | None):
    journal = Journal(directory, first=500)

    numbers = [journal.append(b"%d" % i) for i in range(3)]

    assert numbers == [500, 501, 502]
    assert [journal.read(number) for number in numbers] == [b"0", b"1", b"2"]
    for beyond in (0, 499, 503, -1):
        with pytest.raises(IndexError):
            journal.read(beyond)
    journal.close()


def test_the_oldest_go_when_there_are_more_bytes_than_it_may_keep(directory: Path | None):
    journal = Journal(directory, retention=RETENTION, memory=MEMORY)

    fill(journal, 1000)

    assert RETENTION * 7 / 8 - 200 < journal.size <= RETENTION
    assert contents(journal) == numbered(journal.first, 1000, 100)
    assert journal.size == size_of(contents(journal))
    with pytest.raises(IndexError):
        journal.read(journal.first - 1)
    with pytest.raises(IndexError):
        journal.read_from(journal.first - 1, 1000)
    journal.close()


def test_one_record_that_is_too_big_is_kept_until_the_next_comes(directory: Path | None):
    journal = Journal(directory, retention=1000, memory=100)

    journal.append(b"small")
    journal.append(b"x" * 5000)

    assert journal.last == 2
    assert journal.read(2) == b"x" * 5000
    journal.append(b"small")
    assert (journal.first, journal.last) == (3, 3)
    journal.close()


def test_a_batch_has_at_least_one_record_and_no_more_bytes_or_records_than_asked(tmp_path: Path):
    journal = Journal(tmp_path, memory=MEMORY)
    fill(journal, 100, size=120)

    for start in (1, 98):  # on disk, in memory
        assert journal.read_from(start, 0) == numbered(start, start, 120)
        assert journal.read_from(start, 10_000, 2) == numbered(start, start + 1, 120)
        assert journal.read_from(start, 270, 500) == numbered(start, start + 1, 120)
    assert len(journal.read_from(1, 1 << 20, 77)) == 77
    journal.close()


def test_a_closed_journal_goes_on_with_its_numbers(tmp_path: Path):
    journal = Journal(tmp_path / "kernel", retention=RETENTION, memory=MEMORY)
    fill(journal, 1000)
    first = journal.first
    journal.close()

    again = Journal(tmp_path / "kernel", retention=RETENTION, memory=MEMORY, first=7)

    assert again.was_recovered
    assert (again.first, again.last) == (first, 1000)
    assert contents(again) == numbered(first, 1000)
    fill(again, 1300)
    assert contents(again) == numbered(again.first, 1300)
    again.close()


def test_records_larger_than_one_write_takes_and_many_small_ones(tmp_path: Path):
    records = [b"x" * (300 << 10), *[b"", b"y"] * 3000, b"z" * (300 << 10)]
    journal = Journal(tmp_path / "kernel", memory=0)

    for record in records:
        journal.append(record)
    journal.flush()

    journal.append(b"")  # lets go of what is in memory
    assert [journal.read(seq) for seq in range(1, len(records) + 1)] == records
    copy = crashed(journal, tmp_path / "kernel")
    again = Journal(copy)
    assert contents(again) == records
    again.close()


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pwritev = os.pwritev

    def write_little(fd, buffers, position):
        start = b"".join(buffers)[:1001]
        return pwritev(fd, [start], position)

    monkeypatch.setattr(os, "pwritev", write_little)
    records = [b"%d" % i * 1000 for i in range(10)] + [b"x" * (300 << 10), b"", b"y" * 5]
    journal = Journal(tmp_path, memory=0)

    for record in records:
        journal.append(record)
    journal.close()

    monkeypatch.undo()
    again = Journal(tmp_path)
    assert contents(again) == records
    again.close()


def test_only_the_owner_may_read_and_removing_leaves_nothing(tmp_path: Path):
    directory = tmp_path / "kernel"
    journal = Journal(directory)
    fill(journal, 3)

    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in segments_of(directory)] == [0o600]
    journal.remove()
    assert not directory.exists()


def test_a_long_life_costs_no_more_than_a_short_one(tmp_path: Path):
    descriptors = len(os.listdir("/proc/self/fd"))
    journal = Journal(tmp_path, retention=RETENTION, memory=MEMORY)

    for _ in range(100):
        fill(journal, journal.last + 200)

    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= RETENTION
    assert journal._recent_size <= MEMORY
    assert len(journal._recent) <= MEMORY // OVERHEAD
    assert len(os.listdir("/proc/self/fd")) - descriptors <= SEGMENTS + 2
    assert len(journal._gone) <= 4 * SEGMENTS
    journal.remove()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_was_dropped_is_counted_as_long_as_its_sizes_are_known(tmp_path: Path):
    journal = Journal(tmp_path, retention=RETENTION, memory=MEMORY, first=10)
    fill(journal, 1000)
    first = journal.first

    assert journal.dropped(first) == journal.dropped(2000) == (0, 0)
    assert journal.dropped(10) == (first - 10, 96 * (first - 10))
    assert journal.dropped(first - 30) == (30, 96 * 30)
    assert journal.dropped(0) == (first - 1, 0)  # before the journal's own time
    journal.close()

    again = Journal(tmp_path, retention=RETENTION, memory=MEMORY)
    assert again.dropped(10) == (first - 10, 96 * (first - 10))
    assert again.dropped(first - 30) == (30, 0)
    again.close()


def test_bounds_that_are_set_anew_hold_at_once(directory: Path | None):
    journal = Journal(directory, retention=8 * RETENTION, memory=RETENTION)
    fill(journal, 2000)

    journal.retention = RETENTION
    journal.memory = MEMORY

    # The newest segment is one of the old size, and of no use any more if it is above the new one.
    assert journal.size <= RETENTION
    assert contents(journal) == numbered(journal.first, 2000)
    assert directory is None or journal._recent_size <= MEMORY
    fill(journal, 3000)
    assert RETENTION * 7 / 8 - 200 < journal.size <= RETENTION
    assert contents(journal) == numbered(journal.first, 3000)

    journal.retention = 8 * RETENTION
    fill(journal, 8000)
    assert 8 * RETENTION * 7 / 8 - 200 < journal.size <= 8 * RETENTION
    assert contents(journal) == numbered(journal.first, 8000)
    journal.close()


# -- age -------------------------------------------------------------------------------------


def test_what_is_too_old_goes_even_while_new_records_come(directory: Path | None):
    clock = Clock()
    journal = Journal(directory, max_age=800, clock=clock)

    for _ in range(300):
        clock.now += 10
        fill(journal, journal.last + 1)
        journal.sweep(clock.now)

    assert 80 <= journal.last - journal.first + 1 <= 91
    assert contents(journal) == numbered(journal.first, 300)
    journal.close()


def test_a_journal_of_which_all_is_too_old_keeps_its_numbers(tmp_path: Path):
    clock = Clock()
    journal = Journal(tmp_path, max_age=800, clock=clock)
    fill(journal, 20)

    journal.sweep(clock.now + 799)
    assert journal.first == 1
    journal.sweep(clock.now + 801)

    assert (journal.first, journal.last, journal.size) == (21, 20, 0)
    assert journal.dropped(1) == (20, 20 * 96)
    journal.close()
    again = Journal(tmp_path)
    assert again.was_recovered
    assert again.append(b"next") == 21
    again.close()

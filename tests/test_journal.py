"""The journal against a model, a plain list; its files against everything that cuts them."""

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sorna_agent.journal import HEADER_SIZE, OVERHEAD, RECORD, SEGMENTS, Journal

RETENTION = 16 << 10
MEMORY = 2 << 10


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def size_of(records: list[bytes]) -> int:
    return sum(len(record) + OVERHEAD for record in records)


def contents(journal: Journal) -> list[bytes]:
    records: list[bytes] = []
    while journal.first + len(records) <= journal.last:
        batch = journal.read_from(journal.first + len(records), 1000, 7)
        assert batch
        records += batch
    return records


def numbered(first: int, last: int, size: int = 100) -> list[bytes]:
    return [b"%06d" % seq * (size // 6) for seq in range(first, last + 1)]


def fill(journal: Journal, last: int, size: int = 100) -> None:
    for record in numbered(journal.next, last, size):
        journal.append(record)
    journal.flush()


def segments_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))


def crashed(journal: Journal, directory: Path) -> Path:
    """The files as they lie there now, without what the process might still write."""
    copy = Path(tempfile.mkdtemp(prefix="crashed-", dir=directory.parent))
    shutil.copytree(directory, copy, dirs_exist_ok=True)
    journal.close()
    return copy


# -- plain contract ------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "kernel" if request.param == "disk" else None


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


# -- age -----------------------------------------------------------------------------------------


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


# -- recovery ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[bytes]]:
    directory = tmp_path_factory.mktemp("journal") / "kernel"
    journal = Journal(directory)
    records = [b"", b"one", b"x" * 40, b"", b"last words"]
    for record in records:
        journal.append(record)
    journal.close()
    return segments_of(directory)[0].read_bytes(), records


def recover(directory: Path, data: bytes) -> Journal:
    for path in segments_of(directory):
        path.unlink()
    (directory / f"{1:020}.journal").write_bytes(data)
    return Journal(directory)


def whole_records(records: list[bytes], size: int) -> list[bytes]:
    """Of those written one after the other, how many end within `size` bytes of the file."""
    kept, end = [], HEADER_SIZE
    for record in records:
        end += RECORD.size + len(record)
        if end > size:
            break
        kept.append(record)
    return kept


def assert_goes_on(directory: Path, journal: Journal, records: list[bytes]) -> None:
    """It has these, takes more, and so does the next one."""
    assert contents(journal) == records
    journal.append(b"after the crash")
    journal.close()
    again = Journal(directory)
    assert contents(again) == [*records, b"after the crash"]
    assert again.first == 1
    again.close()


def test_a_file_cut_at_any_byte_has_the_records_that_are_whole(small_file, tmp_path: Path):
    data, records = small_file

    for size in range(len(data) + 1):
        journal = recover(tmp_path, data[:size])

        assert journal.was_recovered == (size >= HEADER_SIZE)
        assert_goes_on(tmp_path, journal, whole_records(records, size))


def test_a_bit_flipped_anywhere_is_never_read(small_file, tmp_path: Path):
    data, records = small_file

    for position in range(len(data)):
        for bit in (0, 7):
            spoilt = bytearray(data)
            spoilt[position] ^= 1 << bit
            journal = recover(tmp_path, bytes(spoilt))

            expected = whole_records(records, position) if position >= HEADER_SIZE else []
            assert contents(journal) == expected
            journal.close()


@given(garbage=st.binary(min_size=1, max_size=200) | st.integers(1, 200).map(bytes))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_after_the_last_record_is_cut_off(small_file, tmp_path: Path, garbage: bytes):
    data, records = small_file

    assert_goes_on(tmp_path, recover(tmp_path, data + garbage), records)


def full_directory(tmp_path: Path) -> tuple[Path, list[Path]]:
    directory = tmp_path / "kernel"
    journal = Journal(directory, retention=RETENTION)
    fill(journal, 1000)
    journal.close()
    return directory, segments_of(directory)


def first_of(path: Path) -> int:
    return int(path.stem)


@pytest.mark.parametrize("fate", ["missing", "empty", "header spoilt", "short of a record"])
def test_only_the_newest_segments_in_a_row_are_kept(tmp_path: Path, fate: str):
    directory, paths = full_directory(tmp_path)
    victim = paths[3]
    match fate:
        case "missing":
            victim.unlink()
        case "empty":
            victim.write_bytes(b"")
        case "header spoilt":
            victim.write_bytes(b"S" + victim.read_bytes()[1:])
        case "short of a record":
            victim.write_bytes(victim.read_bytes()[:-1])

    journal = Journal(directory, retention=RETENTION)

    assert (journal.first, journal.last) == (first_of(paths[4]), 1000)
    assert contents(journal) == numbered(journal.first, 1000)
    assert segments_of(directory) == paths[4:]
    journal.close()


def test_a_segment_that_was_only_just_begun_costs_nothing(tmp_path: Path):
    directory, paths = full_directory(tmp_path)
    (directory / f"{1001:020}.journal").write_bytes(b"sorn")
    (directory / "someone's.journal").write_bytes(b"else")
    (directory / f"{2000:020}.journal").write_bytes(paths[-1].read_bytes())  # a wrong name

    journal = Journal(directory, retention=RETENTION)

    assert (journal.first, journal.next) == (first_of(paths[0]), 1001)
    assert segments_of(directory) == paths
    journal.close()


def test_a_process_killed_while_it_writes_leaves_what_it_had_flushed(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from sorna_agent.journal import Journal\n"
        f"journal = Journal(Path({str(tmp_path / 'kernel')!r}), retention=1 << 20)\n"
        "while True:\n"
        "    for _ in range(50): last = journal.append(b'%06d' % journal.next * 16)\n"
        "    journal.flush(); print(last, flush=True)\n"
    )
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(100):
                said = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split("\n")[:-1]
            said = int(rest[-1]) if rest else said

        journal = Journal(tmp_path / "kernel", retention=1 << 20)
        assert journal.last >= said
        assert contents(journal) == numbered(journal.first, journal.last)
        journal.close()


# -- a disk that fails ---------------------------------------------------------------------------


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


# -- against the model ---------------------------------------------------------------------------

RECORDS = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 600).map(lambda size: b"r" * size),
    st.sampled_from([3000, 20_000]).map(lambda size: b"R" * size),
)


class JournalMachine(RuleBasedStateMachine):
    """Whatever is done to it, a journal has the model's records from its `first` on."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="journal-"))
        self.clock = Clock()

    @initialize(
        retention=st.sampled_from([500, 4000, RETENTION]),
        memory=st.sampled_from([0, 300, MEMORY, 1 << 20]),
        first=st.sampled_from([1, 40]),
    )
    def open(self, retention: int, memory: int, first: int) -> None:
        self.retention, self.memory, self.base = retention, memory, first
        self.directory = self.root / "kernel"
        self.model: list[bytes] = []  # all ever appended, from the base on
        self.flushed = 0
        self.biggest_part = 0
        self.journal = self.make()
        self.seen_first = first

    def make(self) -> Journal:
        return Journal(
            self.directory,
            retention=self.retention,
            memory=self.memory,
            first=self.base,
            max_age=800,
            clock=self.clock,
        )

    def reopen(self) -> None:
        for path in segments_of(self.directory):
            os.utime(path, (self.clock.now, self.clock.now))
        self.journal = self.make()

    @rule(records=st.lists(RECORDS, max_size=20))
    def append(self, records: list[bytes]) -> None:
        for record in records:
            self.model.append(record)
            assert self.journal.append(record) == self.base + len(self.model) - 1
            assert self.journal.read(self.journal.last) == record

    @rule()
    def flush(self) -> None:
        self.journal.flush()
        self.flushed = len(self.model)

    @rule(seconds=st.sampled_from([1, 150, 900]))
    def sweep(self, seconds: int) -> None:
        self.clock.now += seconds
        self.journal.sweep(self.clock.now)

    @rule()
    def close_and_open(self) -> None:
        self.journal.close()
        self.flushed = len(self.model)
        self.reopen()
        assert self.journal.was_recovered

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """The newest file may end anywhere within what it got since the last flush, or before."""
        files = crashed(self.journal, self.directory)
        shutil.rmtree(self.directory)
        files.rename(self.directory)
        newest = segments_of(self.directory)[-1]
        size = newest.stat().st_size
        cut = data.draw(st.just(size) | st.integers(0, size), label="cut")
        os.truncate(newest, cut)
        self.reopen()
        if cut == size:
            assert self.journal.last >= self.base + self.flushed - 1
        if not self.journal.was_recovered:
            # The only file's header was cut: what knows the numbers would say where to go on.
            assert cut < HEADER_SIZE
            self.model, self.seen_first = [], self.base
        del self.model[self.journal.next - self.base :]
        self.flushed = len(self.model)

    @rule()
    def fail(self) -> None:
        with file_size_limit(0):
            self.journal.append(b"too much")
            self.journal.flush()
        self.model.append(b"too much")
        assert not self.journal.on_disk
        assert segments_of(self.directory) == []

        self.journal.sweep(self.clock.now)
        self.flushed = len(self.model)
        assert self.journal.on_disk

    @precondition(lambda self: self.journal.last >= self.journal.first)
    @rule(data=st.data(), max_bytes=st.integers(0, 5000), max_count=st.integers(1, 30))
    def resume(self, data: st.DataObject, max_bytes: int, max_count: int) -> None:
        seq = data.draw(st.integers(self.journal.first, self.journal.last), label="seq")

        records = self.journal.read_from(seq, max_bytes, max_count)

        start = seq - self.base
        assert records == self.model[start : start + len(records)]
        assert 1 <= len(records) <= max_count
        assert len(records) == 1 or sum(map(len, records)) <= max_bytes

    @rule(
        retention=st.sampled_from([500, 4000, RETENTION]),
        memory=st.sampled_from([0, 300, MEMORY, 1 << 20]),
    )
    def set_bounds(self, retention: int, memory: int) -> None:
        self.biggest_part = max(self.biggest_part, self.retention // SEGMENTS)
        self.retention, self.memory = retention, memory
        self.journal.retention, self.journal.memory = retention, memory

    @rule(data=st.data())
    def ask_what_was_dropped(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(self.base, self.journal.next), label="start")

        messages, size = self.journal.dropped(start)

        assert messages == max(self.journal.first - start, 0)
        gone = self.model[start - self.base : self.journal.first - self.base]
        is_exact = size == sum(map(len, gone))
        assert is_exact or (size == 0 and start != self.base)

    @invariant()
    def it_has_the_newest_of_the_model(self) -> None:
        journal = self.journal
        assert journal.next == self.base + len(self.model)
        assert journal.first >= self.seen_first
        self.seen_first = journal.first
        kept = self.model[journal.first - self.base :]
        assert contents(journal) == kept
        assert journal.size == size_of(kept)

    @invariant()
    def it_keeps_to_its_bounds(self) -> None:
        journal = self.journal
        part = max(self.biggest_part, self.retention // SEGMENTS)
        # The newest is kept even if too big, with what shares its segment.
        newest = size_of([self.model[-1]]) if self.model else 0
        assert journal.size <= max(self.retention, part + newest)
        assert journal._recent_size <= max(self.memory, part) + newest
        files = [path.stat().st_size for path in segments_of(self.directory)]
        assert sum(files) <= journal.size + len(files) * HEADER_SIZE

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.remove()
        shutil.rmtree(self.root)


TestJournalAgainstTheModel = JournalMachine.TestCase
TestJournalAgainstTheModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)

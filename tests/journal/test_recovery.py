"""Its files against everything that cuts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sorna_agent.journal import HEADER_SIZE, RECORD, Journal
from tests.journal.parts import RETENTION, contents, fill, numbered, segments_of


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


@pytest.mark.parametrize("damage", ["header", "first record", "last record"])
def test_no_number_is_given_twice_if_the_newest_are_damaged(tmp_path: Path, damage: str):
    directory, paths = full_directory(tmp_path)
    data = bytearray(paths[-1].read_bytes())
    data[{"header": 9, "first record": HEADER_SIZE + RECORD.size, "last record": -1}[damage]] ^= 1
    paths[-1].write_bytes(data)

    journal = Journal(directory, retention=RETENTION, first=5000)

    assert (journal.first, journal.next) == (5000, 5000)
    assert journal.dropped(990) == (4010, 0)
    assert journal.append(b"after") == 5000
    journal.close()
    again = Journal(directory, retention=RETENTION, first=9000)
    assert (again.first, contents(again)) == (5000, [b"after"])
    again.close()


def test_what_was_not_written_whole_is_no_damage(tmp_path: Path):
    directory, paths = full_directory(tmp_path)
    os.truncate(paths[-1], paths[-1].stat().st_size - 1)
    (directory / f"{1001:020}.journal").write_bytes(b"")

    journal = Journal(directory, retention=RETENTION, first=5000)

    assert (journal.first, journal.next) == (first_of(paths[0]), 1000)
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

"""What the journal's tests share: records that tell their number, clocks, disks that fail."""

import contextlib
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sorna_agent.journal import OVERHEAD, Journal

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


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

"""What one kernel has said, numbered: records in the order in which they left it.

The relay appends; every subscriber is a number that it reads on from. Bounded by bytes and age, the
oldest goes first; a reader who comes too late learns it from `first` and `dropped()`.

On disk a journal is a directory of segments, `<number of the first record>.journal`, all
little-endian:

    header   magic and version, first, base (the journal's very first number), bytes of all records
             from base to first, time of creation (s since 1970), u32 checksum of all these
    records  u32 length, u32 checksum, the record

Checksums are the low half of XXH3 (64 bits). A record's is seeded with its number, so neither zeros
nor a record out of place pass for one.
Nothing is fsynced: what `flush()` has written survives the end of this process by whatever signal,
not the end of the machine, which would end the kernel as well.

A disk that fails (full, as a rule) costs history, never a message or a number: see `Journal.flush`.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from xxhash import xxh3_64_intdigest

log = logging.getLogger(__name__)

RETENTION = 64 << 20
"""bytes kept a kernel, where nobody says otherwise"""
MEMORY = 4 << 20
"""bytes of these that are held in memory, too"""
OVERHEAD = 64
"""bytes that a record counts beside its own: its object, its place in lists, its header on disk;
without it, a million empty records were free"""
SEGMENTS = 8
"""into how many parts retention (bytes and age) is cut: a part is what is dropped at a time"""
MAX_RECORD = (1 << 32) - 1
GONE_RECORDS = 1 << 16
"""of how many dropped records the sizes are remembered, so that a gap can say its bytes"""

MAGIC = b"sornaJ\x00\x02"
HEADER = struct.Struct("<8sQQQd")
CHECKSUM = struct.Struct("<I")
HEADER_SIZE = HEADER.size + CHECKSUM.size
RECORD = struct.Struct("<II")
JOINED = 256 << 10
"""bytes up to which copying all into one buffer is quicker than to hand over many small ones"""
IOV_MAX = os.sysconf("SC_IOV_MAX")
MASK = 0xFFFFFFFF


@dataclass(slots=True, eq=False)
class _Segment:
    first: int
    before: int  # bytes of all records of the journal before `first`
    born: float
    newest: float  # when a record was last written
    path: Path | None = None  # None: not on disk
    fd: int = -1
    end: int = HEADER_SIZE  # where the next record goes, its header first
    offsets: array[int] = field(default_factory=lambda: array("Q"))  # of the records themselves
    is_damaged: bool = False  # as it was found: records are missing that were whole once

    @property
    def next(self) -> int:
        return self.first + len(self.offsets)

    @property
    def payload(self) -> int:
        """bytes of the records alone"""
        return self.end - HEADER_SIZE - RECORD.size * len(self.offsets)

    @property
    def size(self) -> int:
        return self.payload + OVERHEAD * len(self.offsets)

    def bytes_before(self, seq: int) -> int:
        """bytes of all records of the journal before `seq`, which is here or comes right after"""
        if seq == self.next:
            return self.before + self.payload
        index = seq - self.first
        return self.before + self.offsets[index] - HEADER_SIZE - RECORD.size * (index + 1)

    def read(self, seq: int, max_bytes: int, max_count: int) -> list[bytes]:
        """Up to `max_bytes`, the records' headers counted, but at least one. Raises OSError."""
        offsets = self.offsets
        index = seq - self.first
        start = offsets[index]
        stop = bisect_right(
            offsets, start + max_bytes, index + 1, min(index + max(max_count, 1), len(offsets))
        )
        end = self._end_of(stop - 1)
        if end - start > max_bytes and stop - index > 1:
            stop -= 1
            end = self._end_of(stop - 1)
        data = _read(self.fd, end - start, start)
        if stop - index == 1:
            return [data]
        ends = [offset - start - RECORD.size for offset in offsets[index + 1 : stop]]
        starts = [offset - start for offset in offsets[index:stop]]
        return [data[a:b] for a, b in zip(starts, [*ends, end - start], strict=True)]

    def _end_of(self, index: int) -> int:
        if index + 1 < len(self.offsets):
            return self.offsets[index + 1] - RECORD.size
        return self.end

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Journal:
    """Numbers have no holes; `first..last` are there, none if `first > last`.

    For one thread. Every call returns at once: writes end in the page cache. `size` counts each
    record with `OVERHEAD`; it stays within `retention`, but the newest record is kept even if it is
    too big alone. The oldest go by whole segments, so at least 7/8 of retention are kept, less one
    record. The files' descriptors stay open: one for a quiet kernel, ten for one at its retention.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        retention: int = RETENTION,
        memory: int = MEMORY,
        max_age: float | None = None,
        first: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`directory` is this kernel's alone and made if it is missing; None: memory only.

        What a journal there has kept is recovered: cut at the first record that is not whole; of
        several segments the newest that follow on each other. Numbers then go on where they were,
        otherwise at `first`. If it is damaged where it was newest, more had been written than can
        be told, and readers know numbers of that: then what is below `first` goes, too. `max_age`
        is in seconds.

        Does not fail for the disk's sake: see `flush`.
        """
        self._retention = retention
        self.on_disk = directory is not None
        self.was_recovered = False
        self._directory = directory
        self._memory = memory
        self._max_age = max_age
        self._clock = clock
        self._segment_size = _part_of(retention)
        self._memory_limit = memory if directory else sys.maxsize
        self._has_warned = False
        self._base = first
        self._segments: list[_Segment] = []
        self._gone: deque[_Segment] = deque(maxlen=4 * SEGMENTS)
        self._reset(first)
        try:
            if directory is not None:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._recover(directory, first)
            if not self._segments:
                self._begin(before=0)
        except OSError as error:
            self._leave_disk(error)
        self._make_room()

    def _reset(self, first: int) -> None:
        self.first = first
        self.last = first - 1
        self.size = 0
        self._open_size = 0  # of the newest segment, what is not flushed included
        self._recent: list[bytes] = []  # the newest records; those not flushed are all in here
        self._recent_first = first
        self._recent_size = 0
        self._flushed = self.last

    @property
    def next(self) -> int:
        return self.last + 1

    @property
    def retention(self) -> int:
        """bytes kept; may be set at any time: what is too much goes at once"""
        return self._retention

    @retention.setter
    def retention(self, retention: int) -> None:
        self._retention = retention
        self._segment_size = _part_of(retention)
        self._make_room()

    @property
    def memory(self) -> int:
        """bytes of these held in memory while the disk works; may be set at any time, too"""
        return self._memory

    @memory.setter
    def memory(self, memory: int) -> None:
        self._memory = memory
        if self.on_disk:
            self._memory_limit = memory
            self._trim_memory()

    # -- writing -----------------------------------------------------------------------------

    def append(self, record: bytes) -> int:
        """Keep `record`; returns its number. It can be read at once, and survives after `flush`.

        Raises ValueError for one of 4 GiB or more.
        """
        length = len(record)
        if length > MAX_RECORD:
            raise ValueError(f"a record of {length} bytes")
        self._recent.append(record)
        length += OVERHEAD
        self.last = seq = self.last + 1
        self.size += length
        self._open_size += length
        self._recent_size += length
        if (
            self._open_size >= self._segment_size
            or self._recent_size > self._memory_limit
            or self.size > self._retention
        ):
            self._make_room()
        return seq

    def flush(self) -> None:
        """Write what was appended since the last call; to be called before any of it is sent on.

        If the disk fails, here or when records are read back, the journal goes on in memory alone
        and says so in the log, once. `on_disk` is False then; what is in memory stays, the rest is
        a gap; memory may now grow up to `retention`. The files are removed, lest a later process
        recovers them and gives numbers a second time. `sweep` returns to the disk.
        """
        if self._flushed == self.last:
            return
        try:
            self._write_pending()
        except OSError as error:
            self._leave_disk(error)

    def _write_pending(self) -> None:
        segment = self._segments[-1]
        pending = self._recent[self._flushed + 1 - self._recent_first :]
        seq = segment.next
        start = end = segment.end
        header_size, pack = RECORD.size, RECORD.pack
        add_offset = segment.offsets.append
        buffers: list[bytes] = []
        for record in pending:
            length = len(record)
            buffers += (pack(length, xxh3_64_intdigest(record, seq) & MASK), record)
            seq += 1
            end += header_size
            add_offset(end)
            end += length
        segment.end = end
        segment.newest = self._clock()
        self._flushed = self.last
        if segment.fd >= 0:
            _write(segment.fd, buffers, start, end - start)

    def _begin(self, before: int) -> None:
        """Add an empty segment, `before` bytes after the base. Raises OSError."""
        now = self._clock()
        segment = _Segment(self.next, before, born=now, newest=now)
        # Before anything can fail: what cleans up afterwards looks among these.
        self._segments.append(segment)
        self._open_size = 0
        if self.on_disk:
            assert self._directory is not None
            segment.path = self._directory / _name(segment.first)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            segment.fd = os.open(segment.path, flags, 0o600)
            header = HEADER.pack(MAGIC, segment.first, self._base, before, now)
            header += CHECKSUM.pack(xxh3_64_intdigest(header) & MASK)
            _write(segment.fd, [header], 0, len(header))

    def _roll(self) -> None:
        newest = self._segments[-1]
        self.flush()
        if self._segments[-1] is not newest:
            return  # the disk failed, and all was put into new segments
        try:
            self._begin(newest.before + newest.payload)
        except OSError as error:
            self._leave_disk(error)

    # -- bounds ------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """To be called now and then: drops what is older than `max_age`, by up to 1/8 too late.

        Also frees memory, and returns to a disk that had failed once it has room for twice what is
        kept; this writes all that is in memory.
        """
        if self._directory is not None and not self.on_disk:
            self._return_to_disk(self._directory)
        if self._max_age is not None:
            if self._open_size and now - self._segments[-1].born >= self._max_age / SEGMENTS:
                self._roll()
            while len(self._segments) > 1 and now - self._segments[0].newest >= self._max_age:
                self._drop_first()
        self._trim_memory()

    def dropped(self, start: int) -> tuple[int, int]:
        """(messages, bytes) that were from number `start` on and are gone; 0 bytes if unknown."""
        start = max(start, 1)
        if start >= self.first:
            return 0, 0
        before = self._bytes_before(start)
        size = 0 if before is None else self._segments[0].before - before
        return self.first - start, size

    def _bytes_before(self, seq: int) -> int | None:
        """bytes of all records from the base to `seq`; None: not known any more"""
        if seq == self._base:
            return 0
        for segments in (self._segments, self._gone):
            for segment in segments:
                if segment.first <= seq <= segment.next:
                    return segment.bytes_before(seq)
        return None

    def _make_room(self) -> None:
        if self._open_size >= self._segment_size:
            self._roll()
        while (
            self.size > self._retention
            and len(self._segments) > 1
            and self._segments[1].first <= self.last
        ):
            self._drop_first()
        self._trim_memory()

    def _drop_first(self) -> None:
        segment = self._segments.pop(0)
        self.first = segment.next
        self.size -= segment.size
        self._forget(self.first - self._recent_first)
        self._discard(segment)

    def _discard(self, segment: _Segment) -> None:
        segment.close()
        if segment.path is not None:
            _unlink(segment.path)
        if segment.offsets:
            self._gone.append(segment)
        while sum(len(gone.offsets) for gone in self._gone) > GONE_RECORDS:
            self._gone.popleft()

    def _trim_memory(self) -> None:
        """Down to 7/8, so that it is seldom: the front of a list is not cut for nothing."""
        if self._recent_size <= self._memory_limit:
            return
        goal = self._memory_limit - self._memory_limit // 8
        excess = self._recent_size - goal
        count = 0
        for record in self._recent[: self._flushed + 1 - self._recent_first]:
            if excess <= 0:
                break
            excess -= len(record) + OVERHEAD
            count += 1
        self._forget(count)

    def _forget(self, count: int) -> None:
        """Let the oldest `count` records in memory go."""
        if count > 0:
            self._recent_size -= sum(map(len, self._recent[:count])) + count * OVERHEAD
            del self._recent[:count]
            self._recent_first += count

    # -- reading -----------------------------------------------------------------------------

    def read(self, seq: int) -> bytes:
        """Raises IndexError for a number that is not there (any more)."""
        records = self.read_from(seq, 0, 1)
        if not records:
            raise IndexError(seq)
        return records[0]

    def read_from(self, seq: int, max_bytes: int, max_count: int = 500) -> list[bytes]:
        """Records from `seq` on: at least one if there is one, of up to `max_bytes` in all.

        There may be fewer than would fit. None if `seq` is yet to come, or if the disk failed just
        now: `first` is beyond `seq` then. Raises IndexError for a `seq` before `first`.
        """
        if seq < self.first:
            raise IndexError(seq)
        if seq > self.last:
            return []
        if seq >= self._recent_first:
            start = seq - self._recent_first
            return _up_to(max_bytes, self._recent[start : start + max(max_count, 1)])
        segment = next(s for s in reversed(self._segments) if s.first <= seq)
        try:
            return segment.read(seq, max_bytes, max_count)
        except OSError as error:
            self._leave_disk(error)
            return []

    # -- the disk's failures -----------------------------------------------------------------

    def _leave_disk(self, error: OSError) -> None:
        if not self._has_warned:
            log.warning("journal in %s: goes on in memory alone: %s", self._directory, error)
            self._has_warned = True
        self.on_disk = False
        self._memory_limit = sys.maxsize
        self._rebuild()

    def _return_to_disk(self, directory: Path) -> None:
        """Write all that is in memory into new segments; if that fails, stay in memory."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            room = os.statvfs(directory)
        except OSError as error:
            log.debug("journal in %s: still in memory alone: %s", directory, error)
            return
        if room.f_bavail * room.f_frsize < 2 * self.size:
            return
        self.on_disk = True
        self._rebuild()
        self.flush()
        if self.on_disk:
            # Only now: had the last write failed, all of them were still needed in memory.
            self._memory_limit = self._memory
            self._has_warned = False
            log.info("journal in %s: is on disk again", directory)

    def _rebuild(self) -> None:
        """Make new segments, of what is in memory.

        If the disk fails meanwhile, this is called again from within, for what was appended by
        then; the rest follows in memory.
        """
        records, first = self._recent, self._recent_first
        before = self._bytes_before(first) or 0
        segments, self._segments = self._segments, []
        for segment in segments:
            self._discard(segment)
        self._reset(first)
        try:
            self._begin(before)
        except OSError as error:
            self._leave_disk(error)
        for record in records:
            self.append(record)

    # -- recovery and the end ----------------------------------------------------------------

    def _recover(self, directory: Path, first: int) -> None:
        run: list[_Segment] = []  # newest first
        is_damaged = False
        base = first
        for path in sorted(directory.glob("*.journal"), reverse=True):
            found = _open_segment(path)
            if found is not None and run and found[0].next != run[-1].first:
                found[0].close()
                found = None
            if found is None:
                log.warning("journal: %s is damaged or does not lead to the next: dropped", path)
                # One with a header alone was only just begun.
                is_damaged |= not run and path.stat().st_size > HEADER_SIZE
                _unlink(path)
                continue
            segment, base = found
            is_damaged |= not run and segment.is_damaged
            run.append(segment)
        if is_damaged and run and run[0].next < first:
            log.warning("journal in %s: its end is lost; it begins anew at %d", directory, first)
            for segment in run:
                segment.close()
                _unlink(directory / _name(segment.first))
            run = []
        if not run:
            return
        self._base = base
        self._segments = run[::-1]
        self._reset(run[0].next)
        self.first = run[-1].first
        self.size = sum(segment.size for segment in run)
        self._open_size = run[0].size
        self.was_recovered = True

    def close(self) -> None:
        """Flush, and leave the files to a later process. Only `remove` may be called after it."""
        self.flush()
        for segment in self._segments:
            segment.close()
            segment.path = None

    def remove(self) -> None:
        """Close, and delete the directory with all that is kept."""
        for segment in self._segments:
            segment.close()
        if self._directory is not None:
            for path in self._directory.glob("*.journal"):
                _unlink(path)
            try:
                self._directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("journal in %s: the directory stays: %s", self._directory, error)


def _part_of(retention: int) -> int:
    return max(retention // SEGMENTS, 1)


def _name(first: int) -> str:
    return f"{first:020}.journal"


def _open_segment(path: Path) -> tuple[_Segment, int] | None:
    """The segment and its journal's base, up to the first record that is not whole.

    None: it cannot be read, or its header is not one.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        log.warning("journal: %s: %s", path, error)
        return None
    try:
        found = _read_segment(path, fd)
    except OSError as error:
        log.warning("journal: %s: %s", path, error)
        found = None
    if found is None:
        os.close(fd)
    return found


def _read_segment(path: Path, fd: int) -> tuple[_Segment, int] | None:
    status = os.fstat(fd)
    with open(fd, "rb", buffering=1 << 20, closefd=False) as file:
        header = file.read(HEADER_SIZE)
        if len(header) < HEADER_SIZE:
            return None
        magic, first, base, before, born = HEADER.unpack_from(header)
        (checksum,) = CHECKSUM.unpack_from(header, HEADER.size)
        expected = xxh3_64_intdigest(header[: HEADER.size]) & MASK
        is_sound = checksum == expected and magic == MAGIC
        if not is_sound or path.name != _name(first):
            return None
        segment = _Segment(first, before, born, status.st_mtime, path, fd)
        while len(head := file.read(RECORD.size)) == RECORD.size:
            length, checksum = RECORD.unpack(head)
            start = segment.end + RECORD.size
            # A length that is not one must not make us read gigabytes.
            if start + length > status.st_size:
                break
            if xxh3_64_intdigest(file.read(length), segment.next) & MASK != checksum:
                segment.is_damaged = True
                break
            segment.offsets.append(start)
            segment.end = start + length
    if segment.end < status.st_size:
        log.warning(
            "journal: %s: the last %d bytes are no whole record", path, status.st_size - segment.end
        )
        os.ftruncate(fd, segment.end)
    return segment, base


def _up_to(max_bytes: int, records: list[bytes]) -> list[bytes]:
    if sum(map(len, records)) <= max_bytes:
        return records
    ends = list(accumulate(map(len, records)))
    return records[: max(bisect_right(ends, max_bytes), 1)]


def _write(fd: int, buffers: list[bytes], position: int, size: int) -> None:
    """Write all `size` bytes of `buffers`; raises OSError."""
    if size <= JOINED:
        buffers = [b"".join(buffers)]
    while True:
        written = os.pwritev(fd, buffers[:IOV_MAX], position)
        if written == size:
            return
        position += written
        size -= written
        done = 0
        while written >= len(buffers[done]):
            written -= len(buffers[done])
            done += 1
        del buffers[:done]
        if written:
            buffers[0] = buffers[0][written:]


def _read(fd: int, size: int, position: int) -> bytes:
    """Raises OSError, also if there are not so many bytes."""
    pieces = []
    while True:
        piece = os.pread(fd, size, position)
        pieces.append(piece)
        size -= len(piece)
        if not size:
            return piece if len(pieces) == 1 else b"".join(pieces)
        if not piece:
            raise OSError("the file is shorter than what was written")
        position += len(piece)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("journal: %s stays: %s", path, error)

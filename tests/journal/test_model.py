"""The journal against a model, a plain list."""

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sorna_agent.journal import HEADER_SIZE, SEGMENTS, Journal
from tests.journal.parts import (
    MEMORY,
    RETENTION,
    Clock,
    contents,
    crashed,
    file_size_limit,
    segments_of,
    size_of,
)

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

"""What one kernel has said, numbered: messages in the order in which they left it.

The relay appends; every subscriber is a number that it reads on from. Bounded by bytes, the oldest
goes first; a reader who comes too late learns it from `first`. Lives in the relay's memory.
"""

from __future__ import annotations

RETENTION = 64 << 20
"""bytes kept a kernel, where nobody says otherwise"""

ENTRY_OVERHEAD = 200
"""bytes that an entry costs beside its frames; without it, a million empty messages were free"""

Frames = list[bytes]


class Journal:
    """Numbers begin at 1 and have no holes; `first..last` are there, none if `first > last`."""

    def __init__(self, retention: int = RETENTION) -> None:
        self.retention = retention
        self.first = 1
        self.size = 0
        # A list and not a deque: readers index into the middle.
        self._entries: list[Frames | None] = []
        self._dropped = 0  # how many entries at the list's head are gone already

    @property
    def last(self) -> int:
        return self.first + len(self._entries) - self._dropped - 1

    @property
    def next(self) -> int:
        return self.last + 1

    def append(self, frames: Frames) -> int:
        """Keep `frames`; returns their number. The newest entry is kept even if it is too big."""
        self._entries.append(frames)
        self.size += _size(frames)
        while self.size > self.retention and self.first < self.last:
            self._drop_first()
        return self.last

    def read(self, seq: int) -> Frames:
        """Raises IndexError for a number that is not there (any more)."""
        if not self.first <= seq <= self.last:
            raise IndexError(seq)
        frames = self._entries[seq - self.first + self._dropped]
        assert frames is not None
        return frames

    def _drop_first(self) -> None:
        frames = self._entries[self._dropped]
        assert frames is not None
        self.size -= _size(frames)
        self._entries[self._dropped] = None
        self._dropped += 1
        self.first += 1
        if self._dropped > 1000 and self._dropped * 2 > len(self._entries):
            del self._entries[: self._dropped]
            self._dropped = 0


def _size(frames: Frames) -> int:
    return ENTRY_OVERHEAD + sum(map(len, frames))

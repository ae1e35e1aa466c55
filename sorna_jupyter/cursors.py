"""Reads a kernel's messages from its journal at the relay, for everyone who is attached.

They come once, however many clients a kernel has: through its *feed*, a subscription that is always
kept near the journal's end. Who lags, or was away, reads on at a `Cursor` of its own from where it
stands, and joins the others when it has caught up. `agents` carries what is said here to the relay,
and what comes from there.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from sorna_jupyter import protocol
from sorna_jupyter.protocol import (
    RECORD_COST,
    Batch,
    Gap,
    KernelMessage,
    pack_number,
    read_record,
)

FEED_CREDIT = 8 << 20
"""bytes of a kernel's messages that may be on their way to us"""
CURSOR_CREDIT = 1 << 20
"""…of those that one client catches up with"""


class Reader(Protocol):
    """Who gets a kernel's messages; called from the event loop, must not block or raise."""

    def on_batch(self, batch: Batch) -> None: ...

    def on_gap(self, gap: Gap) -> None: ...


class Link(Protocol):
    """The way to the relay: of `agents`, one an agent. What it tells is called from the event loop
    as it comes."""

    def new_name(self) -> bytes: ...

    def send(self, frames: list[bytes]) -> None:
        """Raises `AgentUnreachable`."""

    def subscribe(self, cursor: Cursor) -> None:
        """Raises `AgentUnreachable`."""

    def credit(self, cursor: Cursor, size: int) -> None:
        """So many bytes more may come."""

    def unsubscribe(self, cursor: Cursor) -> None:
        """Safe to repeat."""

    def acknowledge(self, attachment: Attachment, seq: int) -> None: ...

    def detach(self, attachment: Attachment) -> None:
        """Safe to repeat."""


class Cursor:
    """A subscription of its own: reads one kernel's journal from a number on, to its end and then
    as it grows."""

    def __init__(
        self,
        link: Link,
        kernel_id: str,
        seq: int,
        reader: Reader,
        credit: int,
        is_prompt: bool = True,
    ) -> None:
        """`seq`: number of the first message wanted; 0: from now on. `credit`: bytes that may be on
        their way. `is_prompt`: the reader is done with what it gets as soon as it has it; else it
        says when (`done`). Raises `AgentUnreachable`."""
        self.kernel_id = kernel_id
        self.next = seq
        self.end = 0
        """the number after the journal's last, when we last heard; 0: not heard yet"""
        self.id = link.new_name()
        self._link = link
        self._reader = reader
        self._credit = credit
        self._is_prompt = is_prompt
        self._taken = 0
        link.subscribe(self)

    def close(self) -> None:
        """Safe to repeat."""
        self._link.unsubscribe(self)

    def done(self) -> None:
        """With all that came: as much again may come. Told in larger pieces."""
        if self._taken * 2 > self._credit:
            self._link.credit(self, self._taken)
            self._taken = 0

    # -- what the link tells

    def request(self) -> list[bytes]:
        """What the relay is to be told when this begins, or begins again."""
        self._taken = 0
        numbers = map(pack_number, (self.next, self._credit))
        return [protocol.SUBSCRIBE, self.kernel_id.encode(), self.id, *numbers]

    def take(self, first: int, end: int, records: list[bytes]) -> None:
        if self._misses(first):
            return
        self.end = max(self.end, end)
        self.next = self.next or first
        messages: list[KernelMessage] = []
        for seq, record in enumerate(records, first):
            if seq < self.next:
                continue  # it came before the connection was cut as well
            item = read_record(self.kernel_id, seq, record)
            if isinstance(item, Gap):
                self._hand_over(messages)
                messages = []
                self.next = seq + 1
                self._reader.on_gap(item)
            else:
                self.next = seq + 1
                messages.append(item)
        self._hand_over(messages)
        self._taken += sum(map(len, records)) + RECORD_COST * len(records)
        if self._is_prompt:
            self.done()

    def _misses(self, first: int) -> bool:
        """Whether what comes before number `first` was on its way when the connection was cut, and
        the relay noticed nothing. It comes again, with the rest: when the link opens anew."""
        return 0 < self.next < first

    def lose(self, first: int, last: int, size: int) -> None:
        if self._misses(first) or last < self.next:
            return  # the latter was told before the connection was cut as well
        self.next = last + 1
        reason = "it was more than the agent keeps" if size else "the agent has lost it"
        self._reader.on_gap(Gap(self.kernel_id, first, last, size or None, reason))

    def _hand_over(self, messages: list[KernelMessage]) -> None:
        if messages:
            self._reader.on_batch(Batch(messages))


class Reading(Cursor):
    """A cursor to be read from a coroutine, as fast as that comes for more."""

    def __init__(self, link: Link, kernel_id: str, seq: int) -> None:
        self._items: list[KernelMessage | Gap] = []
        self._changed = asyncio.Event()
        self._is_over = False
        super().__init__(link, kernel_id, seq, self, CURSOR_CREDIT, is_prompt=False)

    async def receive(self) -> list[KernelMessage | Gap]:
        """What came, once something did; nothing when it is over, or the journal's end is reached
        the first time."""
        self.done()
        if not self._items and not self._is_over:
            self._changed.clear()
            await self._changed.wait()
        items, self._items = self._items, []
        return items

    def stop(self) -> None:
        """No more will come."""
        self._is_over = True
        self._changed.set()

    def take(self, first: int, end: int, records: list[bytes]) -> None:
        super().take(first, end, records)
        self._changed.set()

    def on_batch(self, batch: Batch) -> None:
        self._items.extend(batch.messages)

    def on_gap(self, gap: Gap) -> None:
        self._items.append(gap)
        self._changed.set()


class Feed(Cursor):
    """The subscription that everyone attached to a kernel shares. Nobody holds it up: who can't
    follow leaves it."""

    def __init__(self, link: Link, kernel_id: str) -> None:
        self.attached: list[Attachment] = []
        super().__init__(link, kernel_id, 0, self, FEED_CREDIT)

    @property
    def sessions(self) -> set[str]:
        return {attachment.session_id for attachment in self.attached}

    def take(self, first: int, end: int, records: list[bytes]) -> None:
        is_first = not self.next
        super().take(first, end, records)
        if is_first:
            for attachment in tuple(self.attached):
                attachment.catch_up()

    def on_batch(self, batch: Batch) -> None:
        for attachment in tuple(self.attached):
            attachment.on_feed(batch)

    def on_gap(self, gap: Gap) -> None:
        for attachment in tuple(self.attached):
            attachment.on_feed_gap(gap)


class Attachment:
    """A client session on one kernel: sends on its channels until closed, and gets what the session
    is to see. One that resumes begins after what its client has acknowledged at the relay.

    `pause` when the client does not keep up, `resume` when it does again: nothing is lost between.
    """

    def __init__(
        self, link: Link, feed: Feed, session_id: str, reader: Reader, resumes: bool
    ) -> None:
        self.kernel_id = feed.kernel_id
        self.session_id = session_id
        self.is_behind = False
        """whether what its reader gets now is older than what others get"""
        self._link = link
        self._feed = feed
        self._reader = reader
        self._next = 0
        """number of the next message for this client; 0: whatever comes next"""
        self._is_paused = False
        self._waits = resumes
        """for the relay to say where it begins"""
        self.caught_up = asyncio.Event()
        """set once it has all that it missed"""
        if not resumes:
            self.caught_up.set()
        self._cursor: Cursor | None = None

    def send(self, channel: str, parts: list[bytes]) -> None:
        """`parts`: header, parent header, metadata, content, buffers. Raises `AgentUnreachable`."""
        self._link.send(
            [
                protocol.MESSAGE,
                self.kernel_id.encode(),
                self.session_id.encode(),
                channel.encode(),
                *parts,
            ]
        )

    def close(self) -> None:
        """Safe to repeat."""
        self._stop_catching_up()
        self._link.detach(self)

    def acknowledge(self, seq: int) -> None:
        """The client has everything up to this number: where it begins when it comes back, through
        whichever gateway."""
        self._link.acknowledge(self, seq)

    def pause(self) -> None:
        """The client has enough for now."""
        self._is_paused = True
        self._stop_catching_up()

    def resume(self) -> None:
        self._is_paused = False
        self.catch_up()

    # -- what the link tells

    def begin(self, seq: int) -> None:
        """The relay's answer: what is numbered `seq` and higher this client does not have."""
        if self._waits:
            self._waits = False
            self._next = seq
            self.catch_up()

    def on_feed(self, batch: Batch) -> None:
        if self._waits or self._is_paused or self._cursor is not None:
            return
        if batch.first > self._next > 0:
            self.catch_up()
        elif unseen := batch.since(self._next):
            self._give(unseen)

    def on_feed_gap(self, gap: Gap) -> None:
        if not (self._waits or self._is_paused or self._cursor) and gap.last >= self._next:
            self.on_gap(gap)

    def catch_up(self) -> None:
        """Read on by itself, if others are ahead."""
        if self._waits or self._is_paused or self._cursor is not None:
            return
        if 0 < self._next < self._feed.next:
            self.is_behind = True
            self._cursor = Cursor(self._link, self.kernel_id, self._next, self, CURSOR_CREDIT)
        elif self._feed.next:
            self.caught_up.set()

    # -- while it reads by itself

    def on_batch(self, batch: Batch) -> None:
        self._give(batch)
        self._rejoin()

    def on_gap(self, gap: Gap) -> None:
        self._next = gap.last + 1
        self._reader.on_gap(gap)
        self._rejoin()

    def _give(self, batch: Batch) -> None:
        self._next = batch.next
        if mine := batch.for_session(self.session_id):
            self._reader.on_batch(mine)

    def _rejoin(self) -> None:
        if self._cursor is not None and self._next >= self._feed.next:
            self._stop_catching_up()
            self.is_behind = False
            self.caught_up.set()

    def _stop_catching_up(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None

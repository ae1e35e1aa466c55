"""What left a kernel, read from its journal."""

from __future__ import annotations

import asyncio

import pytest

from sorna_jupyter.faces import rest
from tests.jupyter_app import record
from tests.rest.parts import SSE, UNKNOWN, RestApp, events, refusal
from tests.waiting import until


class Follower:
    """A plain socket that reads `GET …/messages`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def get(cls, app: RestApp, accept: str, query: str = "follow=1") -> Follower:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.app.port)
        writer.write(
            f"GET {app.kernel}/messages?{query} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n"
            "Authorization: token the-servers-own-token\r\n\r\n".encode()
        )
        return cls(reader, writer)

    async def head(self) -> str:
        async with asyncio.timeout(10):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def chunk(self) -> bytes:
        """Of the chunked body; nothing at its end."""
        async with asyncio.timeout(10):
            size = int(await self.reader.readline(), 16)
            return (await self.reader.readexactly(size + 2))[:-2]


@pytest.mark.parametrize(
    ("accept", "quiet"), [("application/x-ndjson", b"\n"), ("text/event-stream", b": quiet\n\n")]
)
async def test_a_follower_of_a_silent_kernel_is_answered_at_once_and_kept(
    app: RestApp, monkeypatch: pytest.MonkeyPatch, accept: str, quiet: bytes
) -> None:
    follower = await Follower.get(app, accept)

    head = await follower.head()
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {accept}\r\n" in head
    assert await follower.chunk() == quiet
    cursor = await app.app.agents.relay.cursor()
    cursor.take(1, 2, [record("news")])
    assert b'"text": "news"' in await follower.chunk()
    follower.writer.close()

    monkeypatch.setattr(rest.MessagesHandler, "quiet_for", 0.01)
    follower = await Follower.get(app, accept)
    await follower.head()
    assert [await follower.chunk() for _ in range(3)] == [quiet] * 3
    follower.writer.close()


async def test_a_follower_that_leaves_has_no_cursor_any_more(app: RestApp) -> None:
    follower = await Follower.get(app, "application/x-ndjson")
    await follower.head()
    relay = app.app.agents.relay
    await relay.cursor()
    kernel = app.app.kernels.get(app.kernel_id)
    assert len(kernel.readings) == 1

    follower.writer.close()

    await until(lambda: not relay.cursors)
    assert kernel.readings == []


async def test_a_follower_that_takes_nothing_is_given_up(
    app: RestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest.MessagesHandler, "stalled_for", 0.5)
    follower = await Follower.get(app, "application/x-ndjson")
    await follower.head()
    relay = app.app.agents.relay
    cursor = await relay.cursor()

    follower.writer.transport.pause_reading()  # type: ignore[attr-defined]
    cursor.take(1, 33, [record("x" * (1 << 20))] * 32)

    await until(lambda: not relay.cursors)
    assert app.app.kernels.get(app.kernel_id).readings == []
    follower.writer.close()


async def test_a_followers_answer_ends_with_its_kernel(app: RestApp) -> None:
    follower = await Follower.get(app, "application/x-ndjson")
    await follower.head()
    assert await follower.chunk() == b"\n"

    await app.app.kernels.stop(app.kernel_id)

    assert await follower.chunk() == b""
    assert app.app.agents.relay.cursors == []
    follower.writer.close()


async def test_what_the_journal_keeps_no_more_is_a_gap_before_the_rest(app: RestApp) -> None:
    asking = asyncio.ensure_future(app.app.fetch("GET", f"{app.kernel}/messages?since=3"))
    cursor = await app.app.agents.relay.cursor()
    assert cursor.next == 3

    cursor.lose(3, 16, 9120)
    cursor.take(17, 19, [record("seventeen"), record("eighteen")])
    response = await asking

    gap, *rest_of_it = events(response.body)
    reason = "it was more than the agent keeps"
    lost = {"from": 3, "to": 16, "messages": 14, "bytes": 9120, "reason": reason}
    assert gap == {"gap": lost}
    assert [(m["seq"], m["content"]["text"]) for m in rest_of_it] == [
        (17, "seventeen"),
        (18, "eighteen"),
    ]


async def test_a_gap_that_is_all_there_is_is_told_too(app: RestApp) -> None:
    asking = asyncio.ensure_future(
        app.app.fetch("GET", f"{app.kernel}/messages?since=1", headers=SSE)
    )
    cursor = await app.app.agents.relay.cursor()

    cursor.lose(1, 16, 9120)
    cursor.take(17, 17, [])
    response = await asking

    assert response.body.startswith(b'id: 16\nevent: gap\ndata: {"gap":{"from":1,"to":16,')
    assert response.body.count(b"\n\n") == 1


async def test_messages_of_a_kernel_that_is_not_there_are_404(app: RestApp) -> None:
    for query in ("", "?follow=1"):
        await refusal(app, 404, "GET", f"/api/kernels/{UNKNOWN}/messages{query}")
    await refusal(app, 400, "GET", f"{app.kernel}/messages?since=x")

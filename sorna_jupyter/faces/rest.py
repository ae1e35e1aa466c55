"""Our own REST: run code on a kernel, read its runs, ask what an editor asks. See docs/rest.md.

Answers by `Accept`: the whole run when it is over, or its events as they come, one JSON a line or
as server-sent events. With `Prefer: respond-async` at once, and the run is read from its Location.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from socket import AF_UNIX, IPPROTO_TCP, TCP_USER_TIMEOUT
from typing import Any

import msgspec
from jupyter_server.auth.decorator import allow_unauthenticated, authorized
from tornado import web
from tornado.iostream import StreamClosedError

from sorna_jupyter import __version__
from sorna_jupyter.bodies import kernel_env
from sorna_jupyter.exceptions import InvalidRequest, RunNotFound
from sorna_jupyter.http import KERNEL_ID, SornaAPIHandler
from sorna_jupyter.openapi import (
    Complete,
    GapModel,
    Input,
    Inspect,
    IsComplete,
    JournalGap,
    OneShot,
    document,
)
from sorna_jupyter.protocol import Gap, KernelMessage
from sorna_jupyter.run import Execute, LoggedEvent, Run

AUTH_RESOURCE = "kernels"
RUN_ID = r"(?P<run_id>[\w-]+)"

JSON, NDJSON, SSE = "application/json", "application/x-ndjson", "text/event-stream"
QUIET = {NDJSON: b"\n", SSE: b": quiet\n\n"}
"""what tells a reader, and every proxy on the way, that there is nothing to tell"""


class StreamHandler(SornaAPIHandler):
    """Base of the routes whose answer may go on for long."""

    auth_resource = AUTH_RESOURCE

    stalled_for = 300.0
    """seconds after which a client that takes nothing of what waits for it is given up"""

    def initialize(self, **kwargs: Any) -> None:
        super().initialize(**kwargs)
        self._closed = asyncio.Event()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self._closed.set()

    def accepted(self, default: str) -> str:
        """The first of ours in `Accept`; what it says of quality does not matter here."""
        for item in self.request.headers.get("Accept", default).split(","):
            kind = item.partition(";")[0].strip().lower()
            if kind in (JSON, NDJSON, SSE):
                return kind
            if kind in ("*/*", "application/*", "application/jsonl"):
                return NDJSON if kind == "application/jsonl" else default
        raise web.HTTPError(406, f"This can be had as {JSON}, {NDJSON} or {SSE}")

    def begin_stream(self, kind: str) -> None:
        self.set_header("Content-Type", kind)
        self.set_header("Cache-Control", "no-store, no-transform")
        self.set_header("X-Accel-Buffering", "no")  # nginx would hold it back
        stream = self.request.connection.stream  # type: ignore[union-attr]
        if not stream.closed() and stream.socket.family != AF_UNIX:
            # RFC 5482; Linux counts closed windows, too: a client that is there and does not read.
            milliseconds = round(self.stalled_for * 1000)
            stream.socket.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, milliseconds)

    def number(self, name: str) -> int | None:
        """`?name=` a number, or what comes after the last event that an `EventSource` has seen."""
        number = self.get_query_argument(name, "")
        if not number and (last := self.request.headers.get("Last-Event-ID", "")):
            number = str(int(last) + 1) if last.isdecimal() else last
        if not number:
            return None
        if not number.isdecimal() or len(number) > 16:
            raise InvalidRequest(f"{name}: not a number: {number!r}")
        return int(number)

    async def until_closed(self, coroutine: Any, timeout: float | None) -> None:
        """Wait for it, but not for a client that has gone."""
        task = asyncio.ensure_future(coroutine)
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({task, closed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            task.cancel()
            closed.cancel()


# -- runs ------------------------------------------------------------------------------------


class RunHandler(StreamHandler):
    """Base of the routes that answer with a run."""

    async def prepare(self) -> None:  # type: ignore[override]  # as jupyter_server's own
        """What the request's headers ask for is known before anything is done for it."""
        await super().prepare()
        self._kind = self.accepted(JSON)
        self._from = self.number("from") or 0
        prefer = self.request.headers.get("Prefer", "")
        self.prefers_async, self.wait = _preference(prefer)

    async def own_run(self, run_id: str, kernel_id: str | None = None) -> Run:
        """Runs outlive their kernels and what is known of those, so the owner is compared here."""
        if kernel_id is None:
            run = self.runs.get(run_id)
        else:
            run = await self.runs.find(run_id, kernel_id)
        if run.owner != self.username:
            raise RunNotFound(run_id)
        return run

    async def answer_new(self, run: Run, location: str) -> None:
        """The answer to the request that made this run."""
        self.set_header("Content-Location", location)
        if self.prefers_async:
            self.set_header("Preference-Applied", "respond-async")
            await self.until_closed(run.settled(), self.wait or 0)
            if not run.is_over:
                self.set_header("Location", location)
                self.write_json(run.result(), 202)
                return
        await self.answer(run, wait=None)

    async def answer(self, run: Run, wait: float | None) -> None:
        """`wait`: seconds for the run to be over or to ask for input; None: as long as it takes."""
        if self._kind == JSON:
            await self.until_closed(run.settled(), wait)
            if not self._closed.is_set():
                self.write_json(run.result())
        else:
            await self.until_closed(self._stream(run, self._kind), None)

    async def _stream(self, run: Run, kind: str) -> None:
        encode = _as_sse if kind == SSE else _as_line
        self.begin_stream(kind)
        try:
            async for events in run.follow(self._from):
                self.write(b"".join(map(encode, events)) or QUIET[kind])
                await self.flush()
        except StreamClosedError:
            return  # the run goes on; whoever wants more of it comes back with `from`
        self.finish(set_content_type=kind)


class ExecuteHandler(RunHandler):
    @web.authenticated
    @authorized
    async def post(self, kernel_id: str) -> None:
        run = self.runs.submit(kernel_id, self.body(Execute))
        await self.answer_new(run, f"{self.base_url}api/kernels/{kernel_id}/runs/{run.id}")


class RunsHandler(SornaAPIHandler):
    auth_resource = AUTH_RESOURCE

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        """Those that go on and those that are kept, oldest first, without their outputs."""
        runs = [run for run in await self.runs.list_all(kernel_id) if run.owner == self.username]
        if not runs:
            self.kernels.get(kernel_id)
        self.write_json([run.summary() for run in runs])


class OneRunHandler(RunHandler):
    @web.authenticated
    @authorized
    async def get(self, kernel_id: str, run_id: str) -> None:
        await self.answer(await self.own_run(run_id, kernel_id), self.wait or 0)


class InputHandler(RunHandler):
    @web.authenticated
    @authorized
    async def post(self, kernel_id: str, run_id: str) -> None:
        self.runs.answer(await self.own_run(run_id, kernel_id), self.body(Input).value)
        self.set_status(204)
        self.finish()


# -- runs on kernels of their own ------------------------------------------------------------


class RunOnceHandler(RunHandler):
    @web.authenticated
    @authorized
    async def post(self) -> None:
        request = self.body(OneShot)
        run = await self.runs.run_once(
            request,
            owner=self.username,
            name=request.name,
            env=kernel_env(request.env, self.username),
            limits=request.limits.limits(),
        )
        await self.answer_new(run, f"{self.base_url}api/run/{run.id}")


class OwnRunHandler(RunHandler):
    @web.authenticated
    @authorized
    async def get(self, run_id: str) -> None:
        await self.answer(await self.own_run(run_id), self.wait or 0)


class OwnInputHandler(RunHandler):
    @web.authenticated
    @authorized
    async def post(self, run_id: str) -> None:
        self.runs.answer(await self.own_run(run_id), self.body(Input).value)
        self.set_status(204)
        self.finish()


# -- messages ----------------------------------------------------------------------------------


class MessagesHandler(StreamHandler):
    """What left the kernel, as its journal has it: on every channel, for every client."""

    quiet_for = 15.0
    """seconds without a message after which a follower gets a word, so that proxies stay"""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        kind = self.accepted(NDJSON)
        if kind == JSON:
            raise web.HTTPError(406, f"This can be had as {NDJSON} or {SSE}")
        follow = self.get_query_argument("follow", "0").lower() in ("1", "true", "yes", "")
        since = self.number("since") or 1
        messages = self.kernels.messages(kernel_id, since, follow=follow, quiet_for=self.quiet_for)
        await self.until_closed(self._stream(messages, kind), None)

    async def _stream(
        self, messages: AsyncGenerator[Sequence[KernelMessage | Gap], None], kind: str
    ) -> None:
        encode = _message_as_sse if kind == SSE else _message_as_line
        try:
            # Closed here, where it is read: nobody else may while a reading goes on.
            async with aclosing(messages):
                async for items in messages:
                    if not self._headers_written:
                        self.begin_stream(kind)
                    self.write(b"".join(map(encode, items)) or QUIET[kind])
                    # Waits until the client takes it; so much and no more is in memory.
                    await self.flush()
        except StreamClosedError:
            return
        self.begin_stream(kind)
        self.finish(set_content_type=kind)


# -- questions -------------------------------------------------------------------------------


class QuestionHandler(SornaAPIHandler):
    """Answers with the content of the kernel's reply."""

    auth_resource = AUTH_RESOURCE

    @web.authenticated
    @authorized
    async def post(self, kernel_id: str, question: str) -> None:
        match question:
            case "is_complete":
                content: dict[str, Any] = {"code": self.body(IsComplete).code}
            case "inspect":
                content = _at_cursor(self.body(Inspect))
            case _:
                content = _at_cursor(self.body(Complete))
        self.write_json(await self.runs.ask(kernel_id, f"{question}_request", content))


def _at_cursor(body: Complete) -> dict[str, Any]:
    content: dict[str, Any] = msgspec.to_builtins(body)
    if body.cursor_pos is None:
        content["cursor_pos"] = len(body.code)
    return content


# -- the server ------------------------------------------------------------------------------


class HealthHandler(SornaAPIHandler):
    """For load balancers and probes; needs no authentication and tells nothing."""

    auth_resource = "api"

    _track_activity = False

    @allow_unauthenticated
    def get(self) -> None:
        self.write_json({"status": "ok", "version": __version__})

    head = get


class OpenAPIHandler(SornaAPIHandler):
    auth_resource = "api"

    @web.authenticated
    @authorized
    def get(self) -> None:
        self.write_json(document(self.base_url))


def handlers() -> list[tuple[str, type[SornaAPIHandler]]]:
    """Routes for the app; the base URL is put in front by `ExtensionApp`."""
    kernel = rf"/api/kernels/{KERNEL_ID}"
    return [
        (rf"{kernel}/execute", ExecuteHandler),
        (rf"{kernel}/runs", RunsHandler),
        (rf"{kernel}/runs/{RUN_ID}", OneRunHandler),
        (rf"{kernel}/runs/{RUN_ID}/input", InputHandler),
        (rf"{kernel}/messages", MessagesHandler),
        (rf"{kernel}/(?P<question>complete|inspect|is_complete)", QuestionHandler),
        (r"/api/run", RunOnceHandler),
        (rf"/api/run/{RUN_ID}", OwnRunHandler),
        (rf"/api/run/{RUN_ID}/input", OwnInputHandler),
        (r"/healthz", HealthHandler),
        (r"/sorna/openapi\.json", OpenAPIHandler),
    ]


def _preference(prefer: str) -> tuple[bool, float | None]:
    """RFC 7240: whether `respond-async`, and `wait=` how many seconds."""
    items = [item.strip().lower() for item in prefer.split(",")]
    wait = next((m for item in items if (m := re.fullmatch(r"wait\s*=\s*(\d{1,6})", item))), None)
    return "respond-async" in items, float(wait[1]) if wait else None


def _as_line(event: LoggedEvent) -> bytes:
    return event.data + b"\n"


def _as_sse(event: LoggedEvent) -> bytes:
    # JSON has no raw newlines, so one `data:` line holds it.
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.type.encode(), event.data)


def _message_as_line(item: KernelMessage | Gap) -> bytes:
    return _message_as_json(item) + b"\n"


def _message_as_sse(item: KernelMessage | Gap) -> bytes:
    seq, event = (item.last, b"gap") if isinstance(item, Gap) else (item.seq, b"message")
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, event, _message_as_json(item))


def _message_as_json(item: KernelMessage | Gap) -> bytes:
    """In one line."""
    if isinstance(item, Gap):
        gap = GapModel(item.first, item.last, item.messages, item.size, item.reason)
        return msgspec.json.encode(JournalGap(gap))
    header, parent, metadata, content, *buffers = item.parts
    text = (
        b'{"seq":%d,"channel":"%s","header":%s,"parent_header":%s,"metadata":%s,"content":%s,'
        b'"buffers":%s}'
    ) % (
        item.seq,
        item.channel.encode(),
        header,
        parent,
        metadata,
        content,
        msgspec.json.encode(buffers),
    )
    # A kernel may write newlines between its tokens, and bytes that are no UTF-8.
    return text.replace(b"\n", b" ").decode(errors="replace").encode()

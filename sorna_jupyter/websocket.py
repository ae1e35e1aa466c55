"""One websocket on one kernel: frames in both framings, carried to `Kernels.attach` and back.

jupyter_server's `kernel_websocket_connection_class`. Parts of messages pass through as bytes; what
is made up here is only what no kernel can say: that it died, that the journal has lost something,
and an answer to `kernel_info_request` while it is busy. Nothing is dropped for being too fast: a
client that lags gets the rest from the journal, later.

What the client has is known from its pongs: a ping behind each batch carries the number of its last
message, and every websocket implementation answers pings in order, by itself. So a client that
comes back with the same session id goes on behind the last number that it answered. Messages that
it got in its last round trip before a cut come again; none is left out.
"""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from socket import AF_UNIX, IPPROTO_TCP, TCP_INFO, TCP_QUICKACK
from typing import Any, ClassVar, cast
from weakref import WeakSet

import msgspec
from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from tornado.iostream import IOStream, StreamClosedError
from traitlets import Integer

from sorna_jupyter.exceptions import KernelNotFound, SornaError
from sorna_jupyter.jupyter_manager import SornaMappingKernelManager
from sorna_jupyter.kernels import Kernel
from sorna_jupyter.protocol import (
    LARGE_FRAME,
    Batch,
    Gap,
    KernelMessage,
    KernelStatus,
    make_message,
    pack_number,
    read_number,
)
from sorna_jupyter.unanswered import wait_in_vain
from sorna_jupyter.unattended import UnattendedCells
from sorna_jupyter.wire import (
    JSON_PARTS,
    UNSUPPORTED_DATA,
    V1,
    Framing,
    Header,
    MalformedFrame,
    framing_of,
    read_header,
)

TO_KERNEL = frozenset(("shell", "control", "stdin"))

GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013

REPEATABLE = (b'"status"', b'"execute_input"')
PING_DELAY = 0.1
"""seconds until the client is asked whether it has what may as well come twice"""
MAX_PINGS = 8
"""that wait for their answers at once"""

ADVICE = (
    "Start it with --ServerApp.kernel_websocket_connection_class="
    "sorna_jupyter.remote.gateway_url.GatewayConnection, which can, or open this server's own page."
)

TEXT, BINARY, PING = 0x81, 0x82, 0x89
"""a websocket frame's first byte: final, and what it carries"""

_TCP_INFO = struct.Struct("=24xI92xQ16xI")
"""of Linux's `struct tcp_info`: segments sent and not acknowledged, bytes acknowledged, bytes not
sent yet"""


class SornaWebsocketConnection(BaseKernelWebsocketConnection):
    """What a front-end's websocket does, from its opening to its close."""

    max_unsent_bytes = Integer(
        16 << 20,
        help="Bytes that may wait here for a client that reads slower than its kernel writes. What "
        "is more waits in the kernel's journal at the agent; other clients do not notice.",
    ).tag(config=True)
    proxy_message_limit = Integer(
        10 * 1024 * 1024,
        help="Bytes of the largest message for a jupyter_server that proxies kernels with "
        "--gateway-url: its websocket client closes on anything larger, and the output is lost.",
    ).tag(config=True)

    _open: ClassVar[WeakSet[SornaWebsocketConnection]] = WeakSet()
    _by_session: ClassVar[dict[tuple[str, str], SornaWebsocketConnection]] = {}

    _attachment: Any = None
    _unattended: UnattendedCells | None = None
    _framing: Framing
    _stream: IOStream
    _is_tcp: bool
    """or a Unix socket, of a server that a proxy on this machine stands before"""
    _is_proxy = False
    _unsent = 0
    _is_paused = False
    _has_lagged = False
    """and is not where the others are yet"""
    _written = 0
    """number of the last message written"""
    _late_ping: asyncio.TimerHandle | None = None
    _asked = 0
    """…and of the last one that a ping was sent behind"""
    _waits_for_client = False
    _taken_by_client = 0
    """bytes; both when `is_draining` was asked last"""
    _ending: asyncio.Task[None] | None = None
    """looks for cells whose end is lost"""

    multi_kernel_manager: SornaMappingKernelManager

    # -- jupyter_server's hooks

    async def connect(self) -> None:
        """Called once the handshake is done; nothing is read from the client before it returns."""
        handler = self.websocket_handler
        # Without it each answer waits for the client's delayed acknowledgement: 40 ms.
        handler.set_nodelay(True)
        assert handler.ws_connection is not None
        self._stream = cast(IOStream, handler.ws_connection.stream)
        self._is_tcp = self._stream.socket.family != AF_UNIX
        self._framing = framing_of(handler.selected_subprotocol)
        self._unanswered: dict[str, bytes] = {}
        self._last_answered: bytes | None = None
        self._questions: dict[str, asyncio.Future[None]] = {}
        self._pings: deque[int] = deque()
        self._loop = asyncio.get_running_loop()
        # Asked of traits for every message, these would cost more than the message.
        self._allowed = self.multi_kernel_manager.allowed_message_types
        self._hides_tracebacks = not self.multi_kernel_manager.allow_tracebacks
        self._unattended = self.multi_kernel_manager.unattended
        self._is_compressed = handler.get_compression_options() is not None
        self._is_proxy = handler.selected_subprotocol is None and is_proxy(
            handler.request.headers.get("User-Agent", "")
        )
        self._replace_older()
        self._open.add(self)
        try:
            self._attachment = self.multi_kernel_manager.kernels.attach(
                self.kernel_id, self.session_id, self, counts=True, resumes=True
            )
        except KernelNotFound as error:
            # It ended between the handshake and now.
            self._tell_death(f"{error.message}\n")
            return
        except SornaError as error:
            self._close(TRY_AGAIN_LATER, error.message)
            return
        self._unanswered = self.kernel.unanswered.setdefault(self.session_id, {})
        if unattended := self._unattended:
            unattended.connected(self.kernel, self.session_id)
        if self.kernel.status is KernelStatus.PREPARING:
            self._say("iopub", "status", {"execution_state": "starting"})

    def disconnect(self) -> None:  # type: ignore[override]  # what jupyter_server calls
        """Called when the client is gone; safe to repeat. Not a coroutine: nobody awaits it."""
        self._open.discard(self)
        if self._late_ping is not None:
            self._late_ping.cancel()
        key = (self.kernel_id, self.session_id)
        if self._by_session.get(key) is self:
            del self._by_session[key]
        self._stop_looking()
        if self._attachment is not None:
            if not self._unanswered:
                self.kernel.unanswered.pop(self.session_id, None)
            self._attachment.close()
            self._attachment = None
            if unattended := self._unattended:
                unattended.disconnected(self.kernel_id, self.session_id)

    @classmethod
    async def close_all(cls) -> None:
        """Called when the server stops: clients see 1001 and come back to its next start."""
        for connection in list(cls._open):
            connection._close(GOING_AWAY, "the server is stopping")

    def handle_incoming_message(self, incoming_msg: bytes | str) -> None:
        try:
            channel, parts = self._framing.decode(incoming_msg)
            header = read_header(parts[0])
            if channel not in TO_KERNEL:
                raise MalformedFrame(f"No messages can be sent on {channel!r}", UNSUPPORTED_DATA)
        except MalformedFrame as error:
            self.log.warning("kernel %s: %s; closing the websocket", self.kernel_id, error.message)
            self._close(error.close_code, error.message)
            return
        if self._attachment is None:
            return  # the kernel is over, which the client was told
        if self._allowed and header.msg_type not in self._allowed:
            self.log.warning("kernel %s: %r is not allowed", self.kernel_id, header.msg_type)
        elif self._knows_the_answer(channel, header):
            self._answer_kernel_info(channel, parts[0])
        else:
            if header.msg_type == "execute_request":
                self._unanswered[header.msg_id] = parts[0]
                if self._unattended:
                    self._unattended.executed(self.kernel, self.session_id, parts)
            self._send(channel, parts)

    def _send(self, channel: str, parts: list[bytes]) -> None:
        try:
            self._attachment.send(channel, parts)
        except SornaError as error:
            # The client comes back, and then it is told how the kernel is.
            self.log.warning("kernel %s: %s", self.kernel_id, error.message)
            self._close(TRY_AGAIN_LATER, error.message)

    def is_draining(self) -> bool:
        """Whether of what waited for the client when this was asked last it has taken some since.

        It is alive then, although its pong, which comes behind all of that, may take minutes.
        """
        if not self._is_tcp or self._stream.closed():
            return False
        waited, taken_before = self._waits_for_client, self._taken_by_client
        # Counted by the system, and so also within one large frame and whatever wrote it.
        info = self._stream.socket.getsockopt(IPPROTO_TCP, TCP_INFO, _TCP_INFO.size)
        unacknowledged, self._taken_by_client, unsent = _TCP_INFO.unpack(info)
        self._waits_for_client = unacknowledged + unsent > 0
        return waited and self._taken_by_client > taken_before

    # -- `Listener`

    def on_kernel_messages(self, batch: Batch) -> None:
        if self._questions and (others := self._take_answers(batch)) is not batch:
            self._written = batch.next - 1
            if others is None:
                return
            batch = others
        if self._has_lagged:
            if self._attachment.is_behind:
                batch = with_streams_joined(batch)
            else:
                self._has_lagged = False
        if not batch.for_everyone:
            for message in batch.messages:
                if message.channel == "shell" and b'"execute_reply"' in message.header:
                    self._forget_answered(message)
        if self._hides_tracebacks or self._is_proxy or self._is_compressed:
            pieces = []
            for message in batch.messages:
                hides_it = self._hides_tracebacks and message.channel == "iopub"
                parts = self._without_traceback(message.parts) if hides_it else message.parts
                self._write_parts(message.channel, parts)
        else:
            pieces = self._encoded(batch)
        self._written = batch.next - 1
        ping = b""
        if not self._may_come_twice(batch):
            ping = self._ping()
        elif self._late_ping is None:
            self._late_ping = self._loop.call_later(PING_DELAY, self._ping_late)
        if pieces and len(pieces[-1]) < LARGE_FRAME:
            ping = bytes(pieces[-1]) + ping
            pieces = pieces[:-1]
        for piece in pieces:
            self._write_bytes(piece)
        self._write_bytes(ping)

    def on_kernel_gap(self, gap: Gap) -> None:
        what = "Output" if gap.messages is None else f"{gap.messages} messages"
        self._say_stderr(f"[{what} may be missing here: {gap.reason}]\n", self._running)
        self._written = gap.last
        if self._unanswered or self._last_answered:
            self._stop_looking()  # what that would find, this does
            self._ending = asyncio.create_task(
                self._end_what_was_lost(gap.reason), name=f"lost ends of {self.session_id}"
            )

    def on_pong(self, data: bytes) -> None:
        """The client has everything up to the number that the ping carried."""
        # A client without TCP_NODELAY sends its next request only when this one is acknowledged,
        # which the system would put off for 40 ms.
        if self._is_tcp:
            self._stream.socket.setsockopt(IPPROTO_TCP, TCP_QUICKACK, 1)
        seq = read_number(data)
        if seq not in self._pings:
            return  # unasked for
        while self._pings[0] != seq:
            self._pings.popleft()
        self._pings.popleft()
        if self._attachment is not None:
            self._attachment.acknowledge(seq)
            if unattended := self._unattended:
                unattended.acknowledged(self.kernel_id, self.session_id, seq)
        self._write_bytes(self._ping())

    def _ping(self) -> bytes:
        """Ask whether the client has what was written; while many wait for an answer, later."""
        if self._written == self._asked or len(self._pings) >= MAX_PINGS:
            return b""
        self._asked = self._written
        self._pings.append(self._written)
        payload = pack_number(self._written)
        return frame_head(PING, len(payload)) + payload

    def _ping_late(self) -> None:
        self._late_ping = None
        self._write_bytes(self._ping())

    def _may_come_twice(self, batch: Batch) -> bool:
        """Whether a client that gets this again sees no difference: replies that it has taken, and
        how its kernel is."""
        messages = batch.messages
        return len(messages) <= 4 and all(
            message.channel == "shell" or any(name in message.header for name in REPEATABLE)
            for message in messages
        )

    # -- ends that nobody heard

    async def _end_what_was_lost(self, reason: str) -> None:
        """Front-ends show a cell as running until its reply and its idle are there."""
        last_answered = self._last_answered
        for msg_id in await wait_in_vain(self._in_the_main_shell, self._ask):
            self._end(msg_id, reason)
        if last_answered is not None:  # it may have lost its idle alone; twice does no harm
            self._say_idle(last_answered)

    def _stop_looking(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _in_the_main_shell(self) -> list[str]:
        """Unanswered requests: our question says nothing of those in other subshells."""
        return [
            msg_id
            for msg_id, header in self._unanswered.items()
            if read_header(header).subshell_id is None
        ]

    async def _ask(self) -> None:
        """Returns when the kernel has answered a question, of which the client sees nothing."""
        msg_id = uuid.uuid4().hex
        question = make_message("kernel_info_request", {}, msg_id=msg_id, session=self.session_id)
        self._questions[msg_id] = self._loop.create_future()
        try:
            self._send("shell", question)
            await self._questions[msg_id]
        finally:
            del self._questions[msg_id]

    def _take_answers(self, batch: Batch) -> Batch | None:
        """What of the batch is not an answer to a question of ours."""
        others = [message for message in batch.messages if not self._take_answer(message)]
        if len(others) == len(batch.messages):
            return batch
        return Batch(others) if others else None

    def _take_answer(self, message: KernelMessage) -> bool:
        if message.channel != "shell" or b'"kernel_info_reply"' not in message.header:
            return False
        with suppress(MalformedFrame):  # a kernel may write what it likes
            question = self._questions.get(read_header(message.parts[1]).msg_id)
            if question is not None and not question.done():
                question.set_result(None)
            return question is not None
        return False

    def _end(self, msg_id: str, reason: str) -> None:
        what = "Whether this ran to its end is not known"
        parent = self._unanswered.pop(msg_id)
        self._say_stderr(f"[{what}: {reason}]\n", parent)
        reply: dict[str, Any] = {
            "status": "error",
            "execution_count": None,
            "ename": "ReplyLost",
            "evalue": f"{what}: {reason}",
            "traceback": [],
        }
        self._say("shell", "execute_reply", reply, parent)
        self._say_idle(parent)
        if unattended := self._unattended:
            unattended.answered(self.kernel_id, self.session_id, msg_id, self._written)

    def _say_idle(self, parent: bytes) -> None:
        """It ends a request in a client's eyes; the last word is the truth."""
        self._say("iopub", "status", {"execution_state": "idle"}, parent)
        if self.kernel.execution_state == "busy":
            self._say("iopub", "status", {"execution_state": "busy"}, parent)

    # -- the kernel's life

    def on_kernel_event(self, kernel: Kernel) -> None:
        match kernel.status:
            case KernelStatus.DEAD:
                self._tell_death(f"The kernel died: {kernel.reason}\n")
            case KernelStatus.TERMINATED:
                self._tell_death(f"The kernel was stopped: {kernel.reason}\n")
            case KernelStatus.LOST:
                self._say_stderr(f"The kernel is out of reach: {kernel.reason}\n", self._running)
            case KernelStatus.RESTARTING:
                self._last_answered = None
                self._stop_looking()
            # Nothing is said of a restart: front-ends wait for the REST call's answer, and would
            # take a status for another restart, that nobody asked for.

    def _forget_answered(self, message: KernelMessage) -> None:
        with suppress(MalformedFrame):  # a kernel may write what it likes
            msg_id = read_header(message.parts[1]).msg_id
            self._last_answered = self._unanswered.pop(msg_id, self._last_answered)
            if unattended := self._unattended:
                unattended.answered(self.kernel_id, self.session_id, msg_id, message.seq)

    @property
    def _running(self) -> bytes:
        """The request whose cell runs: output with any other parent is shown nowhere."""
        return next(iter(self._unanswered.values()), b"{}")

    def _tell_death(self, note: str) -> None:
        """The socket stays open, as everywhere: front-ends close it when they have shown it."""
        self._say_stderr(note, self._running)
        self._stop_looking()
        self._unanswered.clear()
        self._say("iopub", "status", {"execution_state": "dead"})
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None

    # -- messages of our own

    @property
    def kernel(self) -> Kernel:
        """While it is attached."""
        kernel: Kernel = self._attachment.kernel
        return kernel

    def _knows_the_answer(self, channel: str, header: Header) -> bool:
        """Front-ends hold back everything until their kernel_info_request is answered, which a
        busy kernel does only when its cell is done."""
        return (
            header.msg_type == "kernel_info_request"
            and channel == "shell"
            and header.subshell_id is None
            and self.kernel.status is KernelStatus.RUNNING
            and self.kernel.execution_state == "busy"
            and self.kernel.kernel_info is not None
        )

    def _answer_kernel_info(self, channel: str, parent: bytes) -> None:
        info = {"status": "ok", **(self.kernel.kernel_info or {})}
        self._say("iopub", "status", {"execution_state": "busy"}, parent)
        self._say(channel, "kernel_info_reply", info, parent)
        self._say_idle(parent)

    def _say_stderr(self, text: str, parent: bytes = b"{}") -> None:
        self._say("iopub", "stream", {"name": "stderr", "text": text}, parent)

    def _say(
        self, channel: str, msg_type: str, content: dict[str, Any], parent: bytes = b"{}"
    ) -> None:
        self._write(self._framing.encode(channel, make_message(msg_type, content, parent=parent)))

    # -- on the wire

    def _encoded(self, batch: Batch) -> list[bytes | memoryview]:
        """The batch's websocket frames, made once for all sockets of the same framing: small ones
        in one piece, what is large as it lies in memory."""
        pieces: list[bytes | memoryview] | None = batch.encoded.get(self._framing)
        if pieces is None:
            pieces = batch.encoded[self._framing] = []
            small: list[bytes | memoryview] = []
            for part in self._frames(batch):
                if len(part) < LARGE_FRAME:
                    small.append(part)
                else:
                    pieces += [b"".join(small), part]
                    small = []
            if small:
                pieces.append(b"".join(small))
        return pieces

    def _frames(self, batch: Batch) -> Iterator[bytes | memoryview]:
        if self._framing is V1:
            for message in batch.messages:
                yield frame_head(BINARY, len(message.frame))
                yield message.frame
            return
        for message in batch.messages:
            try:
                frame = self._framing.encode(message.channel, message.parts)
            except MalformedFrame as error:
                self.log.warning("kernel %s: %s", self.kernel_id, error.message)
            else:
                yield websocket_frame(frame)

    def _write_parts(self, channel: str, parts: list[bytes]) -> None:
        """For the few sockets that can't get the same frame as all others."""
        try:
            if self._is_proxy and (note := self._unfit_for_proxy(parts)):
                self._say_stderr(note, parts[1])
                parts = self._reduced(channel, parts)
                if not parts:
                    return
            frame = self._framing.encode(channel, parts)
        except MalformedFrame as error:
            self.log.warning("kernel %s: %s", self.kernel_id, error.message)
        else:
            self._write(frame)

    def _unfit_for_proxy(self, parts: list[bytes]) -> str:
        """Why a jupyter_server with --gateway-url can't take this message; empty if it can.

        On a binary frame its reader ends for good, without an error; above 10 MiB its client
        closes the socket.
        """
        size = sum(map(len, parts))
        if self._too_big(parts[:JSON_PARTS]):
            limit = self.proxy_message_limit / 2**20
            what = f"An output of {size / 2**20:.1f} MiB was left out"
            why = f"jupyter_server's --gateway-url carries no more than {limit:.0f} MiB"
            return f"[{what}: {why}. {ADVICE}]\n"
        if len(parts) > JSON_PARTS:
            what = "Binary buffers were left out, and widgets that need them stay empty"
            return f"[{what}: jupyter_server's --gateway-url can't carry them. {ADVICE}]\n"
        return ""

    def _too_big(self, parts: list[bytes]) -> bool:
        envelope = 4096  # what the framing adds, and the names that stand there twice
        return sum(map(len, parts)) + envelope > self.proxy_message_limit

    def _reduced(self, channel: str, parts: list[bytes]) -> list[bytes]:
        parts = parts[:JSON_PARTS]
        if not self._too_big(parts):
            return parts
        if channel == "iopub":
            return []
        # Someone waits for this reply.
        error = {"status": "error", "ename": "MessageTooLarge", "evalue": "", "traceback": []}
        return [*parts[:3], msgspec.json.encode(error)]

    def _without_traceback(self, parts: list[bytes]) -> list[bytes]:
        """For servers that set `allow_tracebacks = False`."""
        try:
            if read_header(parts[0]).msg_type != "error":
                return parts
        except MalformedFrame:
            return parts
        content = {
            "ename": "ExecutionError",
            "evalue": "Execution error",
            "traceback": [self.multi_kernel_manager.traceback_replacement_message],
        }
        return [*parts[:3], msgspec.json.encode(content), *parts[JSON_PARTS:]]

    def _write(self, frame: bytes | str) -> None:
        handler = self.websocket_handler
        if self._is_compressed:
            if handler.ws_connection is not None and not handler.ws_connection.is_closing():
                handler.write_message(frame, binary=isinstance(frame, bytes))
        else:
            self._write_bytes(websocket_frame(frame))

    def _write_bytes(self, data: bytes | memoryview) -> None:
        """Straight to the stream: `write_message` would start a task for every message."""
        if not data:
            return
        connection = self.websocket_handler.ws_connection
        if connection is None or connection.is_closing():
            return
        try:
            written = self._stream.write(data)
        except StreamClosedError:
            return  # `disconnect` comes
        if not written.done():
            self._unsent += len(data)
            written.add_done_callback(partial(self._drained, len(data)))
            if self._unsent > self.max_unsent_bytes and not self._is_paused:
                self._is_paused = self._has_lagged = True
                if self._attachment is not None:
                    self._attachment.pause()

    def _drained(self, size: int, written: asyncio.Future[None]) -> None:
        self._unsent -= size
        if written.cancelled() or written.exception():
            return  # a closed stream: `disconnect` tells it
        if self._is_paused and self._unsent * 4 < self.max_unsent_bytes:
            self._is_paused = False
            if self._attachment is not None:
                self._attachment.resume()

    def _close(self, code: int, reason: str) -> None:
        # A close frame has room for 123 bytes of reason.
        self.websocket_handler.close(code, reason.encode()[:120].decode(errors="ignore"))

    def _replace_older(self) -> None:
        """A client that lost its connection is back before we noticed: the old socket goes.

        Its attachment is closed first, and the new one opened after it: both have the same
        session at the relay.
        """
        key = (self.kernel_id, self.session_id)
        older = self._by_session.get(key)
        self._by_session[key] = self
        if older is not None:
            self.log.info("kernel %s: session %s is back", self.kernel_id, self.session_id)
            older.disconnect()
            older._close(GOING_AWAY, "replaced by a newer websocket of the same session")


class _Stream(msgspec.Struct):
    name: str
    text: str


def with_streams_joined(batch: Batch) -> Batch:
    """For a client that can't follow a flood of tiny prints: what a cell wrote to one stream in a
    row is one message, under the last one's header. The text is the same."""
    joined: list[KernelMessage] = []
    streams: list[_Stream | None] = []
    for message in batch.messages:
        stream = _stream_of(message)
        last = streams[-1] if streams else None
        if stream and last and stream.name == last.name and _same_parent(joined[-1], message):
            stream.text = last.text + stream.text
            joined.pop()
            streams.pop()
        joined.append(message)
        streams.append(stream)
    for place, (message, stream) in enumerate(zip(joined, streams, strict=True)):
        if stream is not None:
            parts = [*message.parts[:3], msgspec.json.encode(stream)]
            joined[place] = KernelMessage.of(
                message.kernel_id, message.seq, message.session, message.channel, parts
            )
    return Batch(joined)


def _stream_of(message: KernelMessage) -> _Stream | None:
    if message.channel != "iopub" or b'"stream"' not in message.header:
        return None
    try:
        if message.msg_type == "stream" and len(message.parts) == JSON_PARTS:
            return msgspec.json.decode(message.parts[3], type=_Stream)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # a kernel may write what it likes; it passes as it came
    return None


def _same_parent(one: KernelMessage, other: KernelMessage) -> bool:
    return one.parts[1] == other.parts[1]


def is_proxy(user_agent: str) -> bool:
    """Whether this may be jupyter_server's own client for `--gateway-url`."""
    return user_agent.startswith("Tornado/")


def websocket_frame(payload: bytes | str) -> bytes:
    """A server's whole websocket frame (RFC 6455): text for `str`, binary for `bytes`."""
    data = payload.encode() if isinstance(payload, str) else payload
    return frame_head(TEXT if isinstance(payload, str) else BINARY, len(data)) + data


def frame_head(first: int, size: int) -> bytes:
    """What stands before a frame's payload of `size` bytes."""
    if size < 126:
        return struct.pack("!BB", first, size)
    if size < 1 << 16:
        return struct.pack("!BBH", first, 126, size)
    return struct.pack("!BBQ", first, 127, size)

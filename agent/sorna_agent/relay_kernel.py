"""The relay's side towards one kernel: its sockets, its journal, whether it is busy.

Frames are copied, never decoded, but for what activity tracking needs. Signatures are checked on
the way out and made on the way in: the kernel's key stays here. Used by `relay`, one `KernelSide` a
kernel; the relay's loop calls the handlers that it registers with `Watcher`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import zmq

from sorna_agent.journal import Journal
from sorna_agent.poller import Handler, Poller, Socket
from sorna_jupyter.protocol import (
    CHANNELS,
    UNTRACKED,
    Activity,
    LossNote,
    make_message,
    pack_note,
    pack_record,
    read_header,
    read_status,
    receive_frames,
    send_frames,
)

log = logging.getLogger(__name__)

DELIMITER = b"<IDS|MSG>"
IOPUB, SHELL, CONTROL, STDIN = range(len(CHANNELS))
PORTS = {SHELL: 1, IOPUB: 2, STDIN: 3, CONTROL: 4}
CLIENT_CHANNELS = {b"shell": SHELL, b"control": CONTROL, b"stdin": STDIN}
BATCH = 200
"""messages taken from one socket before the others get their turn"""
BATCH_BYTES = 1 << 20
"""…or bytes, whichever is reached first"""
SOON_ENOUGH = 64 << 10
"""bytes found at once that are worth a message to the gateways, whatever they are"""
GATEWAY_THREAD, KERNEL_THREAD = 1, 2
"""ZeroMQ's, as bits. A kernel drops what it can't get rid of (1000 messages wait, then no more), so
whoever reads from kernels must not be busy encrypting for gateways."""
MAX_SESSIONS = 1000
"""client sessions whose place in the journal is remembered, a kernel; the oldest go first"""
CLOSE_GRACE = 10.0
"""seconds that a closed session's sockets stay, and as long as the kernel is busy: replies that are
under way still reach the journal, and a client that comes right back finds them"""
FIRST_RESEND, LAST_RESEND = 0.05, 0.4
"""seconds between kernel_info requests to a kernel that does not answer yet"""
LAST_WORDS = 0.1
"""seconds that an ended process' sockets are still read"""
STDIN_GRACE = 5.0
"""seconds that messages wait for stdin to be connected; every kernel should have one"""
ENOUGH_REPLIES = 4
"""kernel_info replies after which a kernel counts as ready though it never sent on iopub"""

STATES = {"starting": Activity.STARTING, "idle": Activity.IDLE, "busy": Activity.BUSY}
"""Jupyter's. Beats carry them, so a kernel must not make up its own, of any length."""

PROBE_SESSION = f"sorna-relay-{secrets.token_hex(8)}"
"""Session of the relay's own requests. Clients never see what answers it."""
_PROBE_MARK = PROBE_SESSION.encode()


class Urgency(enum.IntEnum):
    """How soon clients should have something."""

    LATER = 0
    """that the kernel begins with something"""
    SOON = 1
    """output"""
    ONE_OF_TWO = 2
    """the reply or the `idle` of an execution, whichever comes first"""
    NOW = 3
    """the other one, or what asks for something"""


class Watcher(Protocol):
    """What the relay's loop offers."""

    context: zmq.Context[Socket]
    poller: Poller

    def call_later(self, seconds: float, action: Callable[[], None]) -> None: ...
    def on_output(self, kernel: KernelSide, urgency: Urgency = ...) -> None: ...
    def on_activity(self, kernel: KernelSide) -> None: ...
    def on_ready(self, kernel: KernelSide, opening: int, kernel_info: dict[str, Any]) -> None: ...


class Signer:
    """Jupyter's message signatures under one key; an empty key means none."""

    def __init__(self, key: str) -> None:
        self._keyed = hmac.new(key.encode(), digestmod=hashlib.sha256) if key else None

    def sign(self, parts: list[bytes]) -> bytes:
        if self._keyed is None:
            return b""
        mac = self._keyed.copy()
        for part in parts[:4]:
            mac.update(part)
        return mac.hexdigest().encode()

    def verify(self, parts: list[bytes], signature: bytes) -> bool:
        return self._keyed is None or hmac.compare_digest(self.sign(parts), signature)


@dataclass(slots=True)
class Session:
    """One client of this kernel, and the gateways that hold it open."""

    owners: set[bytes] = field(default_factory=set)
    sockets: dict[int, Socket] = field(default_factory=dict)
    """by channel"""
    close_at: float | None = None
    waiting: list[tuple[int, list[bytes]]] | None = None
    """channel and frames of what is sent once stdin is connected; None: it is"""


@dataclass(slots=True, eq=False)
class Cursor:
    """A gateway's subscription: what it gets next, and how many bytes it has room for."""

    route: bytes
    id: bytes
    seq: int
    credit: int
    is_new: bool = True
    """has not been told anything yet"""


class _Probe:
    """Asks kernel_info until the kernel has answered and iopub is known to reach us."""

    def __init__(self, opening: int, socket: Socket) -> None:
        self.opening = opening
        self.socket = socket
        self.pause = FIRST_RESEND
        self.has_asked = False
        self.replies = 0
        self.heard_iopub = False


class KernelSide:
    """One kernel: connected or (between processes, or dead) detached; its journal stays."""

    def __init__(
        self, watcher: Watcher, kernel_id: bytes, journal: Journal, max_message: int
    ) -> None:
        self.id = kernel_id
        self.journal = journal
        self.cursors: dict[tuple[bytes, bytes], Cursor] = {}
        """by route and subscription"""
        self.execution_state = "starting"
        self.last_activity = time.time()
        self._watcher = watcher
        self._max_message = max_message
        self._address: str | None = None
        self._signer = Signer("")
        self._iopub: Socket | None = None
        self._sessions: dict[bytes, Session] = {}
        self._read_by: OrderedDict[bytes, int] = OrderedDict()
        """session → number of the first record that its client has not acknowledged"""
        self._probe: _Probe | None = None
        self._is_active = False
        self._is_resting = False
        self._urgency = Urgency.LATER
        self._half_ended = b""
        """parent header of what had its reply or its `idle` last"""
        self.sent_at = 0.0
        """monotonic time at which something of it was last sent on"""

    @property
    def is_connected(self) -> bool:
        return self._address is not None

    # -- connecting and letting go -----------------------------------------------------------

    def connect(
        self, address: str, key: str, opening: int, ask_ready: bool, execution_state: str
    ) -> None:
        """Connect to this process of the kernel, which need not have bound its sockets yet."""
        self.detach()
        self._address = address
        self._signer = Signer(key)
        self.execution_state = execution_state
        self._iopub = self._connect(zmq.SUB, IOPUB)
        self._watcher.poller.watch(self._iopub, lambda socket: self._drain(socket, b"", IOPUB))
        for session_id, session in self._sessions.items():
            self._connect_session(session_id, session)
        if ask_ready:
            socket = self._connect(zmq.DEALER, SHELL, IMMEDIATE=1)
            self._probe = _Probe(opening, socket)
            # IMMEDIATE: writable is it only once the kernel is there.
            self._watcher.poller.watch(socket, self._ask, zmq.POLLOUT)

    def detach_soon(self) -> None:
        """For a process that has ended: what it sent last may still be on its way to us."""
        address = self._address

        def detach() -> None:
            if self._address is address:
                self.detach()

        self._watcher.call_later(LAST_WORDS, detach)

    def detach(self) -> None:
        """Read what the process still sent, then close its sockets."""
        if self._iopub is not None:
            self._drain(self._iopub, b"", IOPUB, limit=None)
        for session_id, session in list(self._sessions.items()):
            for channel, socket in session.sockets.items():
                self._drain(socket, session_id, channel, limit=None)
            self._close_sockets(session)
        self._stop_asking()
        if self._iopub is not None:
            self._close(self._iopub)
            self._iopub = None
            self._is_resting = False
        self._address = None

    def _connect(self, kind: int, channel: int, routing_id: bytes = b"", **options: int) -> Socket:
        socket = self._watcher.context.socket(kind)
        socket.linger = 0
        socket.reconnect_ivl = 15  # constant: a kernel that starts is found at once
        socket.rcvhwm = 0
        socket.setsockopt(zmq.AFFINITY, KERNEL_THREAD)
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name), value)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        if routing_id:
            socket.setsockopt(zmq.ROUTING_ID, routing_id)
        socket.connect(f"ipc://{self._address}-{PORTS[channel]}")
        return socket

    def _close(self, socket: Socket) -> None:
        self._watcher.poller.unwatch(socket)
        socket.close()

    # -- sessions ----------------------------------------------------------------------------

    def open_session(self, session_id: bytes, owner: bytes) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session()
            if self.is_connected:
                self._connect_session(session_id, session)
        session.owners.add(owner)
        session.close_at = None
        return session

    def close_session(self, session_id: bytes, owner: bytes, now: float) -> None:
        session = self._sessions.get(session_id)
        if session is not None:
            session.owners.discard(owner)
            if not session.owners and session.close_at is None:
                session.close_at = now + CLOSE_GRACE

    def unread_by(self, session_id: bytes) -> int:
        """Number of the first record that this client has not acknowledged; for one that was never
        here, of the next that will be written."""
        seq = self._read_by.setdefault(session_id, self.journal.next)
        self._read_by.move_to_end(session_id)
        if len(self._read_by) > MAX_SESSIONS:
            self._read_by.popitem(last=False)
        return seq

    def acknowledge(self, session_id: bytes, seq: int) -> None:
        if session_id in self._read_by:
            known = self._read_by[session_id]
            self._read_by[session_id] = max(known, min(seq + 1, self.journal.next))

    def forget_gateway(self, route: bytes, now: float) -> None:
        for key in [key for key in self.cursors if key[0] == route]:
            del self.cursors[key]
        for session_id in list(self._sessions):
            self.close_session(session_id, route, now)

    def close_ended_sessions(self, now: float) -> None:
        for session_id, session in list(self._sessions.items()):
            is_over = session.close_at is not None and session.close_at <= now
            if is_over and self.execution_state != "busy":
                self._close_sockets(session)
                del self._sessions[session_id]

    def _connect_session(self, session_id: bytes, session: Session) -> None:
        # Replies on stdin are routed by the id that shell has, so all share it; otherwise
        # input() never returns.
        routing_id = as_routing_id(session_id)
        for channel in CLIENT_CHANNELS.values():
            # IMMEDIATE: stdin is writable only once it is connected.
            socket = self._connect(
                zmq.DEALER, channel, routing_id, SNDHWM=10_000, IMMEDIATE=channel == STDIN
            )
            session.sockets[channel] = socket

            def drain(socket: Socket, channel: int = channel) -> bool:
                return self._drain(socket, session_id, channel)

            self._watcher.poller.watch(socket, drain)
            if channel == STDIN:
                self._wait_for_stdin(session, socket, drain)

    def _wait_for_stdin(self, session: Session, stdin: Socket, drain: Handler) -> None:
        """Hold back requests until the kernel can reach the client's stdin.

        A kernel's ROUTER drops what it has no connection for: the prompt of an `input()` in the
        very first cell would be lost, and the cell would wait for ever.
        """
        session.waiting = []

        def send_waiting(_: Socket) -> None:
            if session.sockets.get(STDIN) is not stdin or session.waiting is None:
                return  # another process of the kernel by now, or already done
            self._watcher.poller.watch(stdin, drain)
            waiting, session.waiting = session.waiting, None
            for channel, frames in waiting:
                self._send_frames(session, channel, frames)

        self._watcher.poller.watch(stdin, send_waiting, zmq.POLLOUT)
        self._watcher.call_later(STDIN_GRACE, lambda: send_waiting(stdin))

    def _close_sockets(self, session: Session) -> None:
        for socket in session.sockets.values():
            self._close(socket)
        session.sockets.clear()
        session.waiting = None

    # -- to the kernel -----------------------------------------------------------------------

    def send(self, session_id: bytes, owner: bytes, name: bytes, parts: list[bytes]) -> None:
        """Sign and send; a session that is not open gets opened."""
        channel = CLIENT_CHANNELS.get(name)
        if channel is None:
            log.warning("kernel %s: no messages can be sent on %r: it is lost", self, name[:20])
            return
        session = self._sessions.get(session_id)
        if session is None or owner not in session.owners:
            session = self.open_session(session_id, owner)
        frames = [DELIMITER, self._signer.sign(parts), *parts]
        if session.waiting is not None:
            session.waiting.append((channel, frames))
        else:
            self._send_frames(session, channel, frames)

    def _send_frames(self, session: Session, channel: int, frames: list[bytes]) -> None:
        socket = session.sockets.get(channel)
        if socket is None:
            log.warning(
                "kernel %s: no socket for a message on %s: it is lost", self, CHANNELS[channel]
            )
            return
        try:
            send_frames(socket, frames)
            self._watcher.poller.look_again(socket)
        except zmq.Again:
            log.warning(
                "kernel %s: has not read for long, a message on %s is lost",
                self,
                CHANNELS[channel],
            )

    def interrupt(self) -> None:
        if not self.is_connected:
            return
        socket = self._connect(zmq.DEALER, CONTROL, LINGER=2000)
        socket.send_multipart(self._own_request("interrupt_request"))
        socket.close()  # lingers until it is sent

    def _own_request(self, msg_type: str) -> list[bytes]:
        parts = make_message(msg_type, {}, session=PROBE_SESSION)
        return [DELIMITER, self._signer.sign(parts), *parts]

    # -- readiness ---------------------------------------------------------------------------

    def _ask(self, socket: Socket) -> None:
        probe = self._probe
        if probe is None or probe.socket is not socket:
            return  # answered, or over
        try:
            send_frames(socket, self._own_request("kernel_info_request"))
            self._watcher.poller.look_again(socket)
        except zmq.Again:
            log.debug("kernel %s: not there yet", self)
        if not probe.has_asked:
            probe.has_asked = True
            self._watcher.poller.watch(socket, self._drain_probe)
        self._watcher.call_later(probe.pause, lambda: self._ask(socket))
        probe.pause = min(probe.pause * 2, LAST_RESEND)

    def _drain_probe(self, socket: Socket) -> bool:
        return self._drain(socket, b"", SHELL)

    def _take_own(self, channel: int, parts: list[bytes]) -> None:
        """Something that answers the relay's own request."""
        probe = self._probe
        if probe is None or channel != SHELL or b'"kernel_info_reply"' not in parts[0]:
            return
        probe.replies += 1
        if probe.heard_iopub or probe.replies >= ENOUGH_REPLIES:
            self._stop_asking()
            if self.execution_state == "starting":
                self.execution_state = "idle"
                self._watcher.on_activity(self)
            self._watcher.on_ready(self, probe.opening, msgspec.json.decode(parts[3]))

    def _stop_asking(self) -> None:
        if self._probe is not None:
            self._close(self._probe.socket)
            self._probe = None

    # -- from the kernel ---------------------------------------------------------------------

    def note_loss(self, reason: str) -> None:
        """Where nobody listened: whoever reads the journal learns that something may miss here."""
        self.journal.append(pack_note(LossNote(reason=reason)))
        self._watcher.on_output(self)

    def rest(self) -> None:
        """Let output gather, until `wake` or until the kernel says something on another channel:
        then it is done, or asks."""
        if self._iopub is not None and not self._is_resting:
            self._is_resting = True
            self._watcher.poller.rest(self._iopub)

    def wake(self) -> None:
        if self._iopub is not None and self._is_resting:
            self._is_resting = False
            self._watcher.poller.wake(self._iopub)

    def _drain(
        self, socket: Socket, session_id: bytes, channel: int, limit: int | None = BATCH
    ) -> bool:
        """Whether there may be more."""
        if self._is_resting and channel != IOPUB and self._iopub is not None:
            self.wake()
            self._drain(self._iopub, b"", IOPUB, limit=limit)  # it came before this
        taken = size = 0
        is_empty = False
        while (limit is None or (taken < limit and size < BATCH_BYTES)) and not socket.closed:
            try:
                frames = receive_frames(socket)
            except zmq.Again:
                is_empty = True
                break
            taken += 1
            try:
                size += self._take(session_id, channel, frames)
            except Exception as error:  # whatever one kernel sends, the others go on
                log.warning("kernel %s: bad message on %s: %s", self, CHANNELS[channel], error)
        if self._is_active:
            self._is_active = False
            self.last_activity = time.time()
            self._watcher.on_activity(self)
        if taken:
            is_much = not is_empty or size > SOON_ENOUGH
            self._watcher.on_output(self, Urgency.NOW if is_much else self._urgency)
            self._urgency = Urgency.LATER
        return not is_empty

    def _take(self, session_id: bytes, channel: int, frames: list[bytes]) -> int:
        """Returns the record's size."""
        # iopub's topic or a ROUTER's identities stand before it, and only few of them.
        begin = frames.index(DELIMITER) + 2
        signature, parts = frames[begin - 1], frames[begin:]
        if len(parts) < 4:
            raise ValueError("too few frames")
        parts[:2] = map(bytes, parts[:2])
        if not self._signer.verify(parts, signature):
            raise ValueError("wrong signature")
        if channel == IOPUB and self._probe is not None:
            self._probe.heard_iopub = True
        if _PROBE_MARK in parts[1]:
            self._take_own(channel, parts)
            return 0
        activity = Activity.NOTHING
        if channel == IOPUB:
            if b'"iopub_welcome"' in parts[0]:
                return 0
            activity = self._activity_of(parts)
            if activity:
                self._is_active = True
        if (size := sum(map(len, parts))) > self._max_message:
            parts = self._too_large(channel, parts, size)
        self._urgency = max(self._urgency, self._urgency_of(channel, activity, parts))
        record = pack_record(channel, activity, session_id, parts)
        self.journal.append(record)
        return len(record)

    def _too_large(self, channel: int, parts: list[bytes], size: int) -> list[bytes]:
        """What stands in its place: a line on stderr, or an error to whoever waits for a reply."""
        text = (
            f"[A message of {size / 2**20:,.1f} MiB was left out: this server carries no more "
            f"than {self._max_message / 2**20:,.0f} MiB in one message]\n"
        )
        log.warning("kernel %s: %s", self, text.strip("[]\n"))
        if channel == IOPUB:
            content: dict[str, Any] = {"name": "stderr", "text": text}
            return make_message("stream", content, parent=parts[1])
        content = {"status": "error", "ename": "MessageTooLarge", "evalue": text, "traceback": []}
        return [*parts[:3], msgspec.json.encode(content)]

    def _activity_of(self, parts: list[bytes]) -> Activity:
        """As jupyter_server's `record_activity`, decoding only where it can matter."""
        if self.execution_state == "busy" and b'"status"' not in parts[0]:
            return Activity.ACTIVE
        msg_type = read_header(parts[0]).msg_type
        parent_is_tracked = read_header(parts[1]).msg_type not in UNTRACKED
        if msg_type == "status":
            state = read_status(parts[3]).execution_state
            if not parent_is_tracked:
                if self.execution_state != "starting" or state == "starting":
                    return self._ongoing()
                state = "idle"
            if state == "starting" and self._probe is None:
                return Activity.ACTIVE  # it answered already: its shell was faster than its iopub
            if state in STATES and state != self.execution_state:
                self.execution_state = state
                return STATES[state]
            return Activity.ACTIVE
        if parent_is_tracked or msg_type not in UNTRACKED:
            return Activity.ACTIVE
        return Activity.NOTHING

    def _urgency_of(self, channel: int, activity: Activity, parts: list[bytes]) -> Urgency:
        if channel == SHELL or activity is Activity.IDLE:
            is_whole = parts[1] == self._half_ended
            self._half_ended = parts[1]
            # A reply while it is idle answers something that does not make it busy.
            is_half = not is_whole and (channel == IOPUB or self.execution_state == "busy")
            return Urgency.ONE_OF_TWO if is_half else Urgency.NOW
        if channel != IOPUB:
            return Urgency.NOW
        begins = activity is Activity.BUSY or b'"execute_input"' in parts[0]
        return Urgency.LATER if begins else Urgency.SOON

    def _ongoing(self) -> Activity:
        return Activity.ACTIVE if self.execution_state == "busy" else Activity.NOTHING

    def __str__(self) -> str:
        return self.id.decode(errors="replace")


def as_routing_id(session_id: bytes) -> bytes:
    """ZeroMQ's rule for routing ids: 1 to 255 bytes, not beginning with NUL."""
    if 0 < len(session_id) <= 255 and not session_id.startswith(b"\0"):
        return session_id
    return hashlib.sha256(session_id).hexdigest().encode()

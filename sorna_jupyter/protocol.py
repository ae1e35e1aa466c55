"""What gateway, agent and relay say to each other: messages, their encoding, their version.

Three conversations, all msgpack inside ZeroMQ frames:

* **Heartbeat** (agent's DEALER → gateway's ROUTER, port 5001): one frame, a `Beat`; answered by one
  frame, a `BeatReply`.
* **RPC** (gateway → agent, through the relay's port): `[RPC, request id, request]`, answered by
  `[RPC, request id, reply]`, where the reply is the request's `Reply` type or a `Failure`.
* **Channels** (gateway ⇄ relay, the same port): frames and records as told below.

What both sides must understand alike stands here too: a host's name, what is activity, what a
Jupyter message of our own looks like. Used by both packages; imports nothing of either but
`exceptions`. No I/O, but for what `host_name` asks the machine, `send_frames`
and `receive_frames`.
"""

from __future__ import annotations

import enum
import re
import socket
import struct
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from sorna_jupyter import exceptions
from sorna_jupyter.exceptions import InvalidRequest, SornaError

VERSION = 2
"""Raised when the other side could no longer understand us."""


# -- values that several messages carry ------------------------------------------------------


class KernelStatus(enum.StrEnum):
    """A kernel's life: `preparing → running ⇄ restarting`, `running ⇄ lost`, any → `terminating →
    terminated`, any → `dead`."""

    PREPARING = "preparing"
    RUNNING = "running"
    RESTARTING = "restarting"
    LOST = "lost"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    DEAD = "dead"

    @property
    def is_final(self) -> bool:
        return self in (KernelStatus.TERMINATED, KernelStatus.DEAD)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that crosses: immutable, compared by value."""


class Limits(Message, frozen=True, forbid_unknown_fields=True):
    """What one kernel may use. None: the agent's default for its runtime."""

    memory: int | None = None
    """bytes"""
    cpus: float | None = None
    """cores; may be a fraction"""
    pids: int | None = None
    """processes and threads together"""
    disk: int | None = None
    """bytes of writable space (home and /tmp, each)"""


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes of `512m`, `"1.5 GiB"` or a plain number; units are powers of 1024.

    Raises `InvalidRequest`.
    """
    match = _SIZE.fullmatch(str(size))
    if match is None:
        raise InvalidRequest(f"not a size: {size!r}; write bytes, or e.g. 512 MiB")
    number, unit = match.groups()
    return int(float(number) * 1024 ** " kmgt".index(unit.lower() or " "))


class Slots(Message, frozen=True):
    """What an agent has to give in all."""

    cpus: float
    memory: int
    kernels: int


class ImageState(enum.StrEnum):
    MISSING = "missing"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


class ImageStatus(Message, frozen=True):
    """One image on one agent, with the kernelspec from its label `org.sorna.kernelspec`."""

    name: str
    """the kernelspec's name, e.g. `python3`"""
    reference: str
    """what the runtime calls it, e.g. `sorna-kernel-python:3f2a…`; the interpreter for `local`"""
    state: ImageState
    spec: dict[str, Any]
    """kernel.json as nbformat/Jupyter know it: argv, display_name, language, interrupt_mode, …"""
    digest: str = ""
    progress: float = 0.0
    """0..1 while building"""
    message: str = ""
    """what the build does now, or why it failed"""
    logo: bytes = b""
    """PNG, 64x64; empty where the image has none"""


class KernelReport(Message, frozen=True):
    """What an agent says of one kernel in each beat."""

    kernel_id: str
    status: KernelStatus
    reason: str = ""
    """dead: why. preparing: how far it is."""
    execution_state: str = "starting"
    """Jupyter's word: starting, idle, busy"""
    last_activity: float = 0.0
    """Unix time of the last tracked message"""
    seq: int = 0
    """number of the last message that these two tell of: older than what a gateway has seen itself,
    they are no news"""
    owner: str = ""


# -- heartbeat -------------------------------------------------------------------------------


class Beat(Message, frozen=True, kw_only=True):
    """Agent → gateway, every few seconds and at once when something changed."""

    agent_id: str
    version: int = VERSION
    join_token: str
    public_key: str
    """Z85 Curve key of the relay's port; the beat's own socket must have proven it (ZAP User-Id)"""
    addresses: list[str]
    """where the relay listens, best first: `ipc://…` on the same host, `tcp://host:port`"""
    host: str
    """`host_name()`, so that a gateway knows which `ipc` addresses are its own host's"""
    runtime: str
    """`docker` or `local`"""
    isolation: str
    """one sentence on how far kernels are isolated"""
    slots: Slots
    images: list[ImageStatus]
    kernels: list[KernelReport]
    relay_started: float = 0.0
    """Unix time; when it changes, the relay is a new process: sessions and subscriptions are to be
    opened again"""


def host_name() -> str:
    """Host name and boot id: equal only for processes that can share `ipc` sockets."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    return f"{socket.gethostname()}/{boot}"


class BeatReply(Message, frozen=True):
    """Gateway → agent: what it must stop, or why it is not welcome."""

    accepted: bool
    reason: str = ""
    destroy: list[str] = []
    """ids of kernels that the registry does not know, or knows to be over"""


# -- RPC -------------------------------------------------------------------------------------


class KernelStarted(Message, frozen=True):
    """A kernel answers: the content of its `kernel_info_reply`."""

    kernel_info: dict[str, Any]


class Done(Message, frozen=True):
    """It is done, and there is nothing else to say."""


class KernelLog(Message, frozen=True):
    """What the kernel's process wrote to its own stdout and stderr, newest last."""

    text: str


class Request(Message, frozen=True, tag=True):
    """What a gateway can ask of an agent; `Reply` is what comes back."""

    Reply: ClassVar[type[Message]] = Done


class CreateKernel(Request, frozen=True):
    """Start a kernel and wait until it answers. Safe to repeat: the same id is the same kernel."""

    Reply: ClassVar[type[Message]] = KernelStarted

    kernel_id: str
    image: str
    """an `ImageStatus.name`"""
    owner: str
    env: dict[str, str] = {}
    limits: Limits = Limits()
    path: str = ""
    """working directory, relative to the kernel's home"""
    start_timeout: float = 60.0
    """seconds from the container's start to its first kernel_info_reply; building is not counted"""


class RestartKernel(Request, frozen=True):
    """Same id, same environment, new process; clients stay attached."""

    Reply: ClassVar[type[Message]] = KernelStarted

    kernel_id: str
    start_timeout: float = 60.0


class InterruptKernel(Request, frozen=True):
    """By `interrupt_request` on the control channel or by SIGINT, as the kernelspec says."""

    kernel_id: str


class DestroyKernel(Request, frozen=True):
    """Stop it and remove what it had. Safe to repeat; an unknown id is already done."""

    kernel_id: str


class ReadKernelLog(Request, frozen=True):
    Reply: ClassVar[type[Message]] = KernelLog

    kernel_id: str
    lines: int = 200


class BuildImages(Request, frozen=True):
    """Build what is missing of these (all, if empty); progress shows in the beats."""

    names: list[str] = []


class StopAgent(Request, frozen=True):
    """Stop all kernels, then the agent itself; the reply comes when the kernels are gone.

    With `keep_kernels`: the gateway goes, everything here runs on, and silence is not counted
    (orphan timeout) until a gateway accepts a beat again.
    """

    keep_kernels: bool = False


AnyRequest = (
    CreateKernel
    | RestartKernel
    | InterruptKernel
    | DestroyKernel
    | ReadKernelLog
    | BuildImages
    | StopAgent
)


class Failure(Message, frozen=True, tag="Failure"):
    """The agent could not: the name of a `SornaError` and its message."""

    error: str
    message: str

    @classmethod
    def of(cls, error: SornaError) -> Failure:
        return cls(error=type(error).__name__, message=error.message)

    def exception(self) -> SornaError:
        """The error to raise on the gateway's side; an unknown name becomes `SornaError`."""
        kind = getattr(exceptions, self.error, SornaError)
        error = SornaError(self.message)
        if isinstance(kind, type) and issubclass(kind, SornaError):
            # Not kind(message): some constructors take the data that made the message.
            error = kind.__new__(kind)
            Exception.__init__(error, self.message)
        return error


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
_request_decoder: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)


def decode_request(data: bytes) -> AnyRequest:
    """Raises `msgspec.DecodeError` (a `ValueError`) for what is not a request."""
    return _request_decoder.decode(data)


def decode_beat(data: bytes) -> Beat:
    return msgspec.msgpack.decode(data, type=Beat)


def decode_beat_reply(data: bytes) -> BeatReply:
    return msgspec.msgpack.decode(data, type=BeatReply)


OK, FAILED = b"+", b"-"


def encode_reply(reply: Message | SornaError) -> list[bytes]:
    """Two frames: whether it went well, and the reply or `Failure`."""
    if isinstance(reply, SornaError):
        return [FAILED, encode(Failure.of(reply))]
    return [OK, encode(reply)]


def decode_reply(request: Request, frames: list[bytes]) -> Message:
    """The reply to `request`; raises the `SornaError` that the agent sent instead."""
    verdict, data = frames
    if verdict != OK:
        raise msgspec.msgpack.decode(data, type=Failure).exception()
    return msgspec.msgpack.decode(data, type=request.Reply)


# -- channels --------------------------------------------------------------------------------
#
# First frame: what it is. Kernel ids and session ids are utf-8, numbers 8 bytes, big-endian. The
# four JSON parts of a Jupyter message and its buffers travel as they came, without identities and
# signature: the relay holds the kernel's key, strips on the way out and signs on the way in.
#
# A *subscription* is a gateway's cursor in a kernel's journal, by a number that the gateway chose:
# the relay sends records while the credit that it was given lasts.

GATEWAY = "gateway"
"""who a gateway is on an agent's ipc socket; its password (RFC 24, ZMTP PLAIN) is the join token"""

RPC = b"R"
"""[RPC, request id, request] → [RPC, request id, verdict, reply]"""
OPEN = b"O"
"""[OPEN, kernel id, session id]: connect shell, control and stdin sockets for this client session.
Safe to repeat. Answered by [OPEN, kernel id, session id, next], the number of the first record that
this session has not acknowledged: for a new session, the next one that will be written."""
CLOSE = b"C"
"""[CLOSE, kernel id, session id]"""
ACKNOWLEDGE = b"A"
"""[ACKNOWLEDGE, kernel id, session id, seq]: this session's client has all up to number seq"""
SUBSCRIBE = b"S"
"""[SUBSCRIBE, kernel id, subscription, from seq, credit]: send me what left this kernel from this
number on (0: from now on), as many bytes as I have given credit for. Said again, it starts anew."""
CREDIT = b"K"
"""[CREDIT, kernel id, subscription, bytes]: so many more"""
UNSUBSCRIBE = b"U"
"""[UNSUBSCRIBE, kernel id, subscription]"""
MESSAGE = b"M"
"""To the kernel: [MESSAGE, kernel id, session id, channel, header, parent, metadata, content,
*buffers]"""
RECORDS = b"J"
"""From it: [RECORDS, subscription, kernel id, seq of the first, seq after the journal's last,
*records]. Once without records when a subscription begins."""
LOST = b"G"
"""[LOST, subscription, kernel id, first seq, last seq, bytes (0: unknown)]: fell out of the journal
before it was read"""

RECORD_COST = 100
"""bytes of credit that a record costs besides its own"""


# A record: what the journal keeps of one message, and what crosses the agent link. Behind its head
# (`_RECORD` and the session id) it is what a websocket of `v1.kernel.websocket.jupyter.org` sends:
# little-endian u64 count, so many u64 offsets, channel, parts.

CHANNELS = ("iopub", "shell", "control", "stdin")
NOTE = 255
"""instead of a channel: a note of the relay's own, a `LossNote`"""

_RECORD = struct.Struct("<BBH")
"""channel, activity, length of the session id (which follows; empty: on iopub, for everyone)"""
_PLAIN = struct.Struct("<7Q")
"""count and offsets of a message without buffers"""
_HEADER_OFFSETS = struct.Struct("<2Q")
"""where a message's header begins and ends; behind the count and the offset of the channel"""
_NAMES = [name.encode() for name in CHANNELS]


class Activity(enum.IntEnum):
    """What a record tells of its kernel's state."""

    NOTHING = 0
    ACTIVE = 1
    """something that counts as activity; the state stays as it was"""
    STARTING = 2
    IDLE = 3
    BUSY = 4

    @property
    def execution_state(self) -> str | None:
        """Jupyter's word, if this is a change of state."""
        return self.name.lower() if self >= Activity.STARTING else None


def pack_record(channel: int, activity: int, session: bytes, parts: list[bytes]) -> bytes:
    """`channel`: its place in `CHANNELS`."""
    return b"".join(
        (_RECORD.pack(channel, activity, len(session)), session, *v1_slices(_NAMES[channel], parts))
    )


def v1_slices(name: bytes, parts: list[bytes]) -> tuple[bytes, ...]:
    """A v1 websocket message on the channel of that name, not yet joined."""
    count = len(parts) + 2
    begin = 8 * (count + 1)
    if count == 6:
        header, parent, metadata, content = parts
        one = begin + len(name)
        two = one + len(header)
        three = two + len(parent)
        four = three + len(metadata)
        table = _PLAIN.pack(count, begin, one, two, three, four, four + len(content))
    else:
        offsets = [begin, begin := begin + len(name)]
        for part in parts:
            offsets.append(begin := begin + len(part))
        table = struct.pack(f"<{count + 1}Q", count, *offsets)
    return (table, name, *parts)


class LossNote(Message, frozen=True):
    """The relay's own record where it was not there to listen: what it wrote may miss something."""

    reason: str


def pack_note(note: LossNote) -> bytes:
    return _RECORD.pack(NOTE, 0, 0) + encode(note)


@dataclass(frozen=True, slots=True)
class Gap:
    """What a reader of a kernel's messages can't have any more."""

    kernel_id: str
    first: int
    last: int
    """numbers of the first and the last message that are lost; equal for a `LossNote`, which stands
    for an unknown number of messages that were never numbered"""
    size: int | None
    """bytes; None: nobody knows"""
    reason: str

    @property
    def messages(self) -> int | None:
        return None if self.size is None else self.last - self.first + 1


class KernelMessage:
    """One message on its way from a kernel to its clients.

    `parts` are header, parent header, metadata, content (JSON as the kernel wrote it) and buffers;
    `frame` is the same as a v1 websocket message. `session` is the client session that it answers;
    empty on iopub, which everyone gets.
    """

    __slots__ = ("_parts", "activity", "channel", "frame", "kernel_id", "seq", "session")

    def __init__(
        self,
        kernel_id: str,
        seq: int,
        session: str,
        channel: str,
        frame: memoryview | bytes,
        activity: int = Activity.NOTHING,
    ) -> None:
        self.kernel_id = kernel_id
        self.seq = seq
        self.session = session
        self.channel = channel
        self.frame = frame
        self.activity = activity
        self._parts: list[bytes] | None = None

    @classmethod
    def of(
        cls, kernel_id: str, seq: int, session: str, channel: str, parts: list[bytes]
    ) -> KernelMessage:
        frame = b"".join(v1_slices(channel.encode(), parts))
        return cls(kernel_id, seq, session, channel, frame)

    @property
    def parts(self) -> list[bytes]:
        if self._parts is None:
            frame = self.frame
            (count,) = struct.unpack_from("<Q", frame)
            offsets = struct.unpack_from(f"<{count}Q", frame, 8)
            self._parts = [
                bytes(frame[start:end])
                for start, end in zip(offsets[1:], offsets[2:], strict=False)
            ]
        return self._parts

    @property
    def header(self) -> bytes:
        """The first of the parts, without a look at the others, which may be large."""
        if self._parts is not None:
            return self._parts[0]
        begin, end = _HEADER_OFFSETS.unpack_from(self.frame, 2 * 8)
        return bytes(self.frame[begin:end])

    @property
    def msg_type(self) -> str:
        return read_header(self.header).msg_type


def read_record(kernel_id: str, seq: int, record: bytes | memoryview) -> KernelMessage | Gap:
    channel, activity, length = _RECORD.unpack_from(record)
    if channel == NOTE:
        note = msgspec.msgpack.decode(record[_RECORD.size :], type=LossNote)
        return Gap(kernel_id, seq, seq, None, note.reason)
    begin = _RECORD.size + length
    session = bytes(record[_RECORD.size : begin]).decode() if length else ""
    frame = memoryview(record)[begin:]
    return KernelMessage(kernel_id, seq, session, CHANNELS[channel], frame, activity)


class Batch:
    """Messages of one kernel that came together, in order and without a hole.

    `for_everyone`: all of them are on iopub. `encoded` is the websockets' own: what they already
    made of it, by framing.
    """

    __slots__ = ("encoded", "for_everyone", "messages", "next")

    def __init__(self, messages: list[KernelMessage]) -> None:
        self.messages = messages
        self.next = messages[-1].seq + 1
        self.for_everyone = not any(message.session for message in messages)
        self.encoded: dict[Any, Any] = {}

    @property
    def first(self) -> int:
        return self.messages[0].seq

    def since(self, seq: int) -> Batch | None:
        """What of it is numbered `seq` or higher."""
        if seq <= self.first:
            return self
        return Batch(self.messages[seq - self.first :]) if seq < self.next else None

    def for_session(self, session: str) -> Batch | None:
        """What of it that client gets."""
        if self.for_everyone:
            return self
        mine = [m for m in self.messages if not m.session or m.session == session]
        if not mine:
            return None
        batch = Batch(mine)
        batch.next = self.next
        return batch


SNDMORE, NOBLOCK = 2, 1
"""ZeroMQ's flags as plain numbers: pyzmq's `send_multipart` makes enums of them for each frame, and
takes twice as long"""


LARGE_FRAME = 64 << 10
"""bytes; above it, a frame is passed on as it lies in ZeroMQ's memory, and not copied"""


def send_frames(socket: Any, frames: list[bytes]) -> None:
    """As one message, on a plain ZeroMQ socket, now. Raises `zmq.Again`."""
    send, last = socket.send, len(frames) - 1
    for place, frame in enumerate(frames):
        flags = NOBLOCK if place == last else NOBLOCK | SNDMORE
        if len(frame) < LARGE_FRAME:
            send(frame, flags)
        else:
            send(frame, flags, copy=False)


def receive_frames(socket: Any) -> list[Any]:
    """One message of a plain ZeroMQ socket: small frames as bytes, large ones as views of ZeroMQ's
    memory. Raises `zmq.Again` if there is none."""
    frames: list[Any] = []
    receive = socket.recv
    while True:
        frame = receive(NOBLOCK, copy=False)
        frames.append(frame.bytes if len(frame) < LARGE_FRAME else frame.buffer)
        if not frame.more:
            return frames


def pack_number(number: int) -> bytes:
    return number.to_bytes(8, "big")


def read_number(data: bytes) -> int:
    return int.from_bytes(data, "big")


# -- Jupyter's messages, as far as we read or make them ourselves ----------------------------


class Header(msgspec.Struct):
    """What routing needs of a message's header; also fits the empty one, a parent's."""

    msg_id: str = ""
    msg_type: str = ""
    subshell_id: str | None = None


class Status(msgspec.Struct):
    """The content of a `status` message."""

    execution_state: str = ""


read_header = msgspec.json.Decoder(Header).decode
read_status = msgspec.json.Decoder(Status).decode

UNTRACKED = frozenset(
    "comm_info_request comm_info_reply kernel_info_request kernel_info_reply shutdown_request"
    " shutdown_reply interrupt_request interrupt_reply debug_request debug_reply stream"
    " display_data update_display_data execute_input execute_result error status clear_output"
    " debug_event input_request input_reply".split()
)
"""Messages that are no activity by themselves: front-ends send such requests without a person's
doing. As jupyter_server's `untracked_message_types`."""


def make_message(
    msg_type: str,
    content: dict[str, Any],
    *,
    msg_id: str | None = None,
    parent: bytes = b"{}",
    session: str = "",
    username: str = "sorna",
) -> list[bytes]:
    """The four JSON parts of a message of our own; `parent` is the header, as it came, of what it
    answers."""
    header = {
        "msg_id": msg_id or uuid.uuid4().hex,
        "msg_type": msg_type,
        "session": session,
        "username": username,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "version": "5.3",
    }
    return [msgspec.json.encode(header), parent, b"{}", msgspec.json.encode(content)]

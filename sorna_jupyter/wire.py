"""Jupyter's two websocket framings as pure codecs: no socket, no kernel, no state.

A message is a channel and its *parts*: header, parent header, metadata, content (the very JSON
bytes of the kernel) and binary buffers. `V1Framing` is `v1.kernel.websocket.jupyter.org`;
`LegacyFraming` is what is spoken where no subprotocol was agreed. Neither decodes more JSON than it
must, and contents are never re-encoded. Used by `websocket`, on either end of a socket.
"""

from __future__ import annotations

import json
import struct
from typing import Protocol

import msgspec

from sorna_jupyter.exceptions import InvalidRequest
from sorna_jupyter.protocol import v1_slices

V1_PROTOCOL = "v1.kernel.websocket.jupyter.org"

JSON_PARTS = 4
"""header, parent header, metadata, content"""

UNSUPPORTED_DATA, INVALID_DATA = 1003, 1007


class MalformedFrame(InvalidRequest, ValueError):
    """The websocket frame is malformed."""

    def __init__(self, message: str, close_code: int = INVALID_DATA) -> None:
        super().__init__(message)
        self.close_code = close_code
        """what RFC 6455 calls it"""


class Header(msgspec.Struct):
    """What routing needs of a message's header."""

    msg_id: str
    msg_type: str
    session: str = ""
    subshell_id: str | None = None


_header_decoder = msgspec.json.Decoder(Header)


def read_header(part: bytes) -> Header:
    """Raises `MalformedFrame`."""
    try:
        return _header_decoder.decode(part)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"The message's header is malformed: {error}") from error


class Framing(Protocol):
    """One way to put a message into a websocket frame: `str` is a text frame, `bytes` binary."""

    def decode(self, frame: bytes | str) -> tuple[str, list[bytes]]:
        """Channel and parts. Raises `MalformedFrame`."""

    def encode(self, channel: str, parts: list[bytes]) -> bytes | str:
        """Raises `MalformedFrame` where the kernel's own header can't be read."""


def framing_of(subprotocol: str | None) -> Framing:
    """The framing that goes with what a websocket's handshake agreed on."""
    return V1 if subprotocol == V1_PROTOCOL else LEGACY


class V1Framing:
    """Little-endian u64 count, that many u64 offsets, channel, parts; always binary."""

    def decode(self, frame: bytes | str) -> tuple[str, list[bytes]]:
        if isinstance(frame, str):
            raise MalformedFrame(f"{V1_PROTOCOL} has no text frames", UNSUPPORTED_DATA)
        channel, *parts = _slices(frame, self._offsets(frame))
        return _channel_name(channel), parts

    def _offsets(self, frame: bytes) -> tuple[int, ...]:
        if len(frame) < 8:
            raise MalformedFrame("The frame is too short")
        count = int.from_bytes(frame[:8], "little")
        if 8 * (count + 1) > len(frame):
            raise MalformedFrame(f"The frame has no room for {count} offsets")
        offsets = struct.unpack_from(f"<{count}Q", frame, 8)
        if count < 2 + JSON_PARTS:
            raise MalformedFrame(f"The frame has {count} offsets; it needs {2 + JSON_PARTS}")
        if offsets[0] < 8 * (count + 1):
            raise MalformedFrame("The first offset points into the offsets")
        return offsets

    def encode(self, channel: str, parts: list[bytes]) -> bytes:
        return b"".join(v1_slices(channel.encode(), parts))


class _LegacyMessage(msgspec.Struct):
    """What a front-end sends. Raw: the parts' bytes are passed on as they came."""

    header: msgspec.Raw
    channel: str | None = None
    parent_header: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    content: msgspec.Raw = msgspec.Raw(b"{}")


class _RawNames(msgspec.Struct):
    msg_id: msgspec.Raw
    msg_type: msgspec.Raw


class LegacyFraming:
    """One JSON object as text; with buffers: big-endian u32 count and offsets, JSON, buffers."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_LegacyMessage)
        self._names = msgspec.json.Decoder(_RawNames)

    def decode(self, frame: bytes | str) -> tuple[str, list[bytes]]:
        text, buffers = (frame, []) if isinstance(frame, str) else self._split(frame)
        try:
            message = self._decoder.decode(text)
        except msgspec.DecodeError as error:
            message = self._decode_surrogates(text, error)
        except RecursionError as error:
            raise MalformedFrame("The message is nested too deeply") from error
        parts = (message.header, message.parent_header, message.metadata, message.content)
        # Front-ends that predate the v1 framing may leave out the channel; they mean shell.
        channel = "shell" if message.channel is None else message.channel
        return channel, [*map(_object, parts), *buffers]

    def _decode_surrogates(self, text: str, error: msgspec.DecodeError) -> _LegacyMessage:
        """Browsers write half a character as `\\ud83d`, which is JSON but not for msgspec."""
        try:
            fields = json.loads(text) if "\\ud" in text else None
            if not isinstance(fields, dict) or "header" not in fields:
                raise ValueError("no message")
            channel = fields.pop("channel", None)
            if not isinstance(channel, str | None):
                raise ValueError("no channel")
        except (ValueError, RecursionError):
            raise MalformedFrame(f"The message is malformed: {error}") from error
        parts = {name: msgspec.Raw(json.dumps(part).encode()) for name, part in fields.items()}
        known = parts.keys() & set(_LegacyMessage.__struct_fields__)
        return _LegacyMessage(channel=channel, **{name: parts[name] for name in known})

    def _split(self, frame: bytes) -> tuple[str, list[bytes]]:
        if len(frame) < 4:
            raise MalformedFrame("The frame is too short")
        count = int.from_bytes(frame[:4], "big")
        if not 0 < count <= len(frame) // 4 - 1:
            raise MalformedFrame(f"The frame has no room for {count} offsets")
        offsets = struct.unpack_from(f"!{count}I", frame, 4)
        if offsets[0] < 4 * (count + 1):
            raise MalformedFrame("The first offset points into the offsets")
        text, *buffers = _slices(frame, (*offsets, len(frame)))
        try:
            return text.decode(), buffers
        except UnicodeDecodeError as error:
            raise MalformedFrame("The message is no UTF-8") from error

    def encode(self, channel: str, parts: list[bytes]) -> bytes | str:
        header, parent, metadata, content, *buffers = parts
        try:
            names = self._names.decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedFrame(f"The kernel's header is malformed: {error}") from error
        # Spliced rather than parsed and dumped: contents may be megabytes.
        text = b"".join(
            (
                b'{"header":',
                header,
                b',"msg_id":',
                bytes(names.msg_id),
                b',"msg_type":',
                bytes(names.msg_type),
                b',"parent_header":',
                parent,
                b',"metadata":',
                metadata,
                b',"content":',
                content,
                b',"channel":"',
                channel.encode(),
                b'"}' if buffers else b'","buffers":[]}',
            )
        )
        if not buffers:
            # Kernels can write lone surrogates as bytes that are no UTF-8; a text frame with
            # such bytes would make the browser close the socket.
            return text.decode(errors="replace")
        count = len(buffers) + 1
        offsets = [offset := 4 * (count + 1)]
        for part in (text, *buffers[:-1]):
            offsets.append(offset := offset + len(part))
        try:
            table = struct.pack(f"!{count + 1}I", count, *offsets)
        except struct.error as error:
            raise MalformedFrame("The message is above 4 GiB") from error
        return b"".join((table, text, *buffers))


V1 = V1Framing()
LEGACY = LegacyFraming()


def _slices(frame: bytes, offsets: tuple[int, ...]) -> list[bytes]:
    if any(start > end for start, end in zip(offsets, offsets[1:], strict=False)):
        raise MalformedFrame("The offsets do not ascend")
    if offsets[-1] > len(frame):
        raise MalformedFrame("An offset points beyond the frame")
    return [frame[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]


def _channel_name(name: bytes) -> str:
    try:
        return name.decode("ascii")
    except UnicodeDecodeError as error:
        raise MalformedFrame("The channel's name is malformed") from error


def _object(raw: msgspec.Raw) -> bytes:
    part = bytes(raw)
    if part == b"null":
        return b"{}"
    if not part.startswith(b"{"):
        raise MalformedFrame("The message's parts must be JSON objects")
    return part

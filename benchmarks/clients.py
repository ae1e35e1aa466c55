"""The lean client: the same for all that is measured, straight ZeroMQ included.

Plain blocking sockets without a single option set, as an ordinary client's are; frames are split
and searched, never parsed, so that what is measured is the other side. A *message* is its bytes as
they came; `Execution` and `numbers` look into it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import select
import socket
import struct
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import zmq

V1 = "v1.kernel.websocket.jupyter.org"
CHUNK = 1 << 18
BIG = 1 << 16
"""bytes of a ZeroMQ frame above which it is counted, not kept"""
GOODBYE_TIMEOUT = 10.0
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
"""first bytes of frames"""

NUMBERED = re.compile(rb'"text": ?"((?:[\d.]|\\n)+)"')


class Closed(Exception):
    """The other side has closed the connection."""


def numbers(messages: Iterable[bytes]) -> list[int]:
    """Of the numbered lines in stream messages, in their order."""
    # ipykernel may send a line and its end apart.
    texts = (match[1] for message in messages if (match := NUMBERED.search(message)))
    return [int(line.rstrip(b".")) for line in b"".join(texts).split(b"\\n") if line]


class Execution:
    """What has come back for one execute_request."""

    def __init__(self, msg_id: str) -> None:
        self.msg_id = msg_id.encode()
        self.messages: list[bytes] = []
        self.has_reply = False
        self.is_idle = False

    @property
    def is_done(self) -> bool:
        return self.has_reply and self.is_idle

    def take(self, messages: list[bytes]) -> None:
        self.messages += messages
        for message in messages:
            # Searched only where it stands: a search of whole messages costs more than all else.
            if message.find(b'"idle"', -150) >= 0:
                self.is_idle = self.is_idle or self.msg_id in message
            elif message.find(b"shell", 0, 90) >= 0 or message.find(b'"shell"', -60) >= 0:
                if b'"execute_reply"' in message and self.msg_id in message:
                    self.has_reply = True


class Client(ABC):
    """One client of one kernel."""

    def __init__(self, session: str | None = None) -> None:
        self.session = session or uuid.uuid4().hex
        self.received = 0
        """bytes of messages"""
        self.sent = 0

    @abstractmethod
    def pollables(self) -> list[Any]:
        """What `zmq.Poller` takes: readable when `receive_nowait` has something to do."""

    @abstractmethod
    def receive_nowait(self) -> list[bytes]:
        """What is here, once a pollable is readable: perhaps no whole message. Raises `Closed`."""

    @abstractmethod
    def receive(self, timeout: float = 60) -> list[bytes]:
        """All messages that are here; waits for the first, empty after `timeout` seconds.

        Raises `Closed`.
        """

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _send(self, channel: str, parts: list[bytes]) -> None: ...

    def request(self, msg_type: str, content: dict[str, Any]) -> str:
        """Send it on shell; its msg_id."""
        msg_id = uuid.uuid4().hex
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "username": "benchmark",
            "session": self.session,
            "date": datetime.now(UTC).isoformat(),
            "version": "5.3",
        }
        self._send(
            "shell", [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
        )
        return msg_id

    def start(self, code: str) -> Execution:
        content = {
            "code": code,
            "silent": False,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        return Execution(self.request("execute_request", content))

    def execute(self, code: str, timeout: float = 60) -> Execution:
        """Raises TimeoutError if reply and `idle` have not come after `timeout` seconds."""
        execution = self.start(code)
        deadline = time.monotonic() + timeout
        while not execution.is_done:
            execution.take(self.receive(timeout))
            if time.monotonic() > deadline:
                raise TimeoutError(f"{code!r} was not answered within {timeout} s")
        return execution

    def collect(self, execution: Execution, quiet: float, timeout: float = 120) -> float:
        """As `execute`, but what was lost is not waited for: the end is also `quiet` seconds
        without a message. The time of the last message, by `time.perf_counter`."""
        last = time.perf_counter()
        deadline = last + timeout
        while not execution.is_done and last < deadline:
            messages = self.receive(quiet)
            if not messages:
                break
            execution.take(messages)
            last = time.perf_counter()
        return last


class ZmqClient(Client):
    """Straight to the kernel: nothing can be faster."""

    def __init__(self, connection: dict[str, Any], session: str | None = None) -> None:
        super().__init__(session)
        self._key = connection["key"].encode()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._shell = context.socket(zmq.DEALER)
        self._shell.identity = self.session.encode()
        self._iopub = context.socket(zmq.SUB)
        self._iopub.rcvhwm = 0
        self._iopub.subscribe(b"")
        for channel, port in ((self._shell, "shell_port"), (self._iopub, "iopub_port")):
            channel.linger = 0
            channel.connect(f"tcp://{connection['ip']}:{connection[port]}")
        self._poller = zmq.Poller()
        self._poller.register(self._shell, zmq.POLLIN)
        self._poller.register(self._iopub, zmq.POLLIN)
        self._wait_for_iopub()

    def pollables(self) -> list[Any]:
        return [self._shell, self._iopub]

    def receive(self, timeout: float = 60) -> list[bytes]:
        messages = self.receive_nowait()
        if not messages and self._poller.poll(int(timeout * 1000)):
            messages = self.receive_nowait()
        return messages

    def receive_nowait(self) -> list[bytes]:
        messages: list[bytes] = []
        for channel, name in ((self._iopub, b""), (self._shell, b"shell")):
            receive = channel.recv_multipart
            try:
                while True:
                    parts = receive(zmq.NOBLOCK)
                    self.received += sum(map(len, parts))
                    if len(parts[-1]) > BIG:
                        parts = [part for part in parts if len(part) <= BIG]
                    messages.append(b"".join((name, *parts)))
            except zmq.Again:
                continue
        return messages

    def close(self) -> None:
        self._shell.close()
        self._iopub.close()

    def _send(self, channel: str, parts: list[bytes]) -> None:
        signature = hmac.new(self._key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        self._shell.send_multipart([b"<IDS|MSG>", signature, *parts])

    def _wait_for_iopub(self) -> None:
        """A subscription takes effect when it has arrived: ask until iopub speaks."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            msg_id = self.request("kernel_info_request", {}).encode()
            heard = b""
            pause = time.monotonic() + 0.5
            while time.monotonic() < pause:
                heard += b"".join(self.receive(0.1))
                if msg_id in heard and b'"idle"' in heard and b'"kernel_info_reply"' in heard:
                    return
        raise TimeoutError("the kernel does not answer")


class WebsocketClient(Client):
    """In v1 or JSON framing. Answers pings, as every client does."""

    def __init__(
        self,
        address: tuple[str, int],
        path: str,
        token: str,
        *,
        session: str | None = None,
        framing: str = "v1",
    ) -> None:
        super().__init__(session)
        self._is_v1 = framing == "v1"
        self._socket = socket.create_connection(address)
        self._rest = b""
        self._early: list[bytes] = []
        """messages that came in one packet with the handshake's answer"""
        self._shake_hands(address, f"{path}?session_id={self.session}", token)

    def pollables(self) -> list[Any]:
        return [self._socket.fileno()]

    def receive(self, timeout: float = 60) -> list[bytes]:
        deadline = time.monotonic() + timeout
        messages, self._early = self._early, []
        # Control frames and halves of messages are not what the caller waits for.
        while not messages:
            if not self._is_readable(deadline - time.monotonic()):
                break
            messages = self.receive_nowait()
        return messages

    def receive_nowait(self) -> list[bytes]:
        data = self._read()
        return self._split(self._rest + data if self._rest else data)

    def close(self) -> None:
        self.say_goodbye()

    def say_goodbye(self) -> list[bytes]:
        """Close as the protocol has it; what still came before the server's goodbye."""
        messages: list[bytes] = []
        deadline = time.monotonic() + GOODBYE_TIMEOUT
        try:
            self._write(CLOSE, struct.pack("!H", 1000))
            while self._is_readable(deadline - time.monotonic()):
                messages += self.receive_nowait()
        except (Closed, OSError):
            pass  # it has said goodbye, too
        self._socket.close()
        return messages

    def reset(self) -> None:
        """As a network does it: whatever is under way, both ways, is gone."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _send(self, channel: str, parts: list[bytes]) -> None:
        if not self._is_v1:
            names = ("header", "parent_header", "metadata", "content")
            fields = [b'"%s": %s' % (n.encode(), p) for n, p in zip(names, parts, strict=True)]
            text = b'{"channel": "%s", "buffers": [], %s}' % (channel.encode(), b", ".join(fields))
            return self._write(TEXT, text)
        parts = [channel.encode(), *parts]
        offsets = [8 * (len(parts) + 2)]
        for part in parts:
            offsets.append(offsets[-1] + len(part))
        table = struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets)
        self._write(BINARY, table + b"".join(parts))

    def _write(self, opcode: int, payload: bytes) -> None:
        # Masked, as clients must, but with zeros: it costs nothing.
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", opcode, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", opcode, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", opcode, 0x80 | 127, size)
        self.sent += size
        self._socket.sendall(head + bytes(4) + payload)

    def _is_readable(self, timeout: float) -> bool:
        return bool(select.select([self._socket], [], [], max(0.0, timeout))[0])

    def _read(self) -> bytes:
        try:
            data = self._socket.recv(CHUNK)
        except ConnectionResetError as error:
            raise Closed(str(error)) from error
        if not data:
            raise Closed
        return data

    def _split(self, buffer: bytes) -> list[bytes]:
        messages: list[bytes] = []
        position, size = 0, len(buffer)
        while size - position >= 2:
            start = position + 2
            length = buffer[position + 1]
            if length == 126:
                start += 2
            elif length == 127:
                start += 8
            if start > size:
                break
            if length >= 126:
                length = int.from_bytes(buffer[position + 2 : start], "big")
            end = start + length
            if end > size:
                if length < CHUNK:
                    break
                messages.append(self._read_big(buffer[start:], length))
                position = size
                break
            first = buffer[position]
            if first == BINARY or first == TEXT:
                messages.append(buffer[start:end])
                self.received += length
            else:
                self._control(first, buffer[start:end])
            position = end
        self._rest = buffer[position:]
        return messages

    def _read_big(self, begun: bytes, length: int) -> bytes:
        """The rest of a large message, straight to its place."""
        whole = bytearray(length)
        whole[: len(begun)] = begun
        view = memoryview(whole)[len(begun) :]
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise Closed
            view = view[count:]
        self.received += length
        return bytes(memoryview(whole)[:BIG])

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._write(PONG, payload)
        elif opcode == CLOSE:
            raise Closed(payload[2:].decode(errors="replace"))
        elif opcode != PONG:
            raise ValueError(f"a server sent a frame of no known kind: {opcode:#x}")

    def _shake_hands(self, address: tuple[str, int], target: str, token: str) -> None:
        lines = [
            f"GET {target} HTTP/1.1",
            f"Host: {address[0]}:{address[1]}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
            f"Authorization: token {token}",
        ]
        if self._is_v1:
            lines.append(f"Sec-WebSocket-Protocol: {V1}")
        self._socket.sendall("\r\n".join([*lines, "\r\n"]).encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._read()
        head, self._rest = answer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(head.decode(errors="replace"))
        if self._is_v1 and V1.encode() not in head:
            raise ConnectionError("the server does not speak v1 framing")
        self._early = self._split(self._rest)


class Crowd:
    """Many clients, waited for together."""

    def __init__(self, clients: Iterable[Client]) -> None:
        self._poller = zmq.Poller()
        self._clients: dict[Any, Client] = {}
        for client in clients:
            for pollable in client.pollables():
                self._poller.register(pollable, zmq.POLLIN)
                self._clients[pollable] = client

    def receive(self, timeout: float = 60) -> list[tuple[Client, list[bytes]]]:
        """Empty after `timeout` seconds in which nothing came."""
        ready = {self._clients[pollable] for pollable, _ in self._poller.poll(int(timeout * 1000))}
        return [(client, client.receive_nowait()) for client in ready]


class HttpClient:
    """One kept-alive connection."""

    def __init__(self, address: tuple[str, int], token: str) -> None:
        self._address = address
        self._token = token
        self._socket = socket.create_connection(address)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body. Raises `Closed`."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n"
            f"Authorization: token {self._token}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + data)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._read()
        head_bytes, _, content = answer.partition(b"\r\n\r\n")
        status = int(head_bytes.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" in head_bytes.lower():
            while not content.endswith(b"0\r\n\r\n"):
                content += self._read()
            return status, _unchunked(content)
        length = re.search(rb"(?i)content-length: (\d+)", head_bytes)
        while length and len(content) < int(length[1]):
            content += self._read()
        return status, content

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> bytes:
        data = self._socket.recv(CHUNK)
        if not data:
            raise Closed
        return data


def _unchunked(content: bytes) -> bytes:
    body = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        body += content[:length]
        content = content[length + 2 :]
    return body

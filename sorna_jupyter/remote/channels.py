"""The local side of a kernel: the five ZeroMQ sockets of a connection file.

Signs what leaves and checks what comes; the four JSON parts of a message and its buffers pass as
bytes. Used by `proxy`, which decides what goes where.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import logging
import uuid
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sorna_jupyter.protocol import make_message

log = logging.getLogger(__name__)

DELIMITER = b"<IDS|MSG>"

IOPUB_HIGH_WATER_MARK = 100_000
"""Messages kept for one local client that does not read; then that client alone loses some."""


class ConnectionInfo(msgspec.Struct):
    """A connection file as far as we need it."""

    ip: str
    shell_port: int
    iopub_port: int
    stdin_port: int
    control_port: int
    hb_port: int
    key: str = ""
    transport: str = "tcp"
    signature_scheme: str = "hmac-sha256"
    curve_publickey: str | None = None
    curve_secretkey: str | None = None

    @classmethod
    def read(cls, path: Path) -> ConnectionInfo:
        """Raises `OSError` and `msgspec.DecodeError`."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def address(self, port: int) -> str:
        return f"{self.transport}://{self.ip}{'-' if self.transport == 'ipc' else ':'}{port}"


class Signer:
    """HMAC of a message's four JSON parts; with an empty key, nothing is signed or checked."""

    def __init__(self, key: str, scheme: str) -> None:
        digest = scheme.removeprefix("hmac-")
        if digest == scheme or digest not in hashlib.algorithms_available:
            raise ValueError(f"unknown signature scheme {scheme!r}")
        self._empty = hmac.new(key.encode(), digestmod=digest) if key else None

    def sign(self, parts: list[bytes]) -> bytes:
        if self._empty is None:
            return b""
        mac = self._empty.copy()
        for part in parts[:4]:
            mac.update(part)
        return mac.hexdigest().encode()

    def accepts(self, signature: bytes, parts: list[bytes]) -> bool:
        return self._empty is None or hmac.compare_digest(signature, self.sign(parts))


class MessageFactory:
    """Makes the few messages that the proxy says itself."""

    def __init__(self) -> None:
        self.session = uuid.uuid4().hex
        try:
            self._username = getpass.getuser()
        except (OSError, KeyError):  # a uid without a name
            self._username = "user"

    def make(self, msg_type: str, content: dict[str, Any], parent: bytes = b"{}") -> list[bytes]:
        return make_message(
            msg_type, content, parent=parent, session=self.session, username=self._username
        )


class LocalChannels:
    """Bound to every address of the connection file until closed."""

    def __init__(self, info: ConnectionInfo, kernel_name: str) -> None:
        self._info = info
        self._topic = f"kernel.{kernel_name}.".encode()
        self._signer = Signer(info.key, info.signature_scheme)
        self._context = zmq.asyncio.Context()
        self._heartbeat = self._bind(zmq.ROUTER, info.hb_port)
        self._iopub = self._bind(zmq.XPUB, info.iopub_port)
        self._routers = {
            "shell": self._bind(zmq.ROUTER, info.shell_port),
            "control": self._bind(zmq.ROUTER, info.control_port),
            "stdin": self._bind(zmq.ROUTER, info.stdin_port),
        }

    def _bind(self, kind: int, port: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 1000
        if kind == zmq.ROUTER:
            # A client that comes back under its old identity takes its replies over.
            socket.router_handover = 1
        else:
            socket.sndhwm = IOPUB_HIGH_WATER_MARK
        if self._info.curve_secretkey and self._info.curve_publickey:
            socket.curve_secretkey = self._info.curve_secretkey.encode()
            socket.curve_publickey = self._info.curve_publickey.encode()
            socket.curve_server = True
        socket.bind(self._info.address(port))
        return socket

    def close(self) -> None:
        """Sends what is still to be sent, for up to a second."""
        for socket in (self._heartbeat, self._iopub, *self._routers.values()):
            socket.close()
        self._context.term()

    async def receive(self, channel: str) -> tuple[list[bytes], list[bytes]]:
        """The next message of a client on shell, control or stdin: its routing identity, its parts.

        What is not signed with our key is not a message: logged and ignored.
        """
        while True:
            frames = await self._routers[channel].recv_multipart()
            try:
                split = frames.index(DELIMITER)
                identity, signature, parts = frames[:split], frames[split + 1], frames[split + 2 :]
            except (ValueError, IndexError):
                log.warning("ignored what is no Jupyter message on %s", channel)
                continue
            if len(parts) < 4 or not self._signer.accepts(signature, parts):
                log.warning("ignored a message with a wrong signature on %s", channel)
                continue
            return identity, parts

    async def send(self, channel: str, identity: list[bytes], parts: list[bytes]) -> None:
        """To the one client with this identity; dropped if it is gone."""
        signature = self._signer.sign(parts)
        await self._routers[channel].send_multipart([*identity, DELIMITER, signature, *parts])

    async def publish(self, msg_type: str, parts: list[bytes]) -> None:
        """To everyone, on iopub."""
        topic = self._topic + msg_type.encode()
        await self._iopub.send_multipart([topic, DELIMITER, self._signer.sign(parts), *parts])

    async def echo_heartbeats(self) -> None:
        """The proxy lives, whether or not the network does; a dead kernel ends the proxy."""
        while True:
            await self._heartbeat.send_multipart(await self._heartbeat.recv_multipart())

    async def welcome_subscribers(self, messages: MessageFactory) -> None:
        """Tell each new subscription on iopub that it is in force, as kernels do."""
        while True:
            event = await self._iopub.recv()
            if event[:1] != b"\x01":
                continue
            topic = event[1:]
            content = {"subscription": topic.decode("utf-8", "replace")}
            parts = messages.make("iopub_welcome", content)
            frames = [DELIMITER, self._signer.sign(parts), *parts]
            await self._iopub.send_multipart([topic, *frames] if topic else frames)

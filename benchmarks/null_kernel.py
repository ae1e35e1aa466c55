"""A kernel that does nearly nothing: it answers at once, and streams as fast as it is told to.

A program of one file, so that every server can start it from a kernelspec's folder, or from an
image: `python null_kernel.py CONNECTION_FILE`. Code is one of

    stream COUNT [SIZE [RATE]]   COUNT numbered lines of at least SIZE bytes, RATE of them a second
    (anything else)              nothing

Its iopub socket has no high-water mark: what is lost was lost by someone else.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

import zmq

DELIMITER = b"<IDS|MSG>"
LOOK_FOR_PARENT = 5000
"""milliseconds"""

INFO = {
    "status": "ok",
    "protocol_version": "5.3",
    "implementation": "null",
    "implementation_version": "1",
    "language_info": {"name": "null", "version": "1", "mimetype": "text/x", "file_extension": ".x"},
    "banner": "",
    "help_links": [],
}


class Signer:
    """HMAC-SHA256 with the key's two blocks hashed once: `hmac` costs three times as much."""

    def __init__(self, key: bytes) -> None:
        key = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in key))

    def sign(self, parts: list[bytes]) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(b"".join(parts))
        outer.update(inner.digest())
        return outer.hexdigest().encode()


class NullKernel:
    def __init__(self, connection: dict[str, Any]) -> None:
        self._signer = Signer(connection["key"].encode())
        self._connection = connection
        self._context = zmq.Context()
        self._shell = self._bind(zmq.ROUTER, "shell_port")
        self._control = self._bind(zmq.ROUTER, "control_port")
        self._stdin = self._bind(zmq.ROUTER, "stdin_port")
        self._heartbeat = self._bind(zmq.REP, "hb_port")
        self._iopub = self._bind(zmq.PUB, "iopub_port")
        self._session = os.urandom(16).hex()
        self._sent = 0
        self._executed = 0
        self._is_over = False

    def serve(self) -> None:
        """Until it is told to shut down, or whoever started it is gone."""
        parent = os.getppid()
        poller = zmq.Poller()
        for socket in (self._control, self._shell, self._heartbeat):
            poller.register(socket, zmq.POLLIN)
        while not self._is_over and os.getppid() == parent:
            for socket, _ in poller.poll(LOOK_FOR_PARENT):
                if socket is self._heartbeat:
                    self._heartbeat.send(self._heartbeat.recv())
                else:
                    self._answer(socket)
        self._context.destroy(linger=1000)

    def _bind(self, kind: int, port: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        if kind != zmq.REP:
            socket.set_hwm(0)
        address, number = self._connection["ip"], self._connection[port]
        if self._connection.get("transport", "tcp") == "ipc":
            socket.bind(f"ipc://{address}-{number}")
        else:
            socket.bind(f"tcp://{address}:{number}")
        return socket

    def _answer(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart()
        start = frames.index(DELIMITER)
        parent = frames[start + 2]
        msg_type = json.loads(parent)["msg_type"]
        self._date = datetime.now(UTC).isoformat().encode()
        self._publish(b"status", b'{"execution_state": "busy"}', parent)
        match msg_type:
            case "kernel_info_request":
                reply = json.dumps(INFO).encode()
            case "execute_request":
                reply = self._execute(json.loads(frames[start + 5])["code"], parent)
            case "shutdown_request":
                self._is_over = True
                reply = b'{"status": "ok", "restart": false}'
            case _:
                reply = b'{"status": "ok"}'
        reply_type = msg_type.replace("_request", "_reply").encode()
        socket.send_multipart(
            [*frames[:start], *self._message(reply_type, reply, parent)], copy=False
        )
        self._publish(b"status", b'{"execution_state": "idle"}', parent)

    def _execute(self, code: str, parent: bytes) -> bytes:
        self._executed += 1
        self._publish(
            b"execute_input",
            b'{"code": %s, "execution_count": %d}' % (json.dumps(code).encode(), self._executed),
            parent,
        )
        verb, *numbers = code.split() or [""]
        if verb == "stream":
            self._stream(parent, *map(int, numbers))
        return (
            b'{"status": "ok", "execution_count": %d, "user_expressions": {}, "payload": []}'
            % self._executed
        )

    def _stream(self, parent: bytes, count: int, size: int = 0, rate: int = 0) -> None:
        padding = b"." * size
        start = time.monotonic()
        for number in range(count):
            if rate and (early := start + number / rate - time.monotonic()) > 0:
                time.sleep(early)
            text = b'{"name": "stdout", "text": "%d%s\\n"}' % (number, padding)
            self._publish(b"stream", text, parent)

    def _publish(self, msg_type: bytes, content: bytes, parent: bytes) -> None:
        topic = b"kernel.null." + msg_type
        self._iopub.send_multipart([topic, *self._message(msg_type, content, parent)])

    def _message(self, msg_type: bytes, content: bytes, parent: bytes) -> list[bytes]:
        self._sent += 1
        session = self._session.encode()
        header = (
            b'{"msg_id": "%s_%d", "msg_type": "%s", "username": "null", "session": "%s", '
            b'"date": "%s", "version": "5.3"}'
            % (session, self._sent, msg_type, session, self._date)
        )
        parts = [header, parent, b"{}", content]
        return [DELIMITER, self._signer.sign(parts), *parts]


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        connection_info = json.load(file)
    NullKernel(connection_info).serve()

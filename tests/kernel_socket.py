"""A websocket client of one kernel, in either framing, that shares no code with what it tests.

`KernelSocket` is the wire; `WebsocketKernelClient` makes jupyter_client's own client, and so
jupyter_kernel_test, speak over it.
"""

from __future__ import annotations

import datetime
import json
import struct
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

import websocket
from jupyter_client.client import KernelClient
from jupyter_client.session import Session

from tests.gateways import Gateway

V1 = "v1.kernel.websocket.jupyter.org"
FRAMINGS = ["legacy", "v1"]
Message = dict[str, Any]
PARTS = ("header", "parent_header", "metadata", "content")


def _dates(value: Any) -> str:
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    raise TypeError(type(value))


def _json(value: Any) -> bytes:
    return json.dumps(value, default=_dates).encode()


def encode_v1(message: Message) -> bytes:
    parts = [message["channel"].encode(), *(_json(message[part]) for part in PARTS)]
    parts += [bytes(buffer) for buffer in message["buffers"]]
    offsets = [8 * (len(parts) + 2)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts)


def decode_v1(data: bytes) -> Message:
    (count,) = struct.unpack_from("<Q", data)
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    assert offsets[0] == 8 * (count + 1)
    assert offsets[-1] == len(data)
    parts = [data[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    message: Message = {"channel": parts[0].decode()}
    message |= {name: json.loads(part) for name, part in zip(PARTS, parts[1:5], strict=True)}
    return message | {"buffers": parts[5:]}


def encode_legacy(message: Message) -> str | bytes:
    head = {"channel": message["channel"]} | {part: message[part] for part in PARTS}
    buffers = [bytes(buffer) for buffer in message["buffers"]]
    if not buffers:
        return _json(head | {"buffers": []}).decode()
    parts = [_json(head), *buffers]
    offsets = [4 * (len(parts) + 1)]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f">{len(offsets) + 1}I", len(parts), *offsets) + b"".join(parts)


def decode_legacy(data: str | bytes) -> Message:
    buffers: list[bytes] = []
    if isinstance(data, bytes):
        (count,) = struct.unpack_from(">I", data)
        offsets = [*struct.unpack_from(f">{count}I", data, 4), len(data)]
        parts = [data[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
        message, buffers = json.loads(parts[0]), parts[1:]
    else:
        message = json.loads(data)
    return {name: message[name] for name in ("channel", *PARTS)} | {"buffers": buffers}


@dataclass
class Execution:
    """All that came back for one execute_request, in the order it came."""

    messages: list[Message] = field(default_factory=list)
    reply: Message = field(default_factory=dict)

    @property
    def status(self) -> str:
        status: str = self.reply["content"]["status"]
        return status

    @property
    def text(self) -> str:
        parts = []
        for message in self.messages:
            content = message["content"]
            kind = message["header"]["msg_type"]
            if kind == "stream":
                parts.append(content["text"])
            elif kind in ("execute_result", "display_data"):
                parts.append(content["data"].get("text/plain", ""))
            elif kind == "error":
                parts.append(f"{content['ename']}: {content['evalue']}")
        return "".join(parts)

    @property
    def mime_types(self) -> set[str]:
        return {mime for m in self.messages for mime in m["content"].get("data", {})}


class KernelSocket:
    """One websocket to `/api/kernels/{id}/channels`."""

    def __init__(
        self, gateway: Gateway, kernel_id: str, framing: str = "v1", session: str | None = None
    ) -> None:
        self.session = session or uuid.uuid4().hex
        self.framing = framing
        path = f"/api/kernels/{kernel_id}/channels?session_id={self.session}"
        self.ws = websocket.create_connection(
            gateway.websocket_url(path),
            header={"Authorization": f"token {gateway.token}"},
            subprotocols=[V1] if framing == "v1" else None,
            suppress_origin=True,
            timeout=60,
        )
        assert self.ws.getsubprotocol() == (V1 if framing == "v1" else None)

    def __enter__(self) -> KernelSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.ws.close()

    def send(self, channel: str, msg_type: str, content: Message, **more: Any) -> str:
        """Returns the msg_id. `more`: parent_header, metadata, buffers, subshell_id."""
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": msg_type,
            "username": "tester",
            "session": self.session,
            "date": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": "5.4",
        }
        if "subshell_id" in more:
            header["subshell_id"] = more.pop("subshell_id")
        self.send_message(channel, {"header": header, "content": content} | more)
        return header["msg_id"]

    def send_message(self, channel: str, message: Message) -> None:
        whole = {"parent_header": {}, "metadata": {}, "buffers": []} | message
        whole["channel"] = channel
        if self.framing == "v1":
            self.ws.send_binary(encode_v1(whole))
        else:
            data = encode_legacy(whole)
            self.ws.send_binary(data) if isinstance(data, bytes) else self.ws.send(data)

    def receive(self, timeout: float = 60) -> Message:
        self.ws.settimeout(timeout)
        try:
            data = self.ws.recv()
        except websocket.WebSocketTimeoutException:
            raise TimeoutError(f"no message within {timeout} s") from None
        return decode_v1(data) if self.framing == "v1" else decode_legacy(data)

    def execute(
        self,
        code: str,
        timeout: float = 60,
        on_input: Callable[[str], str] | None = None,
        on_message: Callable[[Message], None] | None = None,
        **more: Any,
    ) -> Execution:
        """Run code until both its reply and its `status: idle` have come, in whichever order."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": on_input is not None,
            "stop_on_error": True,
        }
        msg_id = self.send("shell", "execute_request", content, **more)
        execution = Execution()
        deadline = time.monotonic() + timeout
        idle = False
        while not (idle and execution.reply):
            message = self.receive(max(0.1, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            kind = message["header"]["msg_type"]
            if on_message:
                on_message(message)
            if kind == "execute_reply":
                execution.reply = message
            elif kind == "input_request":
                assert on_input
                answer = {"status": "ok", "value": on_input(message["content"]["prompt"])}
                self.send("stdin", "input_reply", answer, parent_header=message["header"])
            elif kind == "status":
                idle = idle or message["content"]["execution_state"] == "idle"
            else:
                execution.messages.append(message)
        return execution


class _Channel:
    """What jupyter_client expects of a channel, over the shared websocket."""

    def __init__(self, client: WebsocketKernelClient, name: str) -> None:
        self.client = client
        self.name = name

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def is_alive(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        self.client.kernel_socket.send_message(self.name, message)

    def get_msg(self, timeout: float | None = None) -> Message:
        return self.client.next_message(self.name, timeout)

    def msg_ready(self) -> bool:
        return bool(self.client.waiting[self.name])


class WebsocketKernelClient(KernelClient):
    """jupyter_client's client, whose channels are one websocket of ours."""

    def __init__(self, kernel_socket: KernelSocket) -> None:
        super().__init__(session=Session(session=kernel_socket.session, key=b""))
        self.kernel_socket = kernel_socket
        self.waiting: dict[str, deque[Message]] = defaultdict(deque)
        self.channel = {
            name: _Channel(self, name) for name in ("shell", "iopub", "stdin", "control")
        }

    shell_channel = property(lambda self: self.channel["shell"])
    iopub_channel = property(lambda self: self.channel["iopub"])
    stdin_channel = property(lambda self: self.channel["stdin"])
    control_channel = property(lambda self: self.channel["control"])

    def stop_channels(self) -> None:
        self.kernel_socket.close()

    def next_message(self, channel: str, timeout: float | None) -> Message:
        deadline = time.monotonic() + (60 if timeout is None else timeout)
        while not self.waiting[channel]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Empty
            try:
                message = self.kernel_socket.receive(left)
            except TimeoutError:
                raise Empty from None
            self.waiting[message["channel"]].append(self._as_jupyter_client_has_it(message))
        return self.waiting[channel].popleft()

    def _as_jupyter_client_has_it(self, message: Message) -> Message:
        header = message["header"]
        # jupyter_client parses the dates, and the validator of messages wants them parsed
        for head in (header, message["parent_header"]):
            if isinstance(head.get("date"), str):
                head["date"] = datetime.datetime.fromisoformat(head["date"])
        return message | {"msg_id": header["msg_id"], "msg_type": header["msg_type"]}

    def get_shell_msg(self, timeout: float | None = None, **_: Any) -> Message:
        return self.next_message("shell", timeout)

    def get_iopub_msg(self, timeout: float | None = None, **_: Any) -> Message:
        return self.next_message("iopub", timeout)

    def get_stdin_msg(self, timeout: float | None = None, **_: Any) -> Message:
        return self.next_message("stdin", timeout)

    def get_control_msg(self, timeout: float | None = None, **_: Any) -> Message:
        return self.next_message("control", timeout)

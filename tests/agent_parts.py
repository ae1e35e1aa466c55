"""What the agent's tests stand on: a runtime of plain ipykernels, and a gateway's two ends.

`python -m tests.agent_parts OPTIONS…` is the agent's own command with that runtime.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from sorna_agent.runtimes import Launch, Runtime, Started, remove_sockets, write_connection_file
from sorna_jupyter import protocol
from sorna_jupyter.protocol import (
    Beat,
    BeatReply,
    Gap,
    ImageState,
    ImageStatus,
    KernelMessage,
    Message,
    Request,
)
from tests.waiting import PATIENCE, until

JOIN_TOKEN = "a-secret-to-join-with"

# -- a runtime -------------------------------------------------------------------------------


class IpykernelRuntime(Runtime):
    """Each kernel a plain ipykernel process in a session of its own, with no sandbox at all."""

    name = "plain"
    isolation = "Kernels are not isolated."

    def __init__(self) -> None:
        self.image = ImageStatus(
            name="python3", reference=sys.executable, state=ImageState.READY, spec={}
        )
        self.argv = [sys.executable, "-m", "ipykernel_launcher", "-f"]
        self.interrupt_mode = "message"
        self.building: Callable[[Callable[[], None]], Awaitable[None]] | None = None
        self.destroyed: list[str] = []
        self._launches: dict[str, Launch] = {}
        self._pids: dict[str, int] = {}
        self._processes: list[subprocess.Popen[bytes]] = []

    async def start_up(self) -> None: ...

    async def close(self) -> None: ...

    def images(self) -> list[ImageStatus]:
        return [self.image]

    async def build(self, names: list[str], on_change: Callable[[], None]) -> None:
        assert self.building is not None
        await self.building(on_change)

    async def launch(self, launch: Launch) -> Started:
        self._launches[launch.kernel_id] = launch
        return self._start(launch)

    async def relaunch(self, kernel_id: str) -> Started:
        launch = self._launches[kernel_id]
        self._kill(kernel_id)
        remove_sockets(launch.directory)
        return self._start(launch)

    async def interrupt(self, kernel_id: str) -> None:
        os.kill(self._pids[kernel_id], signal.SIGINT)

    async def destroy(self, kernel_id: str) -> None:
        self.destroyed.append(kernel_id)
        self._kill(kernel_id)
        self._launches.pop(kernel_id, None)

    async def adopt(self, launches: dict[str, Launch]) -> dict[str, Started]:
        found = {}
        for kernel_id, launch in launches.items():
            pid = int((launch.directory / "pid").read_text())
            if Path(f"/proc/{pid}").exists():
                self._launches[kernel_id] = launch
                found[kernel_id] = self._watch(launch, pid)
        return found

    async def logs(self, kernel_id: str, lines: int = 200) -> str:
        text = (self._launches[kernel_id].directory / "log").read_text()
        return "\n".join(text.splitlines()[-lines:])

    def pid(self, kernel_id: str) -> int:
        return self._pids[kernel_id]

    def _start(self, launch: Launch) -> Started:
        file = write_connection_file(launch, f"{launch.directory}/k", launch.image)
        with open(launch.directory / "log", "wb") as log:
            process = subprocess.Popen(
                [*self.argv, str(file)],
                env={**os.environ, **launch.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        (launch.directory / "pid").write_text(str(process.pid))
        return self._watch(launch, process.pid)

    def _watch(self, launch: Launch, pid: int) -> Started:
        self._pids[launch.kernel_id] = pid
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(pid)

        def on_end() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            for process in self._processes:
                process.poll()
            if self._pids.get(launch.kernel_id) == pid:
                self.report_death(launch.kernel_id, "the process ended")

        loop.add_reader(descriptor, on_end)
        return Started("ipc", f"{launch.directory}/k", str(pid), self.interrupt_mode)

    def _kill(self, kernel_id: str) -> None:
        pid = self._pids.pop(kernel_id, None)
        if pid is not None and Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


# -- a gateway -------------------------------------------------------------------------------


@dataclass
class Keys:
    public: str
    secret: str
    token: str

    @classmethod
    def make(cls, token: str = "") -> Keys:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode(), token or uuid4().hex)

    def on(self, socket: zmq.Socket[Any]) -> None:
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()


class Line:
    """A gateway's connection to the agent port."""

    def __init__(self, address: str, server_key: str, keys: Keys, **options: int) -> None:
        """On ipc, `keys.token` is what is shown; on tcp, the keys."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvhwm = options.get("rcvhwm", 0)
        if "rcvbuf" in options:
            self._socket.rcvbuf = options["rcvbuf"]
        if address.startswith("ipc:"):
            self._socket.plain_username = protocol.GATEWAY.encode()
            self._socket.plain_password = keys.token.encode()
        else:
            keys.on(self._socket)
            self._socket.curve_serverkey = server_key.encode()
        self._socket.connect(address)
        self._ids = count(1)
        self._replies: dict[bytes, asyncio.Future[list[bytes]]] = {}
        self.messages: list[KernelMessage] = []
        self.gaps: list[Gap] = []
        self.deliveries = 0
        """messages of ZeroMQ that records came in"""
        self.begins: dict[str, int] = {}
        """session → number of the first record that it has not acknowledged"""
        self._arrived = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self.read_on()

    def read_on(self) -> None:
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen())

    def stop_reading(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None

    async def close(self) -> None:
        self.stop_reading()
        self._context.destroy(linger=0)

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(list(frames))

    async def ask(self, request: Request, timeout: float = PATIENCE) -> Message:
        request_id = str(next(self._ids)).encode()
        reply = self._replies[request_id] = asyncio.get_running_loop().create_future()
        self.send(protocol.RPC, request_id, protocol.encode(request))
        return protocol.decode_reply(request, await asyncio.wait_for(reply, timeout))

    def subscribe(self, kernel_id: str, seq: int = 0, credit: int = 1 << 40) -> bytes:
        """Returns the subscription's name."""
        name = protocol.pack_number(next(self._ids))
        numbers = map(protocol.pack_number, (seq, credit))
        self.send(protocol.SUBSCRIBE, kernel_id.encode(), name, *numbers)
        return name

    def client(self, kernel_id: str, session: str | None = None) -> Client:
        return Client(self, kernel_id, session or uuid4().hex)

    async def wait_for(self, wanted: Callable[[KernelMessage], bool]) -> KernelMessage:
        """The first message, also of those that came already, that `wanted` wants."""
        seen = 0
        async with asyncio.timeout(PATIENCE):
            while True:
                for message in self.messages[seen:]:
                    if wanted(message):
                        return message
                seen = len(self.messages)
                self._arrived.clear()
                await self._arrived.wait()

    async def _listen(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if frames[0] == protocol.RPC:
                self._replies.pop(frames[1]).set_result(frames[2:])
            elif frames[0] == protocol.LOST:
                first, last, size = map(protocol.read_number, frames[3:])
                self.gaps.append(Gap(frames[2].decode(), first, last, size, ""))
            elif frames[0] == protocol.OPEN:
                self.begins[frames[2].decode()] = protocol.read_number(frames[3])
            else:
                self.deliveries += 1
                _, _, kernel_id, first, _, *records = frames
                for seq, record in enumerate(records, protocol.read_number(first)):
                    item = protocol.read_record(kernel_id.decode(), seq, record)
                    (self.gaps if isinstance(item, Gap) else self.messages).append(item)
            self._arrived.set()


@dataclass
class Client:
    """One client session on one kernel."""

    line: Line
    kernel_id: str
    session: str

    def __post_init__(self) -> None:
        self.line.send(protocol.OPEN, self.kernel_id.encode(), self.session.encode())

    def send(self, channel: str, msg_type: str, content: dict[str, Any]) -> str:
        msg_id = uuid4().hex
        header = {
            "msg_id": msg_id,
            "session": self.session,
            "username": "test",
            "date": datetime.now(UTC).isoformat(),
            "msg_type": msg_type,
            "version": "5.3",
        }
        self.line.send(
            protocol.MESSAGE,
            self.kernel_id.encode(),
            self.session.encode(),
            channel.encode(),
            json.dumps(header).encode(),
            b"{}",
            b"{}",
            json.dumps(content).encode(),
        )
        return msg_id

    def execute(self, code: str, **content: Any) -> str:
        return self.send("shell", "execute_request", {"code": code, **content})

    async def reply_to(self, msg_id: str) -> dict[str, Any]:
        message = await self.line.wait_for(
            lambda m: m.session == self.session and parent_id(m) == msg_id and m.channel != "stdin"
        )
        return content_of(message)

    async def result(self, code: str) -> str:
        """What the code writes to stdout."""
        msg_id = self.execute(code)
        await self.line.wait_for(lambda m: is_idle(m) and parent_id(m) == msg_id)
        reply = await self.reply_to(msg_id)
        assert reply["status"] == "ok", reply
        return stdout_of(self.line.messages, msg_id)

    def close(self) -> None:
        self.line.send(protocol.CLOSE, self.kernel_id.encode(), self.session.encode())


def content_of(message: KernelMessage) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(message.parts[3])
    return content


def parent_id(message: KernelMessage) -> str:
    return str(json.loads(message.parts[1]).get("msg_id", ""))


def is_idle(message: KernelMessage) -> bool:
    return message.msg_type == "status" and content_of(message)["execution_state"] == "idle"


def stdout_of(messages: list[KernelMessage], msg_id: str) -> str:
    return "".join(
        content_of(message)["text"]
        for message in messages
        if message.msg_type == "stream" and parent_id(message) == msg_id
    )


@dataclass
class Manager:
    """A gateway's heartbeat port: remembers beats, answers each with `reply`."""

    directory: Path
    keys: Keys = field(default_factory=partial(Keys.make, JOIN_TOKEN))
    reply: BeatReply | None = field(default_factory=lambda: BeatReply(accepted=True))
    """None: silence"""
    beats: list[Beat] = field(default_factory=list)
    proven_keys: set[str] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"ipc://{self.directory}/manager.sock"

    async def __aenter__(self) -> Manager:
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=zmq.auth.CURVE_ALLOW_ANY)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.curve_server = True
        self.keys.on(self._socket)
        self._socket.bind(self.address)
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.cancel()
        self._authenticator.stop()
        self._context.destroy(linger=0)

    @property
    def last(self) -> Beat:
        return self.beats[-1]

    def line(self, **options: int) -> Line:
        return Line(self.last.addresses[0], self.last.public_key, self.keys, **options)

    async def first_beat(self) -> Beat:
        await until(lambda: self.beats)
        return self.last

    async def beat_with(self, wanted: Callable[[Beat], Any]) -> Beat:
        """The newest beat, once it is as wanted."""
        await until(lambda: self.beats and wanted(self.last))
        return self.last

    async def _listen(self) -> None:
        while True:
            peer, data = await self._socket.recv_multipart(copy=False)
            self.proven_keys.add(str(data.get("User-Id")))
            self.beats.append(protocol.decode_beat(data.bytes))
            if self.reply is not None:
                await self._socket.send_multipart([peer.bytes, protocol.encode(self.reply)])


def agent_options(manager: Manager, directory: Path, *more: str) -> list[str]:
    token = directory / "join-token"
    token.write_text(f"{JOIN_TOKEN}\n")
    return [
        *("--manager-addr", manager.address),
        *("--manager-key", manager.keys.public),
        *("--join-token-file", str(token)),
        *("--data-dir", str(directory / "data")),
        *("--runtime-dir", str(directory / "run")),
        *("--beat-interval", "0.5"),
        *("--log-level", "DEBUG"),
        *more,
    ]


if __name__ == "__main__":
    import sorna_agent.app

    async def choose_plain_runtime(kind: str, **options: Any) -> Runtime:
        return IpykernelRuntime()

    sorna_agent.app.choose_runtime = choose_plain_runtime
    sorna_agent.app.main()

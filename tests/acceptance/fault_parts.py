"""What the fault suite is made of: clients that come back, a scene of processes, and comparing.

`Tab` behaves as a stock front-end's websocket: the same session id whenever it reconnects, pings
answered by the library, no idea of sequence numbers. `Follower` reads `GET …/messages?since=`.
`Scene` is a running gateway with its agent, its relay, a kernel and those clients.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websocket

from tests.chaos import ChaosProxy
from tests.gateways import Gateway, Home, free_port
from tests.kernel_socket import V1, Message, decode_v1, encode_v1
from tests.waiting import wait_until

PAUSE = 0.05
"""seconds between attempts to connect; front-ends take a second and more"""
DOUBT = 2
"""messages that a stock client may get twice, of those that it had read when its connection was
cut; what still lay in its system's buffers then, it gets twice if it reads that, too"""
IN_FLIGHT = 1.0
"""seconds for which, on a machine that is busy, an acknowledgement may be under way"""


class Reader:
    """What some client got, sorted by the request that it belongs to."""

    def __init__(self) -> None:
        self._items: list[Message] = []
        self._by_parent: dict[str | None, list[Message]] = {}

    def _take(self, item: Message) -> None:
        self._items.append(item)
        if "gap" not in item:
            self._by_parent.setdefault(item["parent_header"].get("msg_id"), []).append(item)

    @property
    def items(self) -> list[Message]:
        """Messages, and gaps of those who get them."""
        return list(self._items)

    def of(self, parent: str) -> list[Message]:
        """Messages that answer this request."""
        return list(self._by_parent.get(parent, ()))

    def has_finished(self, parent: str) -> bool:
        """Its idle is here."""
        return any(map(_is_idle, self.of(parent)))


class Tab(Reader):
    """A websocket client of one kernel that comes back by itself, in a thread of its own."""

    def __init__(self, url: str, kernel_id: str, token: str) -> None:
        super().__init__()
        self.session = uuid.uuid4().hex
        self.connections: list[float] = []
        """when each of them began"""
        self._frames: list[tuple[float, bytes]] = []
        self._decoding = threading.Lock()
        self.reads = threading.Event()
        """cleared: what comes stays in the socket"""
        self.reads.set()
        self._url = f"{url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels"
        self._token = token
        self._ws: websocket.WebSocket | None = None
        self._is_wanted = threading.Event()
        self._is_wanted.set()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="tab", daemon=True)
        self._thread.start()
        wait_until(lambda: self.has_seen("kernel_info_reply"), "the kernel answers", 60)

    def send(self, msg_type: str, content: Message, metadata: Message | None = None) -> str:
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": msg_type,
            "username": "tester",
            "session": self.session,
            "date": "2026-01-01T00:00:00Z",
            "version": "5.4",
        }
        message = {"header": header, "parent_header": {}, "metadata": metadata or {}}
        message["content"] = content
        ws = wait_until(lambda: self._ws, "it is connected")
        ws.send_binary(encode_v1(message | {"channel": "shell", "buffers": []}))
        return header["msg_id"]

    def execute(self, code: str, cell_id: str = "") -> str:
        """Returns the request's msg_id. `cell_id`: of the notebook's cell that it is."""
        return self.send(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": True,
            },
            {"cellId": cell_id} if cell_id else {},
        )

    @property
    def items(self) -> list[Message]:
        """All that came, over all connections, with the moment when it was read, as `read`."""
        self._decode()
        return super().items

    def of(self, parent: str) -> list[Message]:
        self._decode()
        return super().of(parent)

    def _decode(self) -> None:
        """Not as it comes: a client that is slow has read less than it got when it is cut."""
        with self._decoding:
            for moment, frame in self._frames[len(self._items) :]:
                self._take(decode_v1(frame) | {"read": moment})

    def has_seen(self, msg_type: str, parent: str | None = None) -> bool:
        messages = self.items if parent is None else self.of(parent)
        return any(m["header"]["msg_type"] == msg_type for m in messages)

    def has_finished(self, parent: str) -> bool:
        """…and its reply, if the request was ours."""
        messages = self.of(parent)
        is_mine = any(m["parent_header"]["session"] == self.session for m in messages)
        return super().has_finished(parent) and (
            not is_mine or any(m["header"]["msg_type"] == "execute_reply" for m in messages)
        )

    def leave(self) -> None:
        """Close as a websocket library does: what the server sends until it says goodbye, too,
        is read."""
        self._is_wanted.clear()
        if (ws := self._ws) is not None:
            with contextlib.suppress(OSError, websocket.WebSocketException):
                ws.send_close()
        wait_until(lambda: self._ws is None, "the server says goodbye")

    def come_back(self) -> None:
        self._is_wanted.set()

    def close(self) -> None:
        self._is_closing = True
        self._is_wanted.set()
        self.reads.set()
        if (ws := self._ws) is not None:
            ws.abort()  # wakes the reader
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._is_closing:
            self._is_wanted.wait()
            try:
                ws = self._connect()
            except (OSError, websocket.WebSocketException):
                threading.Event().wait(PAUSE)
                continue
            self.connections.append(time.monotonic())
            self._ws = ws
            try:
                self.send("kernel_info_request", {})
                for frame in self._received(ws):
                    self._frames.append((time.monotonic(), frame))
            except (OSError, websocket.WebSocketException):
                pass  # cut: we come back
            finally:
                self._ws = None
                ws.shutdown()

    def _connect(self) -> websocket.WebSocket:
        return websocket.create_connection(
            f"{self._url}?session_id={self.session}",
            header={"Authorization": f"token {self._token}"},
            subprotocols=[V1],
            suppress_origin=True,
            enable_multithread=True,
            timeout=120,
        )

    def _received(self, ws: websocket.WebSocket) -> Iterator[bytes]:
        while not self._is_closing:
            self.reads.wait()
            frame = ws.recv()
            if not frame:  # closed
                return
            yield frame


class Follower(Reader):
    """Reads a kernel's messages by `since`, comes back after whatever ends its connection."""

    def __init__(self, url: str, kernel_id: str, token: str, since: int = 1) -> None:
        super().__init__()
        self.next = since
        self._address = url.removeprefix("http://")
        self._path = f"/api/kernels/{kernel_id}/messages"
        self._headers = {"Authorization": f"token {token}", "Accept": "application/x-ndjson"}
        self._is_closing = False
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closing = True
        wait_until(self._has_ended, "the follower ends")

    def _has_ended(self) -> bool:
        if (connection := self._connection) is not None and (sock := connection.sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the reader
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._is_closing:
            self._connection = http.client.HTTPConnection(self._address, timeout=120)
            try:
                self._read(self._connection)
            except (OSError, http.client.HTTPException):
                pass  # cut: we come back
            finally:
                self._connection.close()
            threading.Event().wait(PAUSE)

    def _read(self, connection: http.client.HTTPConnection) -> None:
        connection.request("GET", f"{self._path}?since={self.next}&follow=1", headers=self._headers)
        response = connection.getresponse()
        if response.status != 200:
            return  # the gateway has just begun
        for line in response:
            if line.strip():  # an empty one says that the connection lives
                item = json.loads(line)
                self._take(item)
                self.next = (item["gap"]["to"] if "gap" in item else item["seq"]) + 1


def _is_idle(message: Message) -> bool:
    return (
        message["header"]["msg_type"] == "status"
        and message["content"]["execution_state"] == "idle"
    )


def messages_of(items: list[Message]) -> list[Message]:
    return [item for item in items if "gap" not in item]


# -- what is compared ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Code that prints a numbered counter."""

    count: int
    pause: float = 0
    """seconds between two lines"""
    width: int = 0
    """bytes by which each line is longer than its number"""

    @property
    def code(self) -> str:
        return (
            "import sys, time\n"
            f"for i in range({self.count}):\n"
            f"    sys.stdout.write(f\"{{i}}{{'.' * {self.width}}}\\n\")\n"
            f"    sys.stdout.flush()\n"
            f"    time.sleep({self.pause})"
        )

    @property
    def text(self) -> str:
        return "".join(f"{number}{'.' * self.width}\n" for number in range(self.count))

    @property
    def seconds(self) -> float:
        return self.count * (self.pause + 0.0003)


def is_text(message: Message, stream: str) -> bool:
    return (
        message.get("header", {}).get("msg_type") == "stream"
        and message["content"]["name"] == stream
    )


def printed(messages: list[Message], parent: str) -> str:
    return "".join(
        m["content"]["text"]
        for m in messages
        if is_text(m, "stdout") and m["parent_header"].get("msg_id") == parent
    )


def of(messages: list[Message], parent: str) -> list[Message]:
    return [m for m in messages if m["parent_header"].get("msg_id") == parent]


def ids(messages: list[Message]) -> list[str]:
    return [m["header"]["msg_id"] for m in messages]


def units(messages: list[Message]) -> list[tuple[str | int, float]]:
    """What a client got, and when: each line of a counter by its number, whichever message it came
    in (those of a client that lags are joined), everything else by its id."""
    found: list[tuple[str | int, float]] = []
    for message in messages:
        read = message.get("read", 0.0)
        if is_text(message, "stdout"):
            found += ((number, read) for number in numbers_in(message["content"]["text"]))
        else:
            found.append((message["header"]["msg_id"], read))
    return found


def once(units: list[tuple[str | int, float]]) -> list[str | int]:
    """Each at its first place only."""
    return list(dict.fromkeys(unit for unit, _ in units))


def doubled(units: list[tuple[str | int, float]]) -> list[float]:
    """When those that came more than once were read first."""
    counts = Counter(unit for unit, _ in units)
    first = {unit: read for unit, read in reversed(units)}
    return sorted(first[unit] for unit, count in counts.items() if count > 1)


def difference(got: str, cell: Cell) -> str:
    """Of what someone got and what the cell printed, in words; empty if there is none."""
    if got == cell.text:
        return ""
    numbers = numbers_in(got)
    missing = sorted(set(range(cell.count)) - set(numbers))
    again = [number for number, n in Counter(numbers).items() if n > 1]
    order = "in order" if numbers == sorted(numbers) else "out of order"
    return (
        f"{len(numbers)} lines of {cell.count}, {order}; missing {_shortly(missing)}; "
        f"more than once {_shortly(again)}"
    )


def numbers_in(text: str) -> list[int]:
    return [int(line.rstrip(".")) for line in text.splitlines()]


def unannounced(items: list[Message], parent: str, cell: Cell) -> tuple[list[int], str]:
    """The numbers that are missing, and in words those that no gap is announced for at their
    place: by a record of the journal, or as a notebook is told, on stderr."""
    missing: list[int] = []
    wrong = []
    expected, gap = 0, False
    for item in items:
        if "gap" in item or is_text(item, "stderr"):
            gap = True
            continue
        for number in numbers_in(printed([item], parent)):
            if number > expected and gap:
                missing.extend(range(expected, number))
            elif number != expected:
                wrong.append(f"{number} where {expected} should be")
            expected, gap = number + 1, False
    if expected < cell.count:
        missing.extend(range(expected, cell.count))
        if not gap:
            wrong.append(f"nothing where {expected} should be")
    return missing, "; ".join(wrong[:10])


def hole_in(items: list[Message]) -> str:
    """Where numbers do not go up by one and no gap says why; empty if nowhere."""
    expected = None
    for item in items:
        first = item["gap"]["from"] if "gap" in item else item["seq"]
        if expected not in (None, first):
            return f"{first} comes where {expected} should"
        expected = (item["gap"]["to"] if "gap" in item else first) + 1
    return ""


def _shortly(things: list[int]) -> str:
    return f"{len(things)}: {things[:5]}…{things[-3:]}" if len(things) > 8 else f"{things}"


# -- the scene -------------------------------------------------------------------------------


class Scene:
    """A gateway of its own behind a chaos proxy, and a kernel with three clients on it.

    `far` and `follower` come through the proxy, `near` does not.
    """

    def __init__(self, *args: str, home: Home | None = None, env: dict[str, str] | None = None):
        self._args = (*args, f"--port={free_port()}", "--orphan-timeout=60")
        # Or each start would make another, and clients that come back would be strangers
        self._env = {"JUPYTER_TOKEN": uuid.uuid4().hex} | (env or {})
        self.gateway = Gateway.start(*self._args, home=home, env=self._env)
        self.proxy = ChaosProxy(int(self.gateway.url.rpartition(":")[2]))
        self._closing: list[Callable[[], None]] = []

    def open(self) -> None:
        self.gateway.wait_for_image()
        self.kernel_id = self.gateway.start_kernel(name="python3")
        self.near = self.tab(self.gateway.url, self.kernel_id)
        self._closing.append(self.near.close)
        self.far = self.tab(self.proxy.url, self.kernel_id)
        self._closing.append(self.far.close)
        self.follower = Follower(self.proxy.url, self.kernel_id, self.gateway.token)
        self._closing.append(self.follower.close)

    def tab(self, url: str, kernel_id: str) -> Tab:
        """It is its maker's to close."""
        return Tab(url, kernel_id, self.gateway.token)

    def close(self) -> None:
        for close in reversed(self._closing):
            close()
        self.proxy.close()
        self.gateway.dispose()

    def messages(self, since: int = 1) -> list[Message]:
        """Messages and gaps, as `GET …/messages` has them now."""
        response = self.gateway.get(
            f"/api/kernels/{self.kernel_id}/messages",
            params={"since": str(since)},
            headers={"Accept": "application/x-ndjson"},
        )
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.iter_lines() if line]

    def submit(self, code: str) -> str:
        """Over REST; returns the run's id."""
        response = self.gateway.post(
            f"/api/kernels/{self.kernel_id}/execute",
            {"code": code},
            headers={"Prefer": "respond-async"},
        )
        assert response.status_code in (200, 202), response.text
        run_id: str = response.json()["id"]
        return run_id

    def run(self, run_id: str) -> dict[str, Any]:
        """What a run is by now."""
        response = self.gateway.get(f"/api/kernels/{self.kernel_id}/runs/{run_id}")
        assert response.status_code == 200, response.text
        run: dict[str, Any] = response.json()
        return run

    # -- processes

    def pid(self, module: str) -> int:
        """Of the process that runs this module of the agent."""
        found = [p for p, argv in self.gateway.home.processes().items() if f"-m {module} " in argv]
        assert len(found) == 1, (module, self.gateway.home.processes())
        return found[0]

    def kill(self, module: str) -> None:
        """Returns when there is another."""
        pid = self.pid(module)
        os.kill(pid, signal.SIGKILL)
        self.wait_for_another(module, pid)

    def wait_for_another(self, module: str, pid: int) -> None:
        """Than this process that was killed."""
        wait_until(
            lambda: any(
                f"-m {module} " in argv
                for other, argv in self.gateway.home.processes().items()
                if other != pid
            ),
            f"{module} is started again",
        )

    def replace_gateway(self) -> None:
        """Kill it, and start another on the same home and port; returns when that one answers."""
        self.proxy.cuts.append(time.monotonic())
        self.gateway.process.kill()
        self.gateway.wait()
        self.gateway = Gateway.start(*self._args, home=self.gateway.home, env=self._env)


def rss(pid: int) -> int:
    """Bytes of memory that a process has to itself and with others."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

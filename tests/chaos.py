"""A TCP proxy on loopback that does to connections what networks do: cut, stall, slow down.

Bytes pass as they are. Its loop runs in a thread of its own; every method may be called from any
other and returns when it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

CHUNK = 16 << 10
BUFFER = 64 << 10
"""bytes that the system keeps for each socket: what is stalled fills up soon"""
LAST_WORDS = 1.0
"""seconds for which a half that was closed with FIN still takes what comes"""


class Cut(enum.Enum):
    FIN = "both ends see the other's orderly close"
    RST = "both ends see a reset; what was under way is gone"
    SILENCE = "the client sees a reset, the server nothing at all"


class ChaosProxy:
    """Passes connections on to a port of this machine, until told otherwise."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._links: set[_Link] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.rate: float | None = None
        """bytes a second to each client; None: as they come"""
        self.cuts: list[float] = []
        """when connections were cut, as `time.monotonic` has it"""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self._thread.start()

    def cut(self, how: Cut, after: int = 0) -> int:
        """Every connection that is open now, once so many more bytes have gone to its client:
        in all likelihood in the middle of a frame. Returns how many there are."""

        def cut() -> int:
            links = [link for link in self._links if link.is_whole]
            for link in links:
                link.cut_after(how, after)
            return len(links)

        return self._do(cut)

    def spare(self) -> None:
        """A cut that has not come yet does not come."""

        def spare() -> None:
            for link in self._links:
                if link.is_whole:
                    link.cut_after(Cut.FIN, None)

        self._do(spare)

    def stall(self) -> None:
        """Nothing more goes to clients; the server's buffers fill."""
        self._do(self._flows.clear)

    def go_on(self) -> None:
        self._do(self._flows.set)

    def close(self) -> None:
        def stop() -> None:
            for link in self._links:
                link.end(Cut.RST)
                link.task.cancel()
            self._serving.cancel()

        self._do(stop)
        self._thread.join(10)

    def _do(self, action: Callable[[], T]) -> T:
        async def act() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())
        self._listener.close()

    async def _serve(self) -> None:
        self._serving = asyncio.current_task()
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                client, _ = await self._loop.sock_accept(self._listener)
                link = _Link(self, client)
                self._links.add(link)
                link.task.add_done_callback(lambda _, link=link: self._links.discard(link))


class _Link:
    """One connection: its two halves, and what is to become of it."""

    def __init__(self, proxy: ChaosProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = socket.socket()
        for half in (self._client, self._server):
            half.setblocking(False)
            half.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            half.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            half.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._how = Cut.FIN
        self._left: int | None = None
        self._end = asyncio.Event()
        self.is_whole = True
        self.task = asyncio.create_task(self._carry())

    def cut_after(self, how: Cut, size: int | None) -> None:
        self._how, self._left = how, size
        if size == 0:
            self._proxy.cuts.append(time.monotonic())
            self.end(how)

    def end(self, how: Cut) -> None:
        self.is_whole = False
        self._how = how
        self._end.set()

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(self._server, self._proxy._target)
        except OSError:
            _reset(self._client)
            self._server.close()
            return
        pumps = [
            asyncio.create_task(self._pump_up()),
            asyncio.create_task(self._pump_down()),
            asyncio.create_task(self._end.wait()),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.is_whole = False
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await self._part()

    async def _pump_up(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._client, CHUNK):
                await loop.sock_sendall(self._server, data)

    async def _pump_down(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._server, self._chunk()):
                await self._proxy._flows.wait()
                if self._left is not None:
                    data = data[: self._left]
                    self._left -= len(data)
                await loop.sock_sendall(self._client, data)
                if self._left == 0:
                    self._proxy.cuts.append(time.monotonic())
                    return
                if self._proxy.rate is not None:
                    await asyncio.sleep(len(data) / self._proxy.rate)

    def _chunk(self) -> int:
        rate = self._proxy.rate
        return CHUNK if rate is None else max(1, min(CHUNK, int(rate / 20)))

    async def _part(self) -> None:
        match self._how:
            case Cut.RST:
                _reset(self._client)
                _reset(self._server)
            case Cut.FIN:
                for half in (self._client, self._server):
                    with contextlib.suppress(OSError):
                        half.shutdown(socket.SHUT_WR)
                # Closing with bytes unread would be a reset
                await asyncio.sleep(LAST_WORDS)
                self._client.close()
                self._server.close()
            case Cut.SILENCE:
                _reset(self._client)
                try:
                    await asyncio.Event().wait()  # until the proxy ends
                finally:
                    self._server.close()


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

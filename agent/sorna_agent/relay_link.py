"""The agent's end of its relay: starts it, or adopts the one that runs, and talks with it.

Watches the relay's process: when it ends by itself, another is started at once and `on_restart` is
called, so that the agent opens its kernels again. Used by `app` (life) and `agent` (kernels).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from sorna_agent import relay_messages
from sorna_agent.relay_messages import (
    CONTROL,
    RPC,
    DetachKernel,
    ForgetKernel,
    Hello,
    InterruptByMessage,
    KeepKernels,
    KernelActivity,
    KernelReady,
    OpenKernel,
    RelayHello,
    StopRelay,
    ToAgent,
    ToRelay,
)
from sorna_jupyter.exceptions import Unavailable

log = logging.getLogger(__name__)

START_TIMEOUT = 20.0
"""seconds for a new relay to answer"""
HELLO_INTERVAL = 5.0
"""seconds between signs of life to the relay"""
STOP_TIMEOUT = 5.0
RESTART_PAUSE = 1.0
"""seconds between attempts, if a relay can't be started"""

OnRequest = Callable[[bytes, bytes, bytes], None]
"""(gateway's route, request id, request)"""
OnActivity = Callable[[KernelActivity], None]


class RelayFailed(Unavailable):
    """The relay process does not start."""


@dataclass(frozen=True)
class RelaySettings:
    """What a relay is started with. Same settings, same `fingerprint`: it can be adopted."""

    listen: str
    directory: Path
    keys_file: Path
    public_key: str
    gateway_keys: tuple[str, ...]
    join_token_file: Path
    orphan_timeout: float
    journals: Path
    retention: int = 64 << 20
    """bytes of a kernel's messages that are kept"""
    total_retention: int = 8 << 30
    """bytes of all kernels' messages that are kept"""
    journal_memory: int = 256 << 20
    """bytes of them that are in memory, too"""
    journal_max_age: float = 7 * 86400.0
    """seconds that messages are kept"""
    max_message: int = 1 << 30
    """bytes of the largest message that is carried"""
    log_level: str = "INFO"

    @property
    def fingerprint(self) -> str:
        facts = (
            relay_messages.VERSION,
            self.listen,
            self.public_key,
            sorted(self.gateway_keys),
            str(self.journals),
            self.retention,
            self.total_retention,
            self.journal_memory,
            self.journal_max_age,
            self.max_message,
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def rpc_socket(self) -> Path:
        return self.directory / "rpc.sock"

    def argv(self) -> list[str]:
        # In one argument: one key in 85 begins with a dash.
        keys = [f"--gateway-key={key}" for key in self.gateway_keys]
        return [
            *(sys.executable, "-m", "sorna_agent.relay"),
            *("--listen", self.listen),
            *("--directory", str(self.directory)),
            *("--keys", str(self.keys_file)),
            *keys,
            *("--join-token-file", str(self.join_token_file)),
            *("--fingerprint", self.fingerprint),
            *("--orphan-timeout", f"{self.orphan_timeout:g}"),
            *("--journals", str(self.journals)),
            *("--retention", str(self.retention)),
            *("--total-retention", str(self.total_retention)),
            *("--journal-memory", str(self.journal_memory)),
            *("--journal-max-age", f"{self.journal_max_age:g}"),
            *("--max-message", str(self.max_message)),
            *("--log-level", self.log_level),
        ]


class RelayLink:
    """Order of calls: set the three callbacks, `start`, the others, `close`."""

    def __init__(self, settings: RelaySettings) -> None:
        self._settings = settings
        self.on_request: OnRequest = lambda route, request_id, request: None
        self.on_activity: OnActivity = lambda activity: None
        self.on_restart: Callable[[], None] = lambda: None
        self.started = 0.0
        self.addresses: list[str] = []
        self.adopted_kernels: list[str] = []
        """connected already in a relay that was adopted; empty in a new one"""
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd: int | None = None
        self._ended = asyncio.Event()
        self._hello: asyncio.Future[RelayHello] | None = None
        self._openings = count(1)
        self._opening: dict[int, tuple[OpenKernel, asyncio.Future[dict[str, Any]]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises RelayFailed."""
        if not await self._adopt():
            await self._spawn()
        self._tasks.append(asyncio.create_task(self._keep_running(), name="relay watcher"))
        self._tasks.append(asyncio.create_task(self._keep_greeting(), name="relay greeting"))

    async def close(self, *, keep_relay: bool = False) -> None:
        """Also ends the relay, unless it shall wait for the next agent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not keep_relay and self._pidfd is not None:
            self._tell(StopRelay())
            await self._end_process()
        self._disconnect()
        self._context.destroy(linger=200)

    async def _adopt(self) -> bool:
        """Whether a relay of an earlier agent runs with our settings; any other is ended."""
        pid = _listening_pid(self._settings.rpc_socket)
        if pid is None:
            return False
        self._watch_process(pid)
        self._connect()
        try:
            async with asyncio.timeout(START_TIMEOUT / 4):
                hello = await self._greet()
        except TimeoutError:
            log.warning("the relay of an earlier agent does not answer: it is replaced")
        else:
            if hello.fingerprint == self._settings.fingerprint:
                log.info("relay %d adopted with %d kernels", hello.pid, len(hello.kernels))
                self._remember(hello)
                return True
            log.info("the relay of an earlier agent has other settings: it is replaced")
        self._tell(StopRelay())
        await self._end_process()
        return False

    async def _spawn(self) -> None:
        self._disconnect()
        # A session of its own: it outlives the agent, and no terminal's Ctrl-C reaches it.
        self._process = subprocess.Popen(
            self._settings.argv(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._watch_process(self._process.pid)
        self._connect()
        greeting = asyncio.ensure_future(self._greet())
        ending = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait(
                (greeting, ending), timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED
            )
            if not greeting.done():
                await self._end_process(at_once=True)
                raise RelayFailed()
            self._remember(greeting.result())
        finally:
            greeting.cancel()
            ending.cancel()
        log.info("relay %d started", self._process.pid)

    def _remember(self, hello: RelayHello) -> None:
        self.started = hello.started
        self.addresses = hello.addresses
        self.adopted_kernels = hello.kernels

    async def _keep_running(self) -> None:
        while True:
            await self._ended.wait()
            self._reap()
            log.error("the relay ended; it is started again and all kernels are opened anew")
            while True:
                try:
                    await self._spawn()
                    break
                except (RelayFailed, OSError):
                    log.exception("the relay can't be started; next attempt follows")
                    await asyncio.sleep(RESTART_PAUSE)
            for message, _ in self._opening.values():
                self._tell(message)
            self.on_restart()

    async def _keep_greeting(self) -> None:
        while True:
            await asyncio.sleep(HELLO_INTERVAL)
            self._tell(Hello())

    async def _end_process(self, *, at_once: bool = False) -> None:
        assert self._pidfd is not None
        try:
            async with asyncio.timeout(0 if at_once else STOP_TIMEOUT):
                await self._ended.wait()
        except TimeoutError:
            log.warning("the relay is killed")
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._ended.wait()
        self._reap()

    def _watch_process(self, pid: int) -> None:
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        assert self._pidfd is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()

    def _reap(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._process is not None:
            self._process.wait()
            self._process = None

    # -- kernels -----------------------------------------------------------------------------

    async def open_kernel(self, kernel_id: str, address: str, key: str) -> dict[str, Any]:
        """Connect, and wait until the kernel answers; returns its kernel_info. No timeout here:
        the caller has one."""
        opening = next(self._openings)
        ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        message = OpenKernel(kernel_id=kernel_id, address=address, key=key, opening=opening)
        self._opening[opening] = (message, ready)
        try:
            self._tell(message)
            return await ready
        finally:
            del self._opening[opening]

    def reopen_kernel(self, kernel_id: str, address: str, key: str, execution_state: str) -> None:
        """Connect to a kernel that is known to run."""
        self._tell(
            OpenKernel(
                kernel_id=kernel_id,
                address=address,
                key=key,
                opening=next(self._openings),
                ask_ready=False,
                execution_state=execution_state,
            )
        )

    def detach_kernel(self, kernel_id: str) -> None:
        self._tell(DetachKernel(kernel_id=kernel_id))

    def forget_kernel(self, kernel_id: str) -> None:
        self._tell(ForgetKernel(kernel_id=kernel_id))

    def keep_kernels(self, kernel_ids: list[str]) -> None:
        """What the relay still keeps of any other goes."""
        self._tell(KeepKernels(kernel_ids=kernel_ids))

    def interrupt_kernel(self, kernel_id: str) -> None:
        self._tell(InterruptByMessage(kernel_id=kernel_id))

    def reply(self, route: bytes, request_id: bytes, verdict_and_reply: list[bytes]) -> None:
        self._send([RPC, route, request_id, *verdict_and_reply])

    # -- the socket --------------------------------------------------------------------------

    def _connect(self) -> None:
        """A new socket for each relay process: nothing queued for one reaches another."""
        self._disconnect()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 200
        self._socket.reconnect_ivl = 20
        self._socket.connect(f"ipc://{self._settings.rpc_socket}")
        self._listener = asyncio.create_task(self._listen(self._socket), name="relay listener")

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._listener.cancel()
            self._socket.close()
            self._socket = None

    async def _greet(self) -> RelayHello:
        self._hello = asyncio.get_running_loop().create_future()
        self._tell(Hello())
        return await self._hello

    def _tell(self, message: ToRelay) -> None:
        self._send([CONTROL, relay_messages.encode(message)])

    def _send(self, frames: list[bytes]) -> None:
        if self._socket is not None:
            self._socket.send_multipart(frames)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                if frames[0] == RPC:
                    _, route, request_id, request = frames
                    self.on_request(route, request_id, request)
                else:
                    self._take(relay_messages.decode_for_agent(frames[1]))
            except Exception:  # one message's failure must not end the link
                log.exception("a message of the relay could not be taken")

    def _take(self, message: ToAgent) -> None:
        match message:
            case RelayHello():
                if self._hello is not None and not self._hello.done():
                    self._hello.set_result(message)
            case KernelReady():
                _, ready = self._opening.get(message.opening, (None, None))
                if ready is not None and not ready.done():
                    ready.set_result(message.kernel_info)
            case KernelActivity():
                self.on_activity(message)


def _listening_pid(path: Path) -> int | None:
    """Who listens on this unix socket; None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid

"""Tells every gateway, again and again, who this agent is and what it holds.

Dials all manager addresses (CURVE, the gateway's key pinned); beats every few seconds, and at once
when something changed. Does what the replies ask for. Used by `app`, which ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import zmq
import zmq.asyncio

from sorna_jupyter.exceptions import AgentRefused, SornaError
from sorna_jupyter.protocol import Beat, decode_beat_reply, encode

log = logging.getLogger(__name__)

URGENT_PAUSE = 0.05
"""seconds that changes are collected for, before a beat tells them"""
CALM_PAUSE = 0.3
"""the same for what may come in floods: build progress, busy and idle"""
SILENCE_TOLD = 10.0
"""seconds without any reply, after which the log says so"""


class Orphaned(SornaError):
    """No gateway has answered for too long."""


class Heartbeat:
    """`run` beats until the agent is refused or orphaned."""

    def __init__(
        self,
        managers: Sequence[str],
        *,
        manager_key: str,
        public_key: str,
        secret_key: str,
        interval: float,
        orphan_timeout: float,
        make_beat: Callable[[], Beat],
        destroy: Callable[[str], Awaitable[object]],
    ) -> None:
        """`orphan_timeout`: seconds without an accepted reply that end `run`; 0: never."""
        self._managers = list(managers)
        self._manager_key = manager_key.encode()
        self._public_key = public_key.encode()
        self._secret_key = secret_key.encode()
        self._interval = interval
        self._orphan_timeout = orphan_timeout
        self._make_beat = make_beat
        self._destroy = destroy
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._wake = asyncio.Event()
        self._heard_at = self._loop.time()
        self._was_accepted = False
        self._silence_told = False
        self._silence_counts = True
        self._refusal: asyncio.Future[str] = self._loop.create_future()
        self._destroying: dict[str, asyncio.Task[None]] = {}

    def beat_soon(self, urgent: bool = True) -> None:
        pause = URGENT_PAUSE if urgent else CALM_PAUSE
        self._due = min(self._due, self._loop.time() + pause)
        self._wake.set()

    def expect_silence(self) -> None:
        """The gateway has said that it goes: silence does not count until one accepts a beat."""
        self._silence_counts = False

    async def run(self) -> None:
        """Raises AgentRefused if the first gateways to answer do not accept us, Orphaned if none
        accepts a beat for too long."""
        context = zmq.asyncio.Context()
        sockets = [self._dial(context, address) for address in self._managers]
        listeners = [
            asyncio.create_task(self._listen(socket, address), name=f"replies of {address}")
            for socket, address in zip(sockets, self._managers, strict=True)
        ]
        try:
            while True:
                self._beat(sockets)
                await self._until_due()
                self._check_silence()
                if self._refusal.done():
                    raise AgentRefused(self._refusal.result())
        finally:
            for task in (*listeners, *self._destroying.values()):
                task.cancel()
            await asyncio.gather(*listeners, *self._destroying.values(), return_exceptions=True)
            context.destroy(linger=0)

    def _dial(self, context: zmq.asyncio.Context, address: str) -> zmq.asyncio.Socket:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        # Our own pair: the gateway sees in the handshake that we hold the key that the beat names.
        socket.curve_publickey = self._public_key
        socket.curve_secretkey = self._secret_key
        socket.curve_serverkey = self._manager_key
        socket.immediate = 1  # beats for a gateway that is away are not kept for it
        socket.sndhwm = 4
        socket.reconnect_ivl = 100
        socket.reconnect_ivl_max = 2000
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        socket.connect(address)
        return socket

    # -- beats -------------------------------------------------------------------------------

    def _beat(self, sockets: list[zmq.asyncio.Socket]) -> None:
        data = encode(self._make_beat())
        is_connected = False
        for socket in sockets:
            # NOBLOCK: the future is done, with zmq.Again if that gateway is away.
            sending = asyncio.ensure_future(socket.send(data, flags=zmq.NOBLOCK))
            is_connected |= sending.exception() is None
        pause = self._interval if is_connected or self._was_accepted else 0.1
        self._due = self._loop.time() + pause

    async def _until_due(self) -> None:
        while (left := self._due - self._loop.time()) > 0 and not self._refusal.done():
            self._wake.clear()
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _check_silence(self) -> None:
        silence = self._loop.time() - self._heard_at
        if silence > SILENCE_TOLD and not self._silence_told:
            self._silence_told = True
            log.warning(
                "no gateway at %s has answered for %.0f s; is it up, is --manager-key its key?",
                ", ".join(self._managers),
                silence,
            )
        if self._orphan_timeout and self._silence_counts and silence > self._orphan_timeout:
            raise Orphaned(f"no gateway has answered for {silence:.0f} s")

    # -- replies -----------------------------------------------------------------------------

    async def _listen(self, socket: zmq.asyncio.Socket, address: str) -> None:
        while True:
            data = await socket.recv()
            try:
                self._take(data, address)
            except Exception:  # one reply's failure must not end the listening
                log.exception("a reply of gateway %s could not be taken", address)

    def _take(self, data: bytes, address: str) -> None:
        reply = decode_beat_reply(data)
        if not reply.accepted:
            log.error("gateway %s does not accept this agent: %s", address, reply.reason)
            if not self._was_accepted and not self._refusal.done():
                self._refusal.set_result(reply.reason)
                self._wake.set()
            return
        if not self._was_accepted or self._silence_told:
            log.info("gateway %s accepts this agent", address)
        self._was_accepted = True
        self._silence_told = False
        self._silence_counts = True
        self._heard_at = self._loop.time()
        for kernel_id in reply.destroy:
            if kernel_id not in self._destroying:
                self._destroying[kernel_id] = asyncio.create_task(self._destroy_one(kernel_id))

    async def _destroy_one(self, kernel_id: str) -> None:
        try:
            log.info("kernel %s is not wanted by the gateway", kernel_id)
            await self._destroy(kernel_id)
        except SornaError as error:
            log.error("kernel %s could not be destroyed: %s", kernel_id, error)
        finally:
            del self._destroying[kernel_id]

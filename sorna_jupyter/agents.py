"""The gateway's side of its agents: hears their beats, asks them for things, carries channels.

`HeartbeatListener` is the port that agents dial. `AgentPool` dials back to the relay's port of each
agent: one explicit method a request, and `attach` for a client session's channels; who reads what
from there is the matter of `cursors`. What a beat means is decided by `kernels.Kernels`; nothing
here asks the registry.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import uuid
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TypeVar, cast

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from sorna_jupyter import protocol
from sorna_jupyter.cursors import Attachment, Cursor, Feed, Reader, Reading
from sorna_jupyter.exceptions import AgentUnreachable
from sorna_jupyter.protocol import (
    Beat,
    BeatReply,
    Message,
    Request,
    pack_number,
    read_number,
    receive_frames,
    send_frames,
)
from sorna_jupyter.registry import AgentRow

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Message)


class KeyPair:
    """A Curve key pair, Z85."""

    def __init__(self, public: str, secret: str) -> None:
        self.public = public
        self.secret = secret

    def secure(self, socket: zmq.Socket[bytes], server_key: str | None = None) -> None:
        """Make `socket` speak Curve: as server, or as a client that pins `server_key`."""
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()
        if server_key is None:
            socket.curve_server = True
        else:
            socket.curve_serverkey = server_key.encode()


class HeartbeatListener:
    """Port 5001: agents dial it with a `Beat` and get a `BeatReply`.

    Any Curve key may connect; what it says is believed only with the join token, and only for the
    public key that the connection has proven to hold (RFC 27 ZAP's User-Id).
    """

    def __init__(
        self,
        keys: KeyPair,
        join_token: str,
        endpoints: list[str],
        on_beat: Callable[[Beat], Awaitable[BeatReply]],
    ) -> None:
        self._keys = keys
        self._join_token = join_token
        self._on_beat = on_beat
        self._endpoints = endpoints
        self._context = zmq.asyncio.Context()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        """the tcp endpoint as bound, with its port"""

    async def start(self) -> None:
        """Raises `zmq.ZMQError` if an endpoint can't be bound."""
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=zmq.auth.CURVE_ALLOW_ANY)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = 16 << 20
        self._socket.zap_domain = b"beats"
        self._keys.secure(cast("zmq.Socket[bytes]", self._socket))
        for endpoint in self._endpoints:
            self._socket.bind(endpoint)
            if endpoint.startswith("tcp"):
                self.address = _bound_to(self._socket)
        self._loop = asyncio.create_task(self._listen(), name="heartbeat listener")

    async def stop(self) -> None:
        self._loop.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._loop, *self._tasks, return_exceptions=True)
        self._socket.close()
        self._authenticator.stop()
        self._context.destroy(linger=0)

    async def _listen(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            # A slow registry must not make the other agents' beats look late.
            task = asyncio.create_task(self._answer(frames), name="beat")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            return
        peer, data = frames
        try:
            reply = await self._judge(str(data.get("User-Id")), data.bytes)
        except Exception:  # one beat's failure must not end the listener
            log.exception("a beat could not be taken")
            return
        await self._socket.send_multipart([peer.bytes, protocol.encode(reply)])

    async def _judge(self, proven_key: str, data: bytes) -> BeatReply:
        try:
            beat = protocol.decode_beat(data)
        except ValueError as error:
            return BeatReply(
                accepted=False, reason=f"not a beat of version {protocol.VERSION}: {error}"
            )
        if beat.version != protocol.VERSION:
            return BeatReply(
                accepted=False,
                reason=f"this gateway speaks version {protocol.VERSION}, the agent {beat.version}: "
                "install the same release on both",
            )
        if not _same_secret(beat.join_token, self._join_token):
            return BeatReply(accepted=False, reason="wrong join token")
        if beat.public_key != proven_key:
            return BeatReply(accepted=False, reason="the beat names a key that it does not hold")
        return await self._on_beat(beat)


def _bound_to(socket: zmq.asyncio.Socket) -> str:
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.rstrip(b"\0").decode()


def _same_secret(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


class AgentPool:
    """Every agent that this gateway has spoken to, one connection each."""

    def __init__(self, keys: KeyPair, join_token: str, rpc_timeout: float = 30.0) -> None:
        """`rpc_timeout`: seconds that an agent has for what should be quick."""
        self._keys = keys
        self._join_token = join_token
        self._rpc_timeout = rpc_timeout
        self._context = zmq.Context()
        self._links: dict[str, _AgentLink] = {}

    async def create_kernel(
        self, agent: AgentRow, request: protocol.CreateKernel, timeout: float
    ) -> protocol.KernelStarted:
        """`timeout`: seconds, with the building of the image."""
        return await self._ask(agent, request, protocol.KernelStarted, timeout)

    async def restart_kernel(
        self, agent: AgentRow, request: protocol.RestartKernel
    ) -> protocol.KernelStarted:
        timeout = request.start_timeout + self._rpc_timeout
        return await self._ask(agent, request, protocol.KernelStarted, timeout)

    async def interrupt_kernel(self, agent: AgentRow, kernel_id: str) -> None:
        request = protocol.InterruptKernel(kernel_id=kernel_id)
        await self._ask(agent, request, protocol.Done, self._rpc_timeout)

    async def destroy_kernel(self, agent: AgentRow, kernel_id: str) -> None:
        request = protocol.DestroyKernel(kernel_id=kernel_id)
        await self._ask(agent, request, protocol.Done, self._rpc_timeout)

    async def read_kernel_log(self, agent: AgentRow, kernel_id: str, lines: int) -> str:
        request = protocol.ReadKernelLog(kernel_id=kernel_id, lines=lines)
        return (await self._ask(agent, request, protocol.KernelLog, self._rpc_timeout)).text

    async def build_images(self, agent: AgentRow, names: list[str]) -> None:
        request = protocol.BuildImages(names=names)
        await self._ask(agent, request, protocol.Done, self._rpc_timeout)

    async def stop_agent(self, agent: AgentRow, *, keep_kernels: bool) -> None:
        request = protocol.StopAgent(keep_kernels=keep_kernels)
        await self._ask(agent, request, protocol.Done, self._rpc_timeout)

    def attach(
        self,
        agent: AgentRow,
        kernel_id: str,
        session_id: str,
        reader: Reader,
        *,
        resumes: bool = False,
    ) -> Attachment:
        """`reader` gets the kernel's iopub messages and this session's replies: from now on, or,
        if it `resumes`, from where this session's client acknowledged them last."""
        return self._link(agent).attach(kernel_id, session_id, reader, resumes)

    def read(self, agent: AgentRow, kernel_id: str, since: int) -> Reading:
        """All that left the kernel, from number `since` on."""
        return Reading(self._link(agent), kernel_id, since)

    def reopen(self, agent: AgentRow) -> None:
        """The agent's relay is a new process: want there again what we want."""
        if agent.id in self._links:
            self._link(agent).reopen()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.destroy(linger=0)

    async def _ask(self, agent: AgentRow, request: Request, reply: type[R], timeout: float) -> R:
        answer = await self._link(agent).ask(request, timeout)
        assert isinstance(answer, reply)
        return answer

    def _link(self, agent: AgentRow) -> _AgentLink:
        link = self._links.get(agent.id)
        if link is None:
            link = self._links[agent.id] = _AgentLink(
                self._context, self._keys, self._join_token, agent
            )
        elif link.is_outdated(agent):
            link.redial(agent)
        return link


class _AgentLink:
    """One DEALER to one agent's port, drained from the event loop without a task a message."""

    BATCH = 8
    """batches of records (or answers) taken in one pass, so that a flood of one kernel lets other
    work in between"""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: KeyPair,
        join_token: str,
        agent: AgentRow,
    ) -> None:
        self._context = context
        self._join_token = join_token
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._ids = count(1)
        self._asked: dict[bytes, asyncio.Future[list[bytes]]] = {}
        self._feeds: dict[str, Feed] = {}
        self._cursors: dict[bytes, Cursor] = {}
        self._route = uuid.uuid4().bytes
        self._drain_scheduled = False
        self._dial(agent)

    def _dial(self, agent: AgentRow) -> None:
        self._agent = agent
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvhwm = 0
        self._socket.sndhwm = 100_000
        self._socket.reconnect_ivl = 50
        # The same name after a reconnect, so that the relay does not serve our ghost as well.
        self._socket.routing_id = b"g" + self._route
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        address = _best_address(agent)
        if address.startswith("ipc:"):
            # Its directory is ours alone: nobody listens there, and encryption would cost more CPU
            # than all else that happens to a message.
            self._socket.plain_username = protocol.GATEWAY.encode()
            self._socket.plain_password = self._join_token.encode()
        else:
            self._keys.secure(self._socket, agent.public_key)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._has_connected = False
        self._socket.connect(address)
        self._fds = [cast(int, s.getsockopt(zmq.FD)) for s in (self._socket, self._monitor)]
        self._loop.add_reader(self._fds[0], self._drain)
        self._loop.add_reader(self._fds[1], self._on_connection)
        # ZeroMQ signals that something came only to who has seen that nothing was there.
        self._on_connection()

    def is_outdated(self, agent: AgentRow) -> bool:
        mine = self._agent
        return (mine.public_key, mine.addresses) != (agent.public_key, agent.addresses)

    def redial(self, agent: AgentRow) -> None:
        self._hang_up()
        self._dial(agent)
        self.reopen()

    def close(self) -> None:
        self._hang_up()
        for future in self._asked.values():
            future.cancel()

    def _hang_up(self) -> None:
        for descriptor in self._fds:
            self._loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def _on_connection(self) -> None:
        """After a cut, the relay may have given us up: say again what we want, from where on."""
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            if self._has_connected:
                log.info("connected to agent %s again", self._agent.id)
                self.reopen()
            self._has_connected = True

    # -- requests

    async def ask(self, request: Request, timeout: float) -> Message:
        request_id = self.new_name()
        answered: asyncio.Future[list[bytes]] = self._loop.create_future()
        self._asked[request_id] = answered
        try:
            self.send([protocol.RPC, request_id, protocol.encode(request)])
            async with asyncio.timeout(timeout):
                frames = await answered
        except TimeoutError as error:
            what = type(request).__name__
            raise AgentUnreachable(
                f"agent {self._agent.id} did not answer {what} within {timeout:g} s"
            ) from error
        finally:
            del self._asked[request_id]
        return protocol.decode_reply(request, frames)

    # -- channels

    def attach(self, kernel_id: str, session_id: str, reader: Reader, resumes: bool) -> Attachment:
        feed = self._feeds.get(kernel_id)
        if feed is None:
            feed = self._feeds[kernel_id] = Feed(self, kernel_id)
        attachment = Attachment(self, feed, session_id, reader, resumes)
        self._open(kernel_id, session_id)
        feed.attached.append(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Safe to repeat."""
        kernel_id = attachment.kernel_id
        feed = self._feeds.get(kernel_id)
        if feed is None or attachment not in feed.attached:
            return
        feed.attached.remove(attachment)
        if attachment.session_id not in feed.sessions:
            self._try([protocol.CLOSE, kernel_id.encode(), attachment.session_id.encode()])
        if not feed.attached:
            del self._feeds[kernel_id]
            feed.close()

    def acknowledge(self, attachment: Attachment, seq: int) -> None:
        names = (attachment.kernel_id.encode(), attachment.session_id.encode())
        self._try([protocol.ACKNOWLEDGE, *names, pack_number(seq)])

    def new_name(self) -> bytes:
        return pack_number(next(self._ids))

    def subscribe(self, cursor: Cursor) -> None:
        self.send(cursor.request())
        self._cursors[cursor.id] = cursor

    def credit(self, cursor: Cursor, size: int) -> None:
        if cursor.id in self._cursors:
            names = (cursor.kernel_id.encode(), cursor.id)
            self._try([protocol.CREDIT, *names, pack_number(size)])

    def unsubscribe(self, cursor: Cursor) -> None:
        if self._cursors.pop(cursor.id, None) is not None:
            self._try([protocol.UNSUBSCRIBE, cursor.kernel_id.encode(), cursor.id])

    def reopen(self) -> None:
        """Say again what we want, from where on: the relay is a new process, or gave us up."""
        for cursor in self._cursors.values():
            self.send(cursor.request())
        for kernel_id, feed in self._feeds.items():
            for session_id in feed.sessions:
                self._open(kernel_id, session_id)

    def _open(self, kernel_id: str, session_id: str) -> None:
        self.send([protocol.OPEN, kernel_id.encode(), session_id.encode()])

    def _try(self, frames: list[bytes]) -> None:
        """What need not reach an agent that is away: then it has forgotten us, too."""
        try:
            self.send(frames)
        except AgentUnreachable:
            log.debug("agent %s is away", self._agent.id)

    # -- the socket

    def send(self, frames: list[bytes]) -> None:
        try:
            send_frames(self._socket, frames)
        except zmq.Again as error:
            raise AgentUnreachable(f"agent {self._agent.id} does not take messages") from error
        # Sending can use up the edge that the descriptor would have signalled.
        self._schedule_drain()

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        if self._socket.closed:
            return
        for _ in range(self.BATCH):
            try:
                frames = receive_frames(self._socket)
            except zmq.Again:
                return
            try:
                self._take(frames)
            except Exception:  # one message's failure must not stop the others
                log.exception("a message of agent %s could not be taken", self._agent.id)
        self._schedule_drain()

    def _take(self, frames: list[bytes]) -> None:
        kind = frames[0]
        if kind == protocol.RECORDS:
            _, cursor_id, _, begin, end, *records = frames
            if cursor := self._cursors.get(cursor_id):  # else nobody listens any more
                cursor.take(read_number(begin), read_number(end), records)
        elif kind == protocol.OPEN:
            _, kernel, session, begin = frames
            if feed := self._feeds.get(kernel.decode()):
                for attachment in tuple(feed.attached):
                    if attachment.session_id == session.decode():
                        attachment.begin(read_number(begin))
        elif kind == protocol.RPC:
            future = self._asked.get(frames[1])
            if future is not None and not future.done():
                future.set_result(frames[2:])
        elif kind == protocol.LOST:
            _, cursor_id, kernel, *numbers = frames
            first, last, size = map(read_number, numbers)
            log.warning("kernel %s: messages %d to %d are lost", kernel.decode(), first, last)
            if cursor := self._cursors.get(cursor_id):
                cursor.lose(first, last, size)
        else:
            log.warning("agent %s sent something unknown: %r", self._agent.id, kind[:16])


def _best_address(agent: AgentRow) -> str:
    for address in agent.addresses:
        if not address.startswith("ipc://"):
            return address
        if agent.host == protocol.host_name() and os.path.exists(address.removeprefix("ipc://")):
            return address
    raise AgentUnreachable(f"agent {agent.id} has no address that can be reached from here")

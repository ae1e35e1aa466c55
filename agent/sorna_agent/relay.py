"""The relay: carries every kernel's channels, keeps their journals, owns the agent port.

A process of its own beside the agent's, one a host: a slow Docker call never delays a message, and
the agent may crash or be upgraded without losing one. It does little: a plain poll loop over three
sides, none of which can block it or make it drop something:

* kernels (`relay_kernel`): what leaves one goes into its journal, which is on disk before anyone
  gets to see it;
* gateways (on tcp with CURVE; on ipc, in a directory that nobody else can enter, with the cluster's
  secret and without encryption, which would cost more than all the rest): a subscription is a
  number in a journal, read on as far as its credit lasts and its connection takes it; requests
  pass to the agent;
* the agent (`relay_messages`, over `rpc.sock`).

Started and adopted by `relay_link`; run as `python -m sorna_agent.relay`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, cast

import zmq
from zmq.auth.thread import ThreadAuthenticator

from sorna_agent import relay_messages as agent_side
from sorna_agent.journal import Journal
from sorna_agent.poller import Poller, Socket
from sorna_agent.relay_kernel import BATCH, GATEWAY_THREAD, Cursor, KernelSide, Urgency
from sorna_agent.relay_messages import (
    CONTROL,
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
)
from sorna_jupyter.exceptions import AgentUnreachable
from sorna_jupyter.protocol import (
    ACKNOWLEDGE,
    CLOSE,
    CREDIT,
    GATEWAY,
    LOST,
    MESSAGE,
    OPEN,
    RECORD_COST,
    RECORDS,
    RPC,
    SUBSCRIBE,
    UNSUBSCRIBE,
    encode_reply,
    pack_number,
    read_number,
    receive_frames,
    send_frames,
)

log = logging.getLogger(__name__)

AGENT_PORT, AGENT_SOCKET = SOCKETS = ("relay.sock", "rpc.sock")
"""for gateways, for the agent"""
ACTIVITY_PAUSE = 0.1
"""seconds between two reports of activity to the agent"""
SHORTEST_BACKLOG_PAUSE, LONGEST_BACKLOG_PAUSE = 0.002, 0.1
"""seconds until a gateway that takes no more is tried again; doubles while it takes nothing"""
HOLD_BACK = 0.001
"""seconds that output right behind other output waits at most for what follows, and the reply of an
execution for its `idle`, or the other way round. The more goes out at once, the more comes twice to
a client that is cut off before it can acknowledge it."""
HOLD_BEGIN = 0.005
"""seconds that the word that a kernel begins waits"""
SWEEP_PAUSE = 1.0
JOURNAL_SWEEP_PAUSE = 60.0
JOURNAL_MEMORY = 4 << 20
"""bytes of a kernel's newest messages in memory, where many are; older ones are read from disk"""
GATEWAY_QUEUE = 500
"""messages in ZeroMQ's hands for one gateway; the rest waits in the journals, which cost nothing"""
SEND_BYTES = 256 << 10
"""of one kernel's records that go to one subscription before the others get their turn"""
OUTBOX_LIMIT = 10_000
"""replies waiting for one gateway that does not read"""


@dataclass(frozen=True)
class JournalLimits:
    """What is kept of the kernels' messages; sizes in bytes, age in seconds."""

    retention: int
    """a kernel"""
    total: int
    """of all kernels; above it, each keeps an equal share"""
    memory: int
    """of all kernels' newest messages, in memory"""
    max_age: float


class Relay:
    """One poll loop; every method runs in it and returns at once."""

    def __init__(
        self,
        *,
        listen: str,
        directory: Path,
        journals: Path,
        secret_key: bytes,
        public_key: bytes,
        gateway_keys: list[str],
        join_token: str,
        fingerprint: str,
        orphan_timeout: float,
        limits: JournalLimits,
        max_message: int,
    ) -> None:
        self.context: zmq.Context[Socket] = zmq.Context(io_threads=2)
        self.context.set(zmq.MAX_SOCKETS, 65_000)
        self.started = time.time()
        self.fingerprint = fingerprint
        self.orphan_timeout = orphan_timeout
        self.limits = limits
        self.max_message = max_message
        self.poller = Poller()
        self._kernels: dict[bytes, KernelSide] = {}
        self._with_output: set[KernelSide] = set()
        self._held_back: dict[KernelSide, float] = {}
        """until when, monotonic"""
        self._active: set[KernelSide] = set()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = count()
        self._backlog_pause = 0.0
        self._outboxes: dict[bytes, deque[list[bytes]]] = {}
        self._agent: bytes | None = None
        self._agent_heard = time.monotonic()
        self._is_stopping = False
        self._directory = directory
        self._journals = journals
        journals.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._authenticator = self._allow_only(gateway_keys, join_token)
        self._gateways: list[Socket] = []
        self._socket_of: dict[bytes, Socket] = {}
        """by a gateway's route"""

        def with_plain(socket: Socket) -> None:
            socket.plain_server = True

        def with_curve(socket: Socket) -> None:
            socket.curve_server = True
            socket.curve_publickey = public_key
            socket.curve_secretkey = secret_key

        self.addresses = [
            self._bind_gateways(f"ipc://{directory}/{AGENT_PORT}", with_plain),
            self._bind_gateways(listen, with_curve),
        ]
        self._agents = self._bind_agent()

    def _allow_only(self, gateway_keys: list[str], join_token: str) -> ThreadAuthenticator:
        allowed = {key.encode() for key in gateway_keys}

        class Keys:
            def callback(self, domain: str, key: bytes) -> bool:
                return key in allowed

        authenticator = ThreadAuthenticator(self.context)
        authenticator.start()
        authenticator.configure_curve_callback(credentials_provider=Keys())
        authenticator.configure_plain(passwords={GATEWAY: join_token})
        return authenticator

    def _bind_gateways(self, address: str, secure: Callable[[Socket], None]) -> str:
        """Returns the address as bound, with its port."""
        socket = self.context.socket(zmq.ROUTER)
        secure(socket)
        socket.setsockopt(zmq.AFFINITY, GATEWAY_THREAD)
        socket.linger = 1000  # the last reply goes out before we do
        socket.router_mandatory = True  # or ROUTER drops what a slow gateway does not take
        socket.sndhwm = GATEWAY_QUEUE
        socket.rcvhwm = 0
        socket.ipv6 = "[" in address
        socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
        # A gateway that reconnects under its own routing id takes over from its former connection.
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.bind(address)
        self._gateways.append(socket)
        self.poller.watch(socket, self._drain_gateways)
        return cast(bytes, socket.last_endpoint).rstrip(b"\0").decode()

    def _bind_agent(self) -> Socket:
        socket = self.context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.router_mandatory = True
        socket.bind(f"ipc://{self._directory}/{AGENT_SOCKET}")
        self.poller.watch(socket, self._drain_agent)
        return socket

    # -- the loop ----------------------------------------------------------------------------

    def run(self) -> None:
        self._sweep()
        self._sweep_journals()
        log.info("relay listens on %s", ", ".join(self.addresses))
        while not self._is_stopping:
            self.poller.run_once(self._pause())
            self._release()
            self._send_output()
            self._run_timers()

    def close(self) -> None:
        for kernel in self._kernels.values():
            kernel.detach()
            kernel.journal.close()
        self._agents.close()
        for socket in self._gateways:
            socket.close()
        self._authenticator.stop()
        self.poller.close()
        self.context.term()
        for name in SOCKETS:
            (self._directory / name).unlink(missing_ok=True)  # ZeroMQ leaves them

    def _pause(self) -> float:
        """Seconds to sleep at most, if no message comes."""
        until = min([self._timers[0][0], *self._held_back.values()])
        pause = max(0.0, until - time.monotonic())
        if self._with_output or self._outboxes:
            # Something is left that a gateway did not take, or that did not fit into one round.
            return min(pause, self._backlog_pause)
        return pause

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers[0][0] <= now:
            _, _, action = heapq.heappop(self._timers)
            action()

    def _sweep(self) -> None:
        self.call_later(SWEEP_PAUSE, self._sweep)
        now = time.monotonic()
        for kernel in self._kernels.values():
            kernel.close_ended_sessions(now)
        if self.orphan_timeout and now - self._agent_heard > self.orphan_timeout:
            log.warning("no agent for %g s: the relay ends", self.orphan_timeout)
            self._is_stopping = True

    def _sweep_journals(self) -> None:
        self.call_later(JOURNAL_SWEEP_PAUSE, self._sweep_journals)
        self._share_journals()
        for kernel in self._kernels.values():
            kernel.journal.sweep(time.time())

    def _share_journals(self) -> None:
        """Each kernel its share of what all of them may keep together."""
        limits, count = self.limits, max(1, len(self._kernels))
        for kernel in self._kernels.values():
            kernel.journal.retention = min(limits.retention, limits.total // count)
            kernel.journal.memory = min(JOURNAL_MEMORY, limits.memory // count)

    # -- what `KernelSide` asks of us --------------------------------------------------------

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_ids), action))

    def on_output(self, kernel: KernelSide, urgency: Urgency = Urgency.NOW) -> None:
        """A word that a kernel begins, output right behind other output, and the first half of an
        execution's end wait a moment for what follows: most of the wake-ups of quick executes and
        of floods of small prints, here, in the gateway and in its clients."""
        now = time.monotonic()
        is_first = now - kernel.sent_at > HOLD_BACK
        if urgency is Urgency.NOW or (urgency is Urgency.SOON and is_first):
            self._held_back.pop(kernel, None)
            self._with_output.add(kernel)
            kernel.wake()  # which `_release` no longer does
            return
        if urgency is Urgency.SOON:
            kernel.rest()
        pause = HOLD_BEGIN if urgency is Urgency.LATER else HOLD_BACK
        self._held_back[kernel] = min(now + pause, self._held_back.get(kernel, math.inf))

    def _release(self) -> None:
        if not self._held_back:
            return
        now = time.monotonic()
        for kernel in [kernel for kernel, until in self._held_back.items() if until <= now]:
            del self._held_back[kernel]
            kernel.wake()
            self._with_output.add(kernel)

    def on_activity(self, kernel: KernelSide) -> None:
        if not self._active:
            self.call_later(ACTIVITY_PAUSE, self._tell_activity)
        self._active.add(kernel)

    def on_ready(self, kernel: KernelSide, opening: int, kernel_info: dict[str, Any]) -> None:
        log.debug("kernel %s answers", kernel)
        self._tell_agent(
            KernelReady(kernel_id=str(kernel), opening=opening, kernel_info=kernel_info)
        )

    def _tell_activity(self) -> None:
        for kernel in self._active:
            self._tell_agent(
                KernelActivity(
                    kernel_id=str(kernel),
                    execution_state=kernel.execution_state,
                    last_activity=kernel.last_activity,
                    seq=kernel.journal.next - 1,
                )
            )
        self._active.clear()

    # -- gateways ----------------------------------------------------------------------------

    def _drain_gateways(self, socket: Socket) -> bool:
        for _ in range(BATCH):
            try:
                route, *frames = receive_frames(socket)
            except zmq.Again:
                return False
            self._socket_of[route] = socket
            try:
                self._take_from_gateway(route, frames)
            except Exception:  # whatever one gateway sends, the others go on
                log.exception("bad frames from a gateway: %s", [len(frame) for frame in frames])
        return True

    def _take_from_gateway(self, route: bytes, frames: list[bytes]) -> None:
        kind = frames[0] if frames else b""
        if kind == RPC and len(frames) == 3:
            self._pass_to_agent(route, frames[1], frames[2])
            return
        kernel = self._kernels.get(frames[1]) if len(frames) > 1 else None
        if kernel is None:
            log.debug("frames for a kernel that is not here")
        elif kind == MESSAGE and len(frames) >= 8:
            kernel.send(frames[2], route, frames[3], frames[4:])
        elif kind == OPEN and len(frames) == 3:
            kernel.open_session(frames[2], route)
            unread = pack_number(kernel.unread_by(frames[2]))
            self._reply(route, [OPEN, kernel.id, frames[2], unread])
        elif kind == CLOSE and len(frames) == 3:
            kernel.close_session(frames[2], route, time.monotonic())
        elif kind == ACKNOWLEDGE and len(frames) == 4:
            kernel.acknowledge(frames[2], read_number(frames[3]))
        elif kind == SUBSCRIBE and list(map(len, frames[2:])) == [8, 8, 8]:
            seq, credit = map(read_number, frames[3:])
            # Beyond the end, as of a journal that is lost: from now on.
            seq = min(seq or kernel.journal.next, kernel.journal.next)
            kernel.cursors[route, frames[2]] = Cursor(route, frames[2], seq, credit)
            self._with_output.add(kernel)
        elif kind == CREDIT and list(map(len, frames[2:])) == [8, 8]:
            if cursor := kernel.cursors.get((route, frames[2])):
                cursor.credit += read_number(frames[3])
                self._with_output.add(kernel)
        elif kind == UNSUBSCRIBE and len(frames) == 3:
            kernel.cursors.pop((route, frames[2]), None)
        else:
            log.warning("not understood from a gateway: %r with %d frames", kind[:8], len(frames))

    def _send_output(self) -> None:
        """Send on from where each subscription stands, as far as credit and connection go."""
        if not self._with_output and not self._outboxes:
            return
        now = time.monotonic()
        for kernel in self._with_output:
            kernel.sent_at = now
            kernel.journal.flush()  # so that no number is ever given twice
        full: set[bytes] = set()
        sent = 0
        for route, outbox in list(self._outboxes.items()):
            while outbox and self._send_to_gateway(route, outbox[0], full):
                outbox.popleft()
                sent += 1
            if not outbox:
                self._outboxes.pop(route, None)
        for kernel in list(self._with_output):
            has_more = False
            for cursor in list(kernel.cursors.values()):
                if cursor.route in self._outboxes:
                    has_more = True  # answers first: they say where a session begins
                    continue
                sent += self._send_records(kernel, cursor, full)
                has_more |= cursor.is_new or (
                    cursor.seq < kernel.journal.next and cursor.credit > 0
                )
            if not has_more:
                self._with_output.discard(kernel)
        pause = max(SHORTEST_BACKLOG_PAUSE, self._backlog_pause * 2)
        self._backlog_pause = 0.0 if sent else min(pause, LONGEST_BACKLOG_PAUSE)

    def _send_records(self, kernel: KernelSide, cursor: Cursor, full: set[bytes]) -> int:
        """Returns how many messages went to the gateway."""
        journal = kernel.journal
        if cursor.seq < journal.first:
            _, size = journal.dropped(cursor.seq)
            numbers = map(pack_number, (cursor.seq, journal.first - 1, size))
            if not self._send_to_gateway(
                cursor.route, [LOST, cursor.id, kernel.id, *numbers], full
            ):
                return 0
            cursor.seq = journal.first
        records: list[bytes] = []
        if cursor.seq < journal.next and cursor.credit > 0:
            records = journal.read_from(cursor.seq, min(SEND_BYTES, cursor.credit))
        elif not cursor.is_new:
            return 0
        head = [RECORDS, cursor.id, kernel.id, pack_number(cursor.seq), pack_number(journal.next)]
        if not self._send_to_gateway(cursor.route, [*head, *records], full):
            return 0
        cursor.is_new = False
        cursor.seq += len(records)
        cursor.credit -= sum(map(len, records)) + RECORD_COST * len(records)
        return 1

    def _send_to_gateway(self, route: bytes, frames: list[bytes], full: set[bytes]) -> bool:
        """Whether it took the frames. One that is full is not tried again in this round; one that
        is gone is forgotten."""
        socket = self._socket_of.get(route)
        if route in full or socket is None:
            return False
        try:
            send_frames(socket, [route, *frames])
            self.poller.look_again(socket)
            return True
        except zmq.Again:
            full.add(route)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            full.add(route)
            self._forget_gateway(route)
        return False

    def _forget_gateway(self, route: bytes) -> None:
        log.info("a gateway is gone")
        self._outboxes.pop(route, None)
        self._socket_of.pop(route, None)
        for kernel in self._kernels.values():
            kernel.forget_gateway(route, time.monotonic())

    def _reply(self, route: bytes, frames: list[bytes]) -> None:
        outbox = self._outboxes.setdefault(route, deque())
        if len(outbox) < OUTBOX_LIMIT:
            outbox.append(frames)

    # -- the agent ---------------------------------------------------------------------------

    def _pass_to_agent(self, route: bytes, request_id: bytes, request: bytes) -> None:
        if not self._send_to_agent([RPC, route, request_id, request]):
            away = AgentUnreachable("the agent's process is away; its kernels go on")
            self._reply(route, [RPC, request_id, *encode_reply(away)])

    def _tell_agent(self, message: ToAgent) -> None:
        self._send_to_agent([CONTROL, agent_side.encode(message)])

    def _send_to_agent(self, frames: list[bytes]) -> bool:
        if self._agent is None:
            return False
        try:
            send_frames(self._agents, [self._agent, *frames])
            self.poller.look_again(self._agents)
        except zmq.Again:
            log.warning("the agent has not read for long, a message for it is lost")
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            log.warning("the agent is gone")
            self._agent = None
            return False
        return True

    def _drain_agent(self, socket: Socket) -> bool:
        for _ in range(BATCH):
            try:
                route, *frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                self._take_from_agent(route, frames)
            except Exception:  # one bad command is not the end of every kernel's output
                log.exception("bad frames from the agent")
        return True

    def _take_from_agent(self, route: bytes, frames: list[bytes]) -> None:
        # Read first: a kernel can make one of its sockets a symlink to ours, and what its clients
        # say then comes here. That makes nobody the agent.
        if frames[0] == RPC:
            _, gateway, request_id, verdict, reply = frames
            self._hear_agent(route)
            self._reply(gateway, [RPC, request_id, verdict, reply])
        else:
            message = agent_side.decode_for_relay(frames[1])
            self._hear_agent(route)
            self._obey(message)

    def _hear_agent(self, route: bytes) -> None:
        self._agent = route
        self._agent_heard = time.monotonic()

    def _obey(self, message: agent_side.ToRelay) -> None:
        match message:
            case Hello():
                self._tell_agent(self._hello())
            case OpenKernel():
                self._open_kernel(message)
            case DetachKernel() | InterruptByMessage() | ForgetKernel():
                self._obey_for_kernel(message)
            case KeepKernels():
                self._forget_all_but(message.kernel_ids)
            case StopRelay():
                self._is_stopping = True

    def _hello(self) -> RelayHello:
        return RelayHello(
            pid=os.getpid(),
            started=self.started,
            fingerprint=self.fingerprint,
            addresses=self.addresses,
            kernels=[str(kernel) for kernel in self._kernels.values() if kernel.is_connected],
        )

    def _open_kernel(self, message: OpenKernel) -> None:
        kernel_id = message.kernel_id.encode()
        kernel = self._kernels.get(kernel_id)
        was_unknown = kernel is None
        if kernel is None:
            kernel = self._add_kernel(kernel_id, is_running=not message.ask_ready)
        kernel.connect(
            message.address,
            message.key,
            message.opening,
            message.ask_ready,
            message.execution_state,
        )
        if was_unknown and not message.ask_ready:
            kernel.note_loss("the agent's relay was restarted")

    def _add_kernel(self, kernel_id: bytes, *, is_running: bool) -> KernelSide:
        # Of a kernel that runs, others know numbers already: if its journal is lost, or its end,
        # ours must be higher than any of those.
        first = int(time.time() * 1e6) if is_running else 1
        share = self.limits.total // (len(self._kernels) + 1)
        journal = Journal(
            self._journals / kernel_id.decode(),
            retention=min(self.limits.retention, share),
            max_age=self.limits.max_age,
            first=first,
        )
        kernel = KernelSide(self, kernel_id, journal, self.max_message)
        self._kernels[kernel_id] = kernel
        self._share_journals()
        return kernel

    def _forget_all_but(self, kernel_ids: list[str]) -> None:
        """Journals of kernels that ended while neither agent nor relay were there."""
        kept = {*kernel_ids, *map(str, self._kernels.values())}
        for directory in self._journals.iterdir():
            if directory.name not in kept:
                log.info("the journal of kernel %s goes: nobody has that kernel", directory.name)
                shutil.rmtree(directory)

    def _obey_for_kernel(self, message: DetachKernel | InterruptByMessage | ForgetKernel) -> None:
        kernel = self._kernels.get(message.kernel_id.encode())
        if kernel is None:
            return
        match message:
            case DetachKernel():
                kernel.detach_soon()
            case InterruptByMessage():
                kernel.interrupt()
            case ForgetKernel():
                kernel.detach()
                self._send_output()
                kernel.journal.remove()
                del self._kernels[kernel.id]
                self._with_output.discard(kernel)
                self._held_back.pop(kernel, None)
                self._active.discard(kernel)


def _raise_file_limit() -> None:
    """A session has three sockets, and each costs files."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="sorna_agent.relay", description=__doc__.split("\n")[0])
    parser.add_argument("--listen", required=True, help="tcp address of the agent port")
    parser.add_argument("--directory", required=True, type=Path, help="for relay.sock and rpc.sock")
    parser.add_argument("--keys", required=True, type=Path, help="file with the agent's Curve keys")
    parser.add_argument("--gateway-key", action="append", required=True, help="may connect (Z85)")
    parser.add_argument("--join-token-file", required=True, type=Path, help="who has it may connect"
        " to relay.sock")  # fmt: skip
    parser.add_argument("--fingerprint", default="")
    parser.add_argument("--orphan-timeout", type=float, default=600.0)
    parser.add_argument("--journals", required=True, type=Path, help="directory of the journals")
    parser.add_argument("--retention", required=True, type=int, help="bytes kept a kernel")
    parser.add_argument("--total-retention", required=True, type=int, help="bytes of all kernels")
    parser.add_argument("--journal-memory", required=True, type=int, help="of these, in memory")
    parser.add_argument("--journal-max-age", required=True, type=float, help="seconds")
    parser.add_argument("--max-message", required=True, type=int, help="bytes")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()

    logging.basicConfig(
        level=arguments.log_level, format="%(asctime)s %(levelname)s relay: %(message)s"
    )
    logging.getLogger("zmq.auth").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # whoever read our stderr may be gone; we go on
    os.umask(0o077)
    _raise_file_limit()

    def stop(signum: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keys = json.loads(arguments.keys.read_text())
    relay = Relay(
        listen=arguments.listen,
        directory=arguments.directory,
        public_key=keys["public_key"].encode(),
        secret_key=keys["secret_key"].encode(),
        gateway_keys=arguments.gateway_key,
        join_token=arguments.join_token_file.read_text().strip(),
        fingerprint=arguments.fingerprint,
        orphan_timeout=arguments.orphan_timeout,
        journals=arguments.journals,
        limits=JournalLimits(
            retention=arguments.retention,
            total=arguments.total_retention,
            memory=arguments.journal_memory,
            max_age=arguments.journal_max_age,
        ),
        max_message=arguments.max_message,
    )
    try:
        relay.run()
    finally:
        relay.close()


if __name__ == "__main__":
    main()

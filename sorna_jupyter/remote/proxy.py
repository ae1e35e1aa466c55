"""The local proxy kernel: what an installed kernelspec's `argv` starts.

To whoever started it, it is a kernel like any other: a process with the five sockets of a
connection file. Every message that comes there goes to a kernel on a Jupyter server and back, as
bytes. Interrupt and shutdown are the server's business and become REST requests. The remote kernel
lives as long as this process: `guardian` sees to that.

Replies find their client by the request they answer: `Routes` remembers who asked. One websocket
carries everything; when it breaks it is opened again, and local clients wait meanwhile.

The reply to a cell that used comms waits for the client to fall silent (`_carry_late_replies`). A
client of jupyter_client (8.10) that sends a comm at the moment when a reply comes in never notices
that reply: `Session.send` works on a shadow of the asyncio socket, and libzmq tells of a message
that is already waiting only once. nbclient sends a comm for each output inside an Output widget;
what a kernel says over seconds comes over a network in one burst, and then hits that moment.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from sorna_jupyter.exceptions import SornaError
from sorna_jupyter.protocol import Header, read_header
from sorna_jupyter.remote import credentials
from sorna_jupyter.remote.channels import (
    ConnectionInfo,
    LocalChannels,
    MessageFactory,
)
from sorna_jupyter.remote.guardian import Guardian
from sorna_jupyter.remote.remote_kernel import KernelGone, RemoteKernel, environment_to_pass
from sorna_jupyter.wire import V1

log = logging.getLogger("sorna.proxy")

COMMS = ("comm_open", "comm_msg")
OUTBOX_SIZE = 1000
MAX_ROUTES = 100_000
PARENT_CHECK_INTERVAL = 2.0
CHECK_INTERVAL = 30.0
CHECK_AFTER_GOODBYE = 1.0
GOODBYE_TIMEOUT = 4.0
"""Seconds to wait for the remote kernel's end; managers kill after 5."""
CLIENT_SILENCE = 0.05
"""Seconds without a word from a client after which it has worked off a burst with comms."""
MAX_REPLY_DELAY = 1.0
"""Seconds after which a reply is sent although the client never fell silent."""


@dataclass(slots=True)
class Route:
    """Who asked for something, and what is needed to answer in the kernel's place."""

    channel: str
    identity: list[bytes]
    header: bytes
    msg_type: str
    is_main_shell: bool
    is_sent: bool = False
    has_comms: bool = False


class Routes:
    """The requests that have no reply yet, by msg_id; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._routes: OrderedDict[str, Route] = OrderedDict()

    def remember(self, msg_id: str, route: Route) -> None:
        self._routes[msg_id] = route
        if len(self._routes) > MAX_ROUTES:
            self._routes.popitem(last=False)

    def find(self, msg_id: str) -> Route | None:
        return self._routes.get(msg_id)

    def take(self, msg_id: str) -> Route | None:
        return self._routes.pop(msg_id, None)

    def sent_on_main_shell(self) -> list[str]:
        return [i for i, route in self._routes.items() if route.is_sent and route.is_main_shell]

    def sent(self) -> list[str]:
        return [msg_id for msg_id, route in self._routes.items() if route.is_sent]

    def latest_execution(self) -> Route | None:
        """The cell to which news about the kernel belongs: the one that runs."""
        running = (r for r in self._routes.values() if r.msg_type == "execute_request")
        return next(running, None)


class Proxy:
    """`run` once; it returns the exit code."""

    def __init__(
        self, local: LocalChannels, remote: RemoteKernel, guardian: Guardian, name: str
    ) -> None:
        self._local = local
        self._remote = remote
        self._guardian = guardian
        self._name = name
        self._messages = MessageFactory()
        self._routes = Routes()
        self._outbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(OUTBOX_SIZE)
        self._interrupts: asyncio.Queue[Route | None] = asyncio.Queue()
        self._late_replies: asyncio.Queue[tuple[Route, list[bytes]]] = asyncio.Queue()
        self._heard_from_client = asyncio.Event()
        self._probe: tuple[str, list[str]] | None = None
        self._terminated = asyncio.Event()
        self._said_goodbye = asyncio.Event()

    async def run(self, env: dict[str, str]) -> int:
        self._listen_for_signals()
        # Whichever ends first ends the proxy; only failures come as exceptions.
        ways_to_end = [
            asyncio.create_task(self._terminated.wait(), name="signals"),
            asyncio.create_task(self._watch_parent(), name="parent"),
            asyncio.create_task(self._carry_control(), name="control"),
            asyncio.create_task(self._carry_requests("shell"), name="shell"),
            asyncio.create_task(self._carry_requests("stdin"), name="stdin"),
            asyncio.create_task(self._local.echo_heartbeats(), name="heartbeat"),
            asyncio.create_task(self._local.welcome_subscribers(self._messages), name="iopub"),
            asyncio.create_task(self._live_with_remote(env), name="remote"),
        ]
        done, _ = await asyncio.wait(ways_to_end, return_when=asyncio.FIRST_COMPLETED)
        code = 0
        for task in done:
            if (error := task.exception()) is not None:
                code = 1
                await self._report(task.get_name(), error)
        for task in ways_to_end:
            task.cancel()
        await asyncio.gather(*ways_to_end, return_exceptions=True)
        self._remote.close()
        await self._guardian.finish(GOODBYE_TIMEOUT)
        return code

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupts.put_nowait, None)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._terminated.set)

    async def _watch_parent(self) -> None:
        """Ends when whoever started us is gone without a word; nobody could talk to us any more."""
        if "JPY_PARENT_PID" not in os.environ:
            await asyncio.Event().wait()  # Meant to outlive its parent.
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(PARENT_CHECK_INTERVAL)

    async def _report(self, where: str, error: BaseException) -> None:
        """Why it ends: for the manager's log, and for the people before the notebook."""
        if not isinstance(error, SornaError):
            log.error("%s failed", where, exc_info=error)
        reason = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        sentence = f"Remote kernel {self._name!r} on {self._remote.url} ended: {reason}"
        print(sentence, file=sys.stderr, flush=True)
        cell = self._routes.latest_execution()
        content = {"name": "stderr", "text": sentence + "\n"}
        parts = self._messages.make("stream", content, cell.header if cell else b"{}")
        await self._local.publish("stream", parts)

    # -- local clients → remote kernel -------------------------------------------------------

    async def _carry_requests(self, channel: str) -> None:
        """Shell and stdin. While the outbox is full, clients' messages wait in their sockets."""
        while True:
            identity, parts = await self._local.receive(channel)
            self._heard_from_client.set()
            header = _header_of(parts)
            if header is None:
                continue
            self._expect_reply(channel, identity, header, parts)
            await self._outbox.put((header.msg_id, V1.encode(channel, parts)))

    async def _carry_control(self) -> None:
        """Returns at a shutdown request, and never waits for the network before one."""
        while True:
            identity, parts = await self._local.receive("control")
            header = _header_of(parts)
            if header is None:
                continue
            if header.msg_type == "shutdown_request":
                await self._say_goodbye(identity, parts)
                return
            if header.msg_type == "interrupt_request":
                self._interrupts.put_nowait(
                    Route("control", identity, parts[0], header.msg_type, is_main_shell=False)
                )
                continue
            self._expect_reply("control", identity, header, parts)
            try:
                self._outbox.put_nowait((header.msg_id, V1.encode("control", parts)))
            except asyncio.QueueFull:
                log.warning("dropped a %s: too much waits for the network", header.msg_type)

    def _expect_reply(
        self, channel: str, identity: list[bytes], header: Header, parts: list[bytes]
    ) -> None:
        # Only requests are answered; comms would fill the table for nothing.
        if header.msg_type.endswith("_request"):
            is_main_shell = channel == "shell" and header.subshell_id is None
            route = Route(channel, identity, parts[0], header.msg_type, is_main_shell)
            self._routes.remember(header.msg_id, route)

    async def _say_goodbye(self, identity: list[bytes], parts: list[bytes]) -> None:
        # A restart is no different: the manager starts a new proxy, and that a new remote kernel.
        content = msgspec.json.decode(parts[3], type=dict[str, object])
        reply = {"status": "ok", "restart": bool(content.get("restart"))}
        message = self._messages.make("shutdown_reply", reply, parts[0])
        await self._local.send("control", identity, message)
        await self._local.publish("shutdown_reply", message)

    # -- the remote kernel's life ------------------------------------------------------------

    async def _live_with_remote(self, env: dict[str, str]) -> None:
        """Raises when it is over, and says why; never returns."""
        kernel_id = str(uuid.uuid4())
        self._guardian.guard(kernel_id, exists=False)
        try:
            await self._remote.create(kernel_id, self._name, env)
        except SornaError:
            self._guardian.guard("")
            raise
        self._guardian.guard(self._remote.id)
        log.info("remote kernel %s is %s", self._name, self._remote.id)
        await asyncio.gather(
            self._carry_outbox(),
            self._carry_interrupts(),
            self._carry_answers(),
            self._carry_late_replies(),
            self._watch_remote(),
        )

    async def _watch_remote(self) -> None:
        """Some servers leave the websocket open when a kernel is deleted, and say nothing."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL):
                    await self._said_goodbye.wait()
                    self._said_goodbye.clear()
                    await asyncio.sleep(CHECK_AFTER_GOODBYE)
            try:
                await self._remote.check()
            except KernelGone:
                raise
            except SornaError as error:
                log.info("kernel %s: %s", self._remote.id, error)

    async def _carry_outbox(self) -> None:
        while True:
            msg_id, frame = await self._outbox.get()
            await self._remote.send(frame)
            if route := self._routes.find(msg_id):
                route.is_sent = True

    async def _carry_interrupts(self) -> None:
        while True:
            asked_by = await self._interrupts.get()
            content = {"status": "ok"}
            try:
                await self._remote.interrupt()
            except SornaError as error:
                log.warning("the kernel could not be interrupted: %s", error)
                content = {"status": "error", "ename": type(error).__name__, "evalue": str(error)}
            if asked_by is not None:
                reply = self._messages.make("interrupt_reply", content, asked_by.header)
                await self._local.send("control", asked_by.identity, reply)

    # -- remote kernel → local clients -------------------------------------------------------

    async def _carry_answers(self) -> None:
        while True:
            await self._remote.connect()
            await self._look_for_lost_requests()
            while (frame := await self._remote.receive()) is not None:
                await self._deliver(frame)
            log.info("connection to kernel %s is lost, trying again", self._remote.id)

    async def _deliver(self, frame: str | bytes) -> None:
        try:
            channel, parts = V1.decode(frame)
            header, parent = read_header(parts[0]), read_header(parts[1])
        except ValueError as error:
            log.warning("ignored a frame from %s: %s", self._remote.url, error)
            return
        if channel == "iopub":
            if header.msg_type in COMMS and (route := self._routes.find(parent.msg_id)):
                route.has_comms = True
            await self._publish(header.msg_type, parts)
        elif channel == "stdin":
            if route := self._routes.find(parent.msg_id):
                await self._local.send("stdin", route.identity, parts)
        elif route := self._routes.take(parent.msg_id):
            if route.has_comms:
                self._late_replies.put_nowait((route, parts))
            else:
                await self._local.send(channel, route.identity, parts)
        elif self._probe and self._probe[0] == parent.msg_id:
            await self._fail_lost_requests()

    async def _carry_late_replies(self) -> None:
        """One after the other, each when the clients have been silent for a moment."""
        while True:
            route, parts = await self._late_replies.get()
            with suppress(TimeoutError):
                async with asyncio.timeout(MAX_REPLY_DELAY):
                    await self._silence()
            await self._local.send(route.channel, route.identity, parts)

    async def _silence(self) -> None:
        while True:
            self._heard_from_client.clear()
            try:
                await asyncio.wait_for(self._heard_from_client.wait(), CLIENT_SILENCE)
            except TimeoutError:
                return

    async def _publish(self, msg_type: str, parts: list[bytes]) -> None:
        if msg_type == "iopub_welcome":
            return  # That was the server's own subscription.
        if msg_type == "shutdown_reply":
            self._said_goodbye.set()
        elif msg_type == "status":
            state = msgspec.json.decode(parts[3], type=dict[str, object]).get("execution_state")
            if state == "dead":
                raise await self._remote.why_dead()
            if state in ("restarting", "autorestarting"):
                await self._fail(self._routes.sent(), "KernelRestarted", "The kernel was restarted")
        await self._local.publish(msg_type, parts)

    # -- after a network cut -----------------------------------------------------------------

    async def _look_for_lost_requests(self) -> None:
        """Ask the kernel for its kernel_info, behind all that was sent before the cut.

        A kernel works its shell channel off in order. So when the reply to this one is here, what
        was sent earlier and has no reply never will have one, and its client need not wait.
        """
        suspects = self._routes.sent_on_main_shell()
        self._probe = None
        if suspects:
            request = self._messages.make("kernel_info_request", {})
            self._probe = read_header(request[0]).msg_id, suspects
            await self._remote.send_if_connected(V1.encode("shell", request))

    async def _fail_lost_requests(self) -> None:
        assert self._probe is not None
        (_, suspects), self._probe = self._probe, None
        await self._fail(
            suspects,
            "ConnectionLost",
            f"The connection to {self._remote.url} was cut and the answer was lost; "
            "nobody knows whether this ran",
        )

    async def _fail(self, msg_ids: list[str], ename: str, evalue: str) -> None:
        """Answer in the kernel's place those of these requests that still have no reply."""
        content = {"ename": ename, "evalue": evalue, "traceback": [f"{ename}: {evalue}"]}
        for route in filter(None, map(self._routes.take, msg_ids)):
            if route.msg_type == "execute_request":
                parts = self._messages.make("error", content, route.header)
                await self._local.publish("error", parts)
            reply = route.msg_type.removesuffix("_request") + "_reply"
            parts = self._messages.make(reply, {"status": "error", **content}, route.header)
            await self._local.send(route.channel, route.identity, parts)
            idle = self._messages.make("status", {"execution_state": "idle"}, route.header)
            await self._local.publish("status", idle)


def _header_of(parts: list[bytes]) -> Header | None:
    try:
        return read_header(parts[0])
    except msgspec.DecodeError as error:
        log.warning("ignored a message without a proper header: %s", error)
        return None


# -- the process -----------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sorna_jupyter.remote.proxy",
        description="A local kernel that is really one on a Jupyter server. Kernelspecs start it.",
    )
    parser.add_argument("-f", dest="connection_file", type=Path, required=True)
    parser.add_argument("--url", required=True, help="the server; its token comes from login")
    parser.add_argument("--kernel-name", required=True, help="the kernelspec's name over there")
    parser.add_argument(
        "--pass-env",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable that the remote kernel gets, besides KERNEL_*; repeatable",
    )
    parser.add_argument(
        "--reconnect-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a network cut is bridged (default: 600)",
    )
    return parser.parse_args(argv)


async def serve(args: argparse.Namespace, url: str) -> int:
    guardian = Guardian(url)
    try:
        info = ConnectionInfo.read(args.connection_file)
        local = LocalChannels(info, args.kernel_name)
    except (OSError, ValueError, zmq.ZMQError) as error:
        print(f"{args.connection_file}: {error}", file=sys.stderr)
        await guardian.finish(GOODBYE_TIMEOUT)
        return 1
    remote = RemoteKernel(url, reconnect_timeout=args.reconnect_timeout)
    try:
        proxy = Proxy(local, remote, guardian, args.kernel_name)
        return await proxy.run(environment_to_pass(args.pass_env))
    finally:
        local.close()


def main(argv: list[str]) -> int:
    # Until the loop listens: an interrupt is meant for the remote kernel, never for this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="[sorna] %(levelname)s %(message)s")
    args = parse(argv)
    try:
        url = credentials.normalise(args.url)
        if credentials.token_for(url) is None:
            raise SornaError(f"There is no token for {url}; type: jupyter sorna login {url}")
    except SornaError as error:
        print(error, file=sys.stderr)
        return 1
    with suppress(KeyboardInterrupt):
        return asyncio.run(serve(args, url))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

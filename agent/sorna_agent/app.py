"""`jupyter sorna-agent`: builds the agent's parts, starts them in order, stops them in reverse."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import zmq

from sorna_agent.agent import Agent
from sorna_agent.heartbeat import Heartbeat, Orphaned
from sorna_agent.kernel_store import KernelStore, write_private
from sorna_agent.relay_link import RelayLink, RelaySettings
from sorna_agent.resources import find_slots
from sorna_agent.runtimes import Runtime, choose_runtime
from sorna_agent.server import RequestServer
from sorna_jupyter.exceptions import AgentRefused, AlreadyRunning, SornaError
from sorna_jupyter.protocol import Beat, DestroyKernel, host_name, parse_size

log = logging.getLogger(__name__)

FAILED, ALREADY_RUNNING = 1, 3
"""exit statuses"""
RELAY_ORPHAN_TIMEOUT = 600.0
"""seconds that the relay waits for an agent to come back"""


@dataclass(frozen=True)
class Identity:
    """Who this agent is, for ever."""

    agent_id: str
    public_key: str
    secret_key: str

    @classmethod
    def load(cls, path: Path) -> Identity:
        """From its file; made anew where there is none."""
        if not path.exists():
            public, secret = zmq.curve_keypair()
            content = {
                "agent_id": str(uuid.uuid4()),
                "public_key": public.decode(),
                "secret_key": secret.decode(),
            }
            write_private(path, json.dumps(content).encode())
        return cls(**json.loads(path.read_text()))


class AgentApp:
    """One agent process, from its options to its end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._data_dir: Path = options.data_dir
        self._runtime_dir: Path = options.runtime_dir
        self._keeps_kernels = False
        """whether kernels, and so the relay, outlive this process"""

    async def run(self) -> None:
        """Until a signal, a gateway or the orphan timeout ends it; raises SornaError if it can't
        start, or no gateway wants it."""
        options = self._options
        keys_file = self._data_dir / "agent.json"
        self._identity = Identity.load(keys_file)
        self._join_token = options.join_token_file.read_text().strip()
        self._slots = find_slots(options.max_kernels, options.memory_overcommit)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)

        async with AsyncExitStack() as stack:
            self._runtime = await self._start_runtime(stack)
            self._link = RelayLink(self._relay_settings(keys_file))
            self._agent = Agent(
                self._runtime,
                self._link,
                KernelStore(self._data_dir / "kernels.json"),
                self._runtime_dir / "k",
            )
            server = RequestServer(self._agent, self._link)
            await self._link.start()
            stack.push_async_callback(self._close_link)
            stack.push_async_callback(self._agent.close)
            stack.push_async_callback(server.close)
            await self._agent.adopt()
            await self._beat_until(stop)
        self._tidy_up()
        log.info("agent %s ends", self._identity.agent_id)

    async def _beat_until(self, stop: asyncio.Event) -> None:
        """Also decides, at the end, whether the kernels stay; raises AgentRefused."""
        heartbeat = self._make_heartbeat()
        self._agent.on_change = heartbeat.beat_soon
        self._agent.on_stop = stop.set
        self._agent.on_left_alone = heartbeat.expect_silence
        beating = asyncio.create_task(heartbeat.run(), name="heartbeat")
        try:
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait((beating, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            self._keeps_kernels = self._options.keep_kernels and not beating.done()
            if not self._is_wanted(beating):
                self._keeps_kernels = bool(self._agent.reports())
            # While the heart still beats, so that a slow stop does not look like a death.
            if not self._keeps_kernels:
                await self._agent.destroy_all()
            if beating.done():
                beating.result()
        except Orphaned as error:
            log.warning("%s: all kernels and the agent end", error)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _close_link(self) -> None:
        await self._link.close(keep_relay=self._keeps_kernels)

    def _tidy_up(self) -> None:
        """Also after a gateway on this machine that was killed: nobody else removes its socket."""
        for address in self._options.manager_addr.split(","):
            path = Path(address.strip().removeprefix("ipc://"))
            if path.parent == self._runtime_dir and not _is_listening(path):
                path.unlink(missing_ok=True)
        for folder in (self._runtime_dir / "k", self._runtime_dir):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @staticmethod
    def _is_wanted(beating: asyncio.Task[None]) -> bool:
        """False if the gateways refuse us: then the kernels of an earlier agent stay, as it may be
        our options that are wrong."""
        return not (beating.done() and isinstance(beating.exception(), AgentRefused))

    async def _start_runtime(self, stack: AsyncExitStack) -> Runtime:
        options = self._options
        last = self._data_dir / "runtime"
        kind = options.runtime
        if kind == "auto" and KernelStore(self._data_dir / "kernels.json").load() and last.exists():
            # An engine that is away right now must not cost us its kernels.
            kind = last.read_text()
        runtime = await choose_runtime(
            kind,
            agent_id=self._identity.agent_id,
            base_image=options.base_image or os.environ.get("SORNA_BASE_IMAGE") or None,
            image_folders=tuple(options.image_folder),
        )
        stack.push_async_callback(runtime.close)
        await runtime.start_up()
        last.write_text(runtime.name)
        log.info("runtime %s: %s", runtime.name, runtime.isolation)
        return runtime

    def _relay_settings(self, keys_file: Path) -> RelaySettings:
        options = self._options
        return RelaySettings(
            listen=options.listen,
            directory=self._runtime_dir,
            keys_file=keys_file,
            public_key=self._identity.public_key,
            gateway_keys=tuple(options.gateway_key or [options.manager_key]),
            join_token_file=options.join_token_file,
            orphan_timeout=max(RELAY_ORPHAN_TIMEOUT, options.orphan_timeout),
            journals=self._data_dir / "journals",
            retention=options.retention,
            total_retention=options.total_retention,
            journal_memory=options.journal_memory,
            journal_max_age=options.journal_max_age,
            max_message=options.max_message,
            log_level=options.log_level,
        )

    def _make_heartbeat(self) -> Heartbeat:
        options = self._options

        async def destroy(kernel_id: str) -> None:
            await self._agent.destroy_kernel(DestroyKernel(kernel_id=kernel_id))

        return Heartbeat(
            [address.strip() for address in options.manager_addr.split(",")],
            manager_key=options.manager_key,
            public_key=self._identity.public_key,
            secret_key=self._identity.secret_key,
            interval=options.beat_interval,
            orphan_timeout=options.orphan_timeout,
            make_beat=self._make_beat,
            destroy=destroy,
        )

    def _make_beat(self) -> Beat:
        self._agent.save_the_rest()
        return Beat(
            agent_id=self._identity.agent_id,
            join_token=self._join_token,
            public_key=self._identity.public_key,
            addresses=[_reachable(address) for address in self._link.addresses],
            host=host_name(),
            runtime=self._runtime.name,
            isolation=self._runtime.isolation,
            slots=self._slots,
            images=self._agent.images(),
            kernels=self._agent.reports(),
            relay_started=self._link.started,
        )


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _reachable(address: str) -> str:
    """For a socket bound to all interfaces: the host's name, which others can resolve."""
    return address.replace("//0.0.0.0:", f"//{socket.gethostname()}:")


def lock_data_dir(data_dir: Path) -> int:
    """Only one agent a data directory; the lock file holds its process id.

    Raises AlreadyRunning.
    """
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"an agent already runs on {data_dir}") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jupyter-sorna-agent",
        description="Starts Sorna's kernels on this machine, on behalf of its gateways.",
    )
    add = parser.add_argument
    add("--manager-addr", required=True, help="gateways' heartbeat ports, comma separated")
    add("--manager-key", required=True, help="the gateways' public Curve key (Z85)")
    add("--gateway-key", action="append", help="who may connect here; default: --manager-key")
    add("--join-token-file", type=Path, required=True, help="file with the secret to join with")
    add(
        "--data-dir",
        type=Path,
        required=True,
        help="the agent's identity and kernels are kept here",
    )
    add("--runtime-dir", type=Path, required=True, help="sockets; its path must be short")
    add("--runtime", default="auto", choices=("auto", "docker", "local"))
    add("--listen", default="tcp://127.0.0.1:0", help="address of the agent port; port 0: any")
    add("--orphan-timeout", type=float, default=0.0, help="seconds without gateway until kernels"
        " and agent end; 0: never")  # fmt: skip
    add("--beat-interval", type=float, default=3.0, help="seconds between beats")
    add("--keep-kernels", action="store_true", help="a signal ends the agent, not its kernels")
    add("--max-kernels", type=int, default=None, help="default: one for each 256 MiB of memory")
    add("--memory-overcommit", type=float, default=1.0, help="how many times over this machine's"
        " memory may be promised to kernels; most use far less than their limit")  # fmt: skip
    add("--base-image", default=None, help="of kernel images that are built here; also"
        " $SORNA_BASE_IMAGE")  # fmt: skip
    add("--image-folder", type=Path, action="append", default=[], help="more kernel images")
    add("--retention", type=size, default=64 << 20, help="how much of a kernel's output is kept"
        " for who comes late or comes back (64 MiB)")  # fmt: skip
    add("--total-retention", type=size, default=8 << 30, help="…of all kernels' (8 GiB)")
    add("--journal-memory", type=size, default=256 << 20, help="…how much of that in memory, too"
        " (256 MiB)")  # fmt: skip
    add("--journal-max-age", type=float, default=7 * 86400.0, help="seconds that it is kept")
    add("--max-message", type=size, default=1 << 30, help="the largest message that is carried"
        " (1 GiB)")  # fmt: skip
    add("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    add("--log-file", type=Path, default=None, help="instead of stderr")
    return parser.parse_args(bind_keys(sys.argv[1:] if argv is None else argv))


def size(text: str) -> int:
    """Bytes, for argparse."""
    try:
        return parse_size(text)
    except SornaError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def bind_keys(argv: list[str]) -> list[str]:
    """`--manager-key KEY` as `--manager-key=KEY`: one key in 85 begins with a dash, which argparse
    would take for another option."""
    bound: list[str] = []
    for argument in argv:
        if bound and bound[-1] in ("--manager-key", "--gateway-key"):
            bound[-1] += f"={argument}"
        else:
            bound.append(argument)
    return bound


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    os.umask(0o077)
    if options.log_file is not None:
        # The relay, a child, inherits it.
        descriptor = os.open(options.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stderr.fileno())
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.raiseExceptions = False  # stderr may end with the gateway; the agent does not
    for directory in (options.data_dir, options.runtime_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = lock_data_dir(options.data_dir)
    except AlreadyRunning as error:
        log.error("%s", error)
        sys.exit(ALREADY_RUNNING)
    try:
        asyncio.run(AgentApp(options).run())
    except (SornaError, OSError, zmq.ZMQError) as error:
        log.error("the agent can't go on: %s", error)
        sys.exit(FAILED)
    finally:
        os.ftruncate(lock, 0)


if __name__ == "__main__":
    main()

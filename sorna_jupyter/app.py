"""`SornaApp`: the gateway as a jupyter_server extension. Builds the parts, starts and stops them.

`jupyter sorna` starts it as the main app (`launch_instance`); Jupyter Server's own seams are set in
`serverapp_config`, so that everything else of Jupyter (contents, UI, terminals) is the stock one.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import signal
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import zmq
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from jupyter_server.serverapp import flags as server_flags
from traitlets import Bool, Enum, Float, Integer, Unicode, default
from traitlets.config import Config

from sorna_jupyter import __version__, places
from sorna_jupyter.agents import AgentPool, HeartbeatListener, KeyPair
from sorna_jupyter.auth import SornaIdentityProvider
from sorna_jupyter.console import ServerConsole
from sorna_jupyter.embedded import AgentSettings, EmbeddedAgent
from sorna_jupyter.exceptions import AlreadyRunning, SornaError, Unavailable
from sorna_jupyter.faces import jupyter, operations, rest
from sorna_jupyter.http import log_request
from sorna_jupyter.kernels import Kernel, Kernels
from sorna_jupyter.live import LiveState, MemoryLive, RedisLive
from sorna_jupyter.notebooks import Notebooks, SornaContentsManager
from sorna_jupyter.open_cells import OpenCells
from sorna_jupyter.protocol import Beat, ImageState, Limits, parse_size
from sorna_jupyter.registry import Policy, Registry
from sorna_jupyter.runs import Runs
from sorna_jupyter.unattended import UnattendedCells

CONTENTS_SERVICES = ("contents", "files", "nbconvert", "view", "edit")

flags: dict[str, Any] = {
    "headless": (
        {"SornaApp": {"headless": True}},
        "Serve kernels only: no notebook UI, no contents, no terminals.",
    ),
    "keep-kernels": (
        {"SornaApp": {"keep_kernels": True}},
        "On Ctrl-C, leave kernels running for the next start.",
    ),
    "no-browser": server_flags["no-browser"],
}
aliases = {
    "runtime": "SornaApp.runtime",
    "data-dir": "SornaApp.data_dir",
    "orphan-timeout": "SornaApp.orphan_timeout",
    "base-image": "SornaApp.base_image",
    "ip": "ServerApp.ip",
    "port": "ServerApp.port",
}


class HeadlessServerApp(ServerApp):
    """Jupyter Server with kernels only. It names this attribute as the place to say so."""

    default_services: tuple[str, ...] = tuple(  # type: ignore[assignment]  # of fewer services
        service for service in ServerApp.default_services if service not in CONTENTS_SERVICES
    )


class SornaApp(ExtensionApp):
    """A Jupyter server whose kernels run in sandboxes and are shared with programs over REST."""

    name = "sorna"
    app_name = "Sorna Jupyter"
    version = __version__
    description = __doc__
    load_other_extensions = True
    extension_url = "/"
    default_url = Unicode("/tree", config=True, help="Where `/` leads to.")
    flags = flags
    aliases = aliases
    serverapp_config = {
        "kernel_manager_class": "sorna_jupyter.jupyter_manager.SornaMappingKernelManager",
        "kernel_spec_manager_class": "sorna_jupyter.jupyter_manager.SornaKernelSpecManager",
        "session_manager_class": "sorna_jupyter.jupyter_manager.SornaSessionManager",
        "kernel_websocket_connection_class": "sorna_jupyter.websocket.SornaWebsocketConnection",
        "identity_provider_class": "sorna_jupyter.auth.SornaIdentityProvider",
        "authorizer_class": "sorna_jupyter.auth.SornaAuthorizer",
        # Kernels never run as root, whoever the server runs as.
        "allow_root": True,
    }

    _is_main = False
    """whether this process is ours, or another server's that loaded us"""

    # -- settings

    data_dir = Unicode(
        help="Directory for registry, keys and credentials. Default: `sorna` in Jupyter's data "
        "directory. One gateway at a time can use it."
    ).tag(config=True)
    runtime_dir = Unicode(
        help="Directory for sockets; its path must be short. Default: one of its own for each "
        "data directory in XDG_RUNTIME_DIR or /tmp."
    ).tag(config=True)
    database_url = Unicode(
        help="Registry, as an SQLAlchemy URL. Default: SQLite in the data directory."
    ).tag(config=True)
    redis_url = Unicode(
        "", help="Live state, as a redis:// URL. Empty: in this process's memory."
    ).tag(config=True)
    headless = Bool(False, help="Serve kernels only: no UI, contents or terminals.").tag(
        config=True
    )
    keep_kernels = Bool(
        False, help="Leave kernels and their agent running when this server stops."
    ).tag(config=True)
    embedded_agent = Bool(
        True, help="Run an agent on this machine. Off: wait for agents that join by themselves."
    ).tag(config=True)
    manager_address = Unicode(
        "tcp://127.0.0.1:*",
        help="Where agents join, as a ZeroMQ endpoint. Default: a free port on loopback, as the "
        "embedded agent is the only one; `tcp://*:5001` lets others in.",
    ).tag(config=True)
    runtime = Enum(
        ["auto", "docker", "local"],
        default_value="auto",
        help="How the embedded agent starts kernels: in Docker containers, or as local processes "
        "of this user. auto: docker if an engine answers.",
    ).tag(config=True)
    base_image = Unicode(
        "",
        help="Image that the kernel images are built on. Default: what their Dockerfiles say "
        "(python:3.12-slim).",
    ).tag(config=True)
    build_images = Bool(True, help="Build missing kernel images at start.").tag(config=True)
    orphan_timeout = Float(
        60,
        help="Seconds that the embedded agent keeps kernels when the gateway was killed. A gateway "
        "started meanwhile adopts them.",
    ).tag(config=True)
    start_timeout = Float(
        60, help="Seconds from a kernel's process start to its first answer."
    ).tag(config=True)
    start_wait = Float(
        10,
        help="Seconds after which a request for a kernel is answered although the kernel is still "
        "`starting`.",
    ).tag(config=True)
    image_timeout = Float(1800, help="Seconds that a kernel waits for its image.").tag(config=True)
    lost_agent_timeout = Float(
        15, help="Seconds of silence after which an agent and its kernels are lost."
    ).tag(config=True)
    lost_kernel_timeout = Float(
        600, help="Seconds after which lost kernels are given up and their reservations freed."
    ).tag(config=True)
    idle_timeout = Float(
        0,
        help="Seconds after which an idle kernel without connections is stopped, unless its "
        "request said another. 0: never.",
    ).tag(config=True)
    unattended_after = Float(
        3,
        help="Seconds after which a notebook's page that is gone is not waited for any more: what "
        "its cells put out is then written into the notebook's file.",
    ).tag(config=True)
    default_kernelspec = Unicode("python3", help="Kernel for requests that name none.").tag(
        config=True
    )
    max_kernels = Integer(
        0, help="Kernels that one user may have at a time. 0: as many as fit."
    ).tag(config=True)
    default_memory = Unicode("2 GiB", help="A kernel's memory.").tag(config=True)
    default_cpus = Float(0, help="A kernel's cores. 0: all of its machine.").tag(config=True)
    default_pids = Integer(256, help="A kernel's processes and threads together.").tag(config=True)
    default_disk = Unicode(
        "256 MiB", help="A kernel's writable space in its home and in /tmp, each."
    ).tag(config=True)
    memory_overcommit = Float(
        4,
        help="How many times over the embedded agent promises its machine's memory to kernels, "
        "most of which use far less than their limit. 1: no more than there is.",
    ).tag(config=True)
    output_retention = Unicode(
        "64 MiB",
        help="How much of each kernel's latest output the embedded agent keeps, on disk, for "
        "clients that come late, come back or can't follow.",
    ).tag(config=True)
    total_output_retention = Unicode(
        "8 GiB",
        help="How much of all kernels' output it keeps; above it, each gets an equal share.",
    ).tag(config=True)
    max_output_message = Unicode(
        "1 GiB",
        help="The largest message from a kernel; a line on stderr stands in place of a larger one.",
    ).tag(config=True)
    max_input_message = Unicode(
        "100 MiB", help="The largest message to a kernel; a websocket that sends more is closed."
    ).tag(config=True)
    max_memory = Unicode("", help="The most memory a request may ask for. Empty: no bound.").tag(
        config=True
    )
    max_cpus = Float(0, help="The most cores a request may ask for. 0: no bound.").tag(config=True)
    max_pids = Integer(4096, help="The most processes a request may ask for.").tag(config=True)
    max_disk = Unicode("", help="The most disk a request may ask for. Empty: no bound.").tag(
        config=True
    )

    @default("data_dir")
    def _default_data_dir(self) -> str:
        return str(places.data_dir())

    @default("runtime_dir")
    def _default_runtime_dir(self) -> str:
        return str(places.runtime_dir(Path(self.data_dir)))

    @default("database_url")
    def _default_database_url(self) -> str:
        return f"sqlite:///{Path(self.data_dir) / 'registry.sqlite'}"

    @default("base_image")
    def _default_base_image(self) -> str:
        return os.environ.get("SORNA_BASE_IMAGE", "")

    # -- jupyter_server's hooks, in the order in which they come

    @classmethod
    def launch_instance(cls, argv: list[str] | None = None, **kwargs: Any) -> None:
        """`jupyter sorna …`"""
        arguments = list(sys.argv[1:] if argv is None else argv)
        cls._is_main = True
        if "--headless" in arguments:
            cls.load_other_extensions = False
            cls.serverapp_class = HeadlessServerApp
        # Jupyter Server's own life cycle is of no interest here unless something is wrong.
        super().launch_instance(  # type: ignore[no-untyped-call]
            ["--Application.log_level=WARN", *arguments], **kwargs
        )

    @classmethod
    def make_serverapp(cls, **kwargs: Any) -> ServerApp:
        """It parses the command line first, and hands aliases on by itself, but not flags."""
        serverapp = super().make_serverapp(**kwargs)
        serverapp.flags = {**serverapp.flags, **cls.flags}
        return serverapp

    def _jupyter_server_config(self) -> Config:
        config: dict[str, Any] = super()._jupyter_server_config()  # type: ignore[no-untyped-call]
        server = config["ServerApp"]
        assert self.serverapp is not None
        server.setdefault("tornado_settings", {}).update(
            {"websocket_max_message_size": parse_size(self.max_input_message)}
            | dict(self.serverapp.tornado_settings)
        )
        # Others', such as jupytext's, stay what they are.
        if "contents_manager_class" not in self.serverapp.config.ServerApp:
            server["contents_manager_class"] = SornaContentsManager
        if self.headless:
            server["open_browser"] = False
            server["terminals_enabled"] = False
        # What the user asked for wins over what we would like.
        own = self.serverapp.cli_config.get("ServerApp", {})
        config["ServerApp"] = {k: v for k, v in server.items() if k not in own}
        return Config(config)

    def initialize_settings(self) -> None:
        self._show_our_log()
        data = places.make_private(Path(self.data_dir))
        runtime = places.make_private(Path(self.runtime_dir))
        try:
            lock = _lock(data)
        except AlreadyRunning as error:
            self.log.critical("%s", error)
            self.exit(1)
        # Undone in reverse: what is noted here first goes last.
        self._undo = AsyncExitStack()
        self._undo.callback(lock.close)
        if not self.keep_kernels:
            self._undo.callback(_remove_sockets, runtime)
        self.console = ServerConsole()
        self._undo.callback(self.console.close)
        self.keys = _load_keys(data)
        self.registry = Registry(self.database_url)
        self.live: LiveState = RedisLive(self.redis_url) if self.redis_url else MemoryLive()
        join_token = _load_join_token(data)
        self.agents = AgentPool(self.keys, join_token)
        self._undo.push_async_callback(self.registry.close)
        self._undo.push_async_callback(self.live.close)
        self._undo.callback(self.agents.close)
        self.kernels = Kernels(
            registry=self.registry,
            live=self.live,
            agents=self.agents,
            policy=self._policy(),
            default_kernelspec=self.default_kernelspec,
            start_timeout=self.start_timeout,
            start_wait=self.start_wait,
            image_timeout=self.image_timeout,
            lost_agent_timeout=self.lost_agent_timeout,
            lost_kernel_timeout=self.lost_kernel_timeout,
            idle_timeout=self.idle_timeout or None,
        )
        self.kernels.on_beat = self._on_beat
        self.runs = Runs(self.kernels)
        self.listener = HeartbeatListener(
            self.keys,
            join_token,
            [self.manager_address, f"ipc://{runtime}/manager.sock"],
            self.kernels.hear,
        )
        if not self.headless:
            self._attend_notebooks()
        assert self.serverapp is not None
        if "log_function" not in self.serverapp.tornado_settings:
            record = self.serverapp.record_http_request_metrics
            self.settings["log_function"] = partial(log_request, record_prometheus_metrics=record)
        self.settings.update(
            sorna_kernels=self.kernels,
            sorna_runs=self.runs,
            sorna_registry=self.registry,
        )
        self._hand_out(self.serverapp)

    def _attend_notebooks(self) -> None:
        serverapp: Any = self.serverapp
        notebooks = Notebooks(serverapp.contents_manager, self.registry)
        self.unattended = UnattendedCells(
            self.kernels.messages,
            notebooks,
            OpenCells(Path(self.data_dir) / "open-cells.jsonl"),
            grace=self.unattended_after,
        )
        self.kernels.on_change = self.unattended.on_kernel_change
        serverapp.kernel_manager.unattended = self.unattended

    def _hand_out(self, serverapp: Any) -> None:
        """jupyter_server has made our classes before our parts were there."""
        serverapp.kernel_manager.kernels = self.kernels
        serverapp.kernel_spec_manager.kernels = self.kernels
        serverapp.session_manager.registry = self.registry
        serverapp.identity_provider.registry = self.registry
        # We print the URL with the token, once; jupyter_server would print it twice more.
        serverapp.identity_provider.token_generated = False
        serverapp.authorizer.kernels = self.kernels
        serverapp.authorizer.registry = self.registry

    def initialize_handlers(self) -> None:
        self.handlers.extend(jupyter.handlers(headless=self.headless))
        self.handlers.extend(rest.handlers())
        self.handlers.extend(operations.handlers())

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        if self._is_main:
            # Jupyter Server asks whether Ctrl-C is meant, and without a terminal, or when it is
            # closed, ends at once, leaving everything behind.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                    asyncio.get_running_loop().add_signal_handler(number, self._stop_by_signal)
        self._starting = asyncio.create_task(self._start_parts(serverapp), name="start")
        try:
            await self._starting
        except (SornaError, OSError, zmq.ZMQError) as error:
            self.log.critical("Sorna could not be started: %s", error)
            serverapp.stop()

    def _stop_by_signal(self) -> None:
        assert self.serverapp is not None
        kernels = len(self.kernels.list())
        fate = "left running" if self.keep_kernels else "stopped with it"
        self.console.say(f"Stopping. Kernels {fate}: {kernels}.")
        self.serverapp.stop()

    async def _start_parts(self, serverapp: ServerApp) -> None:
        """Each step notes how it is undone; `_stop_parts` goes back the same way."""
        undo = self._undo
        await self.registry.upgrade()
        identity = cast(SornaIdentityProvider, serverapp.identity_provider)
        await self.registry.ensure_user(identity.local_user, is_admin=True)
        await self.kernels.load()
        self._adopted = {kernel.id for kernel in self.kernels.list()}
        if not self.headless:
            self.unattended.resume(self.kernels.list())
        # The listener goes after the agent, so that a slow stop does not look like silence.
        await self.listener.start()
        undo.push_async_callback(self.listener.stop)
        undo.push_async_callback(self.kernels.close)
        undo.push_async_callback(self.runs.close)
        if not self.headless:
            undo.push_async_callback(self.unattended.close)
        if self.embedded_agent:
            embedded = EmbeddedAgent(self._agent_settings())
            embedded.start()
            undo.push_async_callback(self._stop_agent, embedded)
        sweep = asyncio.create_task(self.kernels.sweep(), name="sweep")
        undo.callback(sweep.cancel)
        self._announce(serverapp)
        undo.callback(self._gateway_file.unlink, missing_ok=True)

    async def stop_extension(self) -> None:
        """Safe to repeat: a second Ctrl-C waits for the first one's work."""
        if not hasattr(self, "_undo"):
            return
        if not hasattr(self, "_stopping"):
            self._stopping = asyncio.create_task(self._stop_parts(), name="stop")
        await asyncio.shield(self._stopping)

    async def _stop_parts(self) -> None:
        if hasattr(self, "_starting"):
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._undo.aclose()

    async def _stop_agent(self, embedded: EmbeddedAgent) -> None:
        embedded.leave()
        if self.keep_kernels:
            await self._take_leave_of_agent()
            return
        await asyncio.gather(*(self._stop_kernel(kernel) for kernel in self.kernels.list()))
        await embedded.stop()

    async def _take_leave_of_agent(self) -> None:
        """Else it would stop our kernels after `orphan_timeout`."""
        for agent in self.kernels.agents():
            if agent.id == self._embedded_id():
                try:
                    await self.agents.stop_agent(agent, keep_kernels=True)
                except Unavailable as error:
                    self.log.warning("kernels will end in %g s: %s", self.orphan_timeout, error)

    def _embedded_id(self) -> str:
        identity = Path(self.data_dir) / "agent" / "agent.json"
        return str(json.loads(identity.read_text())["agent_id"]) if identity.exists() else ""

    async def _stop_kernel(self, kernel: Kernel) -> None:
        try:
            await self.kernels.stop(kernel.id, "the server was stopped")
        except SornaError as error:
            self.log.warning("kernel %s: %s", kernel.id, error)

    # -- details

    def _on_beat(self, beat: Beat) -> None:
        self.console.show(beat)
        if adopted := self._adopted & {report.kernel_id for report in beat.kernels}:
            self.console.say(f"Kernels of an earlier start that are here again: {len(adopted)}.")
        self._adopted.clear()
        missing = [i.name for i in beat.images if i.state is ImageState.MISSING]
        if missing and self.build_images and not getattr(self, "_building", None):
            agent = next(a for a in self.kernels.agents() if a.id == beat.agent_id)
            self._building = asyncio.create_task(
                self.agents.build_images(agent, missing), name="build images"
            )
            self._building.add_done_callback(self._built)

    def _built(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.log.warning("images: %s", error)

    def _policy(self) -> Policy:
        return Policy(
            max_kernels=self.max_kernels or None,
            default_limits=Limits(
                memory=parse_size(self.default_memory),
                cpus=self.default_cpus or None,
                pids=self.default_pids,
                disk=parse_size(self.default_disk),
            ),
            max_limits=Limits(
                memory=parse_size(self.max_memory) if self.max_memory else None,
                cpus=self.max_cpus or None,
                pids=self.max_pids,
                disk=parse_size(self.max_disk) if self.max_disk else None,
            ),
        )

    def _agent_settings(self) -> AgentSettings:
        data = Path(self.data_dir)
        debug = self._log_level() <= logging.DEBUG
        return AgentSettings(
            data_dir=places.make_private(data / "agent"),
            runtime_dir=Path(self.runtime_dir),
            manager_address=f"ipc://{self.runtime_dir}/manager.sock",
            manager_key=self.keys.public,
            join_token_file=data / "keys" / "join_token",
            runtime=self.runtime,
            orphan_timeout=self.orphan_timeout,
            more=(
                *("--log-level", "DEBUG" if debug else "WARNING"),
                *("--memory-overcommit", f"{self.memory_overcommit:g}"),
                *("--retention", self.output_retention),
                *("--total-retention", self.total_output_retention),
                *("--max-message", self.max_output_message),
                *(("--base-image", self.base_image) if self.base_image else ()),
            ),
        )

    def _announce(self, serverapp: ServerApp) -> None:
        url = serverapp.connection_url
        token = serverapp.identity_provider.token
        self._gateway_file = Path(self.data_dir) / "gateway.json"
        places.write_private(
            self._gateway_file,
            json.dumps({"url": url, "token": token, "pid": os.getpid(), "started": time.time()}),
        )
        path = "" if self.headless else self.default_url.lstrip("/")
        self.console.welcome(f"{url}{path}?token={token}" if token else f"{url}{path}")

    def _log_level(self) -> int:
        """What `--debug` or `--log-level` set; a number, whatever it was written as."""
        assert self.serverapp is not None
        return cast(int, self.serverapp.log_level)

    def _show_our_log(self) -> None:
        """Our modules log under their own names; show that where Jupyter shows its own."""
        assert self.serverapp is not None
        ours = logging.getLogger("sorna_jupyter")
        ours.setLevel(min(self._log_level(), logging.INFO))
        for handler in self.serverapp.log.handlers:
            if handler not in ours.handlers:
                ours.addHandler(handler)


def _lock(data: Path) -> Any:
    """An open file that holds the data directory's lock. Raises `AlreadyRunning`."""
    lock = open(data / "gateway.lock", "a")  # noqa: SIM115  # closed by stop_extension
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        where = ""
        try:
            where = f" at {json.loads((data / 'gateway.json').read_text())['url']}"
        except (OSError, ValueError, KeyError):
            pass  # it is only just starting
        raise AlreadyRunning(
            f"Sorna already runs{where} with the data directory {data}. Open that one, stop it "
            "with Ctrl-C, or start another with --data-dir=DIRECTORY"
        ) from None
    return lock


def _load_keys(data: Path) -> KeyPair:
    file = places.make_private(data / "keys") / "gateway.json"
    if not file.exists():
        public, secret = (key.decode() for key in zmq.curve_keypair())
        places.write_private(file, json.dumps({"public": public, "secret": secret}))
    return KeyPair(**json.loads(file.read_text()))


def _load_join_token(data: Path) -> str:
    file = data / "keys" / "join_token"
    if not file.exists():
        places.write_private(file, secrets.token_urlsafe(32))
    return file.read_text()


def _remove_sockets(runtime: Path) -> None:
    (runtime / "manager.sock").unlink(missing_ok=True)
    try:
        runtime.rmdir()
    except OSError:
        logging.getLogger(__name__).debug("%s is not empty", runtime)


main = SornaApp.launch_instance

"""What is compared: each server as its users start it, with a home, a token and a port of its own.

All of them are asked the same way; `Direct` is no server at all, only kernels. Servers and kernels
lie on loopback, run in sessions of their own and are stopped by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import docker

from benchmarks.clients import Client, HttpClient, WebsocketClient, ZmqClient
from benchmarks.processes import Roles, marked
from sorna_agent.runtimes.docker import OUR_IMAGES
from sorna_agent.runtimes.images import FOLDER_LABEL, NAME_LABEL, SPEC_LABEL, find_folders

PYTHON, NULL = "python3", "benchmark-null"
"""kernelspecs"""
NULL_KERNEL = Path(__file__).with_name("null_kernel.py")
MARK = "SORNA_BENCHMARK"
START_TIMEOUT = 120.0
STOP_TIMEOUT = 60.0
IMAGE_TIMEOUT = 1800.0
NO_RATE_LIMIT = "--ZMQChannelsWebsocketConnection.limit_rate=False"


class Unavailable(Exception):
    """This server can't be measured here, or can't do that."""


@dataclass
class Kernel:
    id: str
    connection: dict[str, Any] = field(default_factory=dict)
    """`Direct`'s: what its connection file says"""
    process: subprocess.Popen[bytes] | None = None


class Server(ABC):
    key: str
    title: str

    @abstractmethod
    def start(self) -> None:
        """Returns when it answers. Raises `Unavailable`."""

    @abstractmethod
    def stop(self) -> None:
        """Safe to repeat."""

    @abstractmethod
    def start_kernel(self, spec: str) -> Kernel:
        """Returns when a client can connect. Raises `Unavailable`."""

    @abstractmethod
    def stop_kernel(self, kernel: Kernel) -> None: ...

    @abstractmethod
    def connect(self, kernel: Kernel, session: str | None = None, framing: str = "v1") -> Client:
        """`framing`: "v1" or "json"."""

    @abstractmethod
    def roles(self) -> Roles:
        """Its processes; not the kernels'."""


class Direct(Server):
    """Straight ZeroMQ to the kernel."""

    key, title = "direct", "straight ZeroMQ"

    def start(self) -> None:
        self._home = Home()
        self._kernels: list[Kernel] = []

    def stop(self) -> None:
        for kernel in list(self._kernels):
            self.stop_kernel(kernel)
        self._home.remove()

    def start_kernel(self, spec: str) -> Kernel:
        ports = free_ports(5)
        names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
        connection = dict(zip(names, ports, strict=True)) | {
            "transport": "tcp",
            "ip": "127.0.0.1",
            "key": uuid.uuid4().hex,
            "signature_scheme": "hmac-sha256",
            "kernel_name": spec,
        }
        file = self._home.root / f"{uuid.uuid4().hex}.json"
        file.write_text(json.dumps(connection))
        program = [str(NULL_KERNEL)] if spec == NULL else ["-m", "ipykernel_launcher", "-f"]
        process = self._home.spawn([sys.executable, *program, str(file)], f"{file.stem}.log")
        kernel = Kernel(file.stem, connection, process)
        self._kernels.append(kernel)
        ZmqClient(connection).close()
        return kernel

    def stop_kernel(self, kernel: Kernel) -> None:
        assert kernel.process is not None
        stop_process(kernel.process, signal.SIGKILL)
        self._kernels.remove(kernel)

    def connect(self, kernel: Kernel, session: str | None = None, framing: str = "v1") -> Client:
        return ZmqClient(kernel.connection, session)

    def roles(self) -> Roles:
        return {}


class HttpServer(Server):
    """Anything with Jupyter's REST and websockets."""

    def __init__(self, key: str, title: str, arguments: Sequence[str] = ()) -> None:
        self.key = key
        self.title = title
        self._arguments = list(arguments)
        self._home: Home | None = None

    @abstractmethod
    def argv(self) -> list[str]: ...

    def start(self) -> None:
        self.home = self._home = Home()
        self.token = uuid.uuid4().hex
        self.address = ("127.0.0.1", free_ports(1)[0])
        self._process = self.home.spawn([*self.argv(), *self._arguments], "server.log")
        self._wait_until(self._answers, START_TIMEOUT)

    def stop(self) -> None:
        if self._home is None:
            return
        stop_process(self._process, signal.SIGTERM)
        for pid in marked(self._home.mark):
            kill(pid)  # what a server has left behind
        self._home.remove()
        self._home = None

    def start_kernel(self, spec: str) -> Kernel:
        model = self.request("POST", "/api/kernels", {"name": spec})
        kernel = Kernel(model["id"])
        self._wait_until_kernel_answers(kernel)
        return kernel

    def stop_kernel(self, kernel: Kernel) -> None:
        self.request("DELETE", f"/api/kernels/{kernel.id}")

    def connect(
        self, kernel: Kernel, session: str | None = None, framing: str = "v1"
    ) -> WebsocketClient:
        return WebsocketClient(
            self.address,
            f"/api/kernels/{kernel.id}/channels",
            self.token,
            session=session,
            framing=framing,
        )

    def roles(self) -> Roles:
        return {"gateway": self._process.pid}

    def http(self) -> HttpClient:
        return HttpClient(self.address, self.token)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """What JSON it answers. Raises `Unavailable`."""
        client = self.http()
        try:
            status, content = client.request(method, path, body)
        finally:
            client.close()
        if status >= 300:
            raise Unavailable(f"{method} {path}: {status} {content[:300].decode()}")
        return json.loads(content) if content else None

    def _wait_until_kernel_answers(self, kernel: Kernel) -> None:
        client = self.connect(kernel)
        try:
            client.execute("0", START_TIMEOUT)
        except TimeoutError as error:
            raise Unavailable(f"{self.title}: {error}") from error
        finally:
            client.close()

    def _answers(self) -> bool:
        try:
            self.request("GET", "/api")
        except OSError:
            return False
        return True

    def _wait_until(self, is_so: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not is_so():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self.home.log("server.log")
                raise Unavailable(f"{self.title} does not start:\n{log[-2000:]}")
            time.sleep(0.05)


class JupyterServer(HttpServer):
    def argv(self) -> list[str]:
        return [
            *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root"),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.address[1]}"),
            *(f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.home.root}"),
        ]


class KernelGateway(HttpServer):
    def argv(self) -> list[str]:
        return [
            *(sys.executable, "-m", "kernel_gateway", "--KernelGatewayApp.ip=127.0.0.1"),
            *(f"--KernelGatewayApp.port={self.address[1]}", "--KernelGatewayApp.port_retries=0"),
            f"--KernelGatewayApp.auth_token={self.token}",
            "--JupyterWebsocketPersonality.list_kernels=True",
        ]

    def start(self) -> None:
        try:
            metadata.version("jupyter_kernel_gateway")
        except metadata.PackageNotFoundError:
            raise Unavailable("not installed: pip install jupyter_kernel_gateway") from None
        super().start()


class Sorna(HttpServer):
    """`jupyter sorna`, with a runtime.

    Its agent joins by itself rather than being embedded, which carries messages the same way, but
    can be told to take more kernels than this machine would offer.
    """

    def __init__(self, key: str, title: str, runtime: str) -> None:
        super().__init__(key, title)
        self.runtime = runtime

    def argv(self) -> list[str]:
        return [
            *(sys.executable, "-c", "from sorna_jupyter.cli import main; raise SystemExit(main())"),
            *("--headless", "--no-browser", f"--runtime={self.runtime}"),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.address[1]}"),
            f"--IdentityProvider.token={self.token}",
            "--SornaApp.embedded_agent=False",
        ]

    def start(self) -> None:
        super().start()
        keys = self.home.data / "sorna/keys"
        self._agent = self.home.spawn(
            [
                *(sys.executable, "-m", "sorna_agent.app", f"--runtime={self.runtime}"),
                f"--manager-addr=ipc://{self.home.runtime}/manager.sock",
                f"--manager-key={json.loads((keys / 'gateway.json').read_text())['public']}",
                f"--join-token-file={keys / 'join_token'}",
                *(f"--data-dir={self.home.root}/agent", f"--runtime-dir={self.home.runtime}"),
                *("--max-kernels=10000", "--memory-overcommit=1000", "--log-level=WARNING"),
            ],
            "agent.log",
        )
        self._wait_until(lambda: {"gateway", "agent", "relay"} <= self.roles().keys(), 60)
        self._wait_for_kernelspecs()

    def stop(self) -> None:
        # First, as it takes its kernels with it.
        if self._home is not None and hasattr(self, "_agent"):
            stop_process(self._agent, signal.SIGTERM)
        super().stop()

    def roles(self) -> Roles:
        modules = {"sorna_agent.app": "agent", "sorna_agent.relay": "relay"}
        found = {
            role: pid
            for pid, command in marked(self.home.mark).items()
            for module, role in modules.items()
            if f"-m {module} " in command
        }
        return {**super().roles(), **found}

    def _wait_for_kernelspecs(self) -> None:
        self._wait_until(lambda: self._can_start(NULL), START_TIMEOUT)

    def _can_start(self, name: str) -> bool:
        found = self.request("GET", "/api/kernelspecs")["kernelspecs"].get(name)
        state = found and found["spec"].get("metadata", {}).get("sorna", {}).get("state", "ready")
        return bool(state == "ready")


class SornaDocker(Sorna):
    """The null kernel gets an image of its own, on top of the Python kernel's, for this run."""

    def start(self) -> None:
        try:
            self._engine = docker.from_env()
            self._engine.ping()
        except docker.errors.DockerException as error:
            raise Unavailable(f"no Docker engine answers: {error}") from error
        self._null = f"{NULL}-{uuid.uuid4().hex[:8]}"
        super().start()

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_null"):
            with contextlib.suppress(docker.errors.ImageNotFound):
                self._engine.images.remove(self._null, force=True)

    def start_kernel(self, spec: str) -> Kernel:
        return super().start_kernel(self._null if spec == NULL else spec)

    def _wait_for_kernelspecs(self) -> None:
        self._wait_until(lambda: self._can_start(PYTHON), IMAGE_TIMEOUT)
        self._build_null_image()
        self._wait_until(lambda: self._can_start(self._null), START_TIMEOUT)

    def _build_null_image(self) -> None:
        base_image = os.environ.get("SORNA_BASE_IMAGE") or None
        [python] = [f for f in find_folders([OUR_IMAGES], base_image) if f.name == PYTHON]
        folder = self.home.root / "image"
        folder.mkdir()
        shutil.copy(NULL_KERNEL, folder)
        (folder / "Dockerfile").write_text(f"FROM {python.reference}\nCOPY null_kernel.py /opt/\n")
        labels = {SPEC_LABEL: json.dumps(null_spec("/opt/null_kernel.py")), NAME_LABEL: self._null}
        self._engine.images.build(
            path=str(folder), tag=self._null, labels=labels | {FOLDER_LABEL: ""}, rm=True
        )


class Home:
    """A user's machine as far as Jupyter sees it, with the null kernel's kernelspec."""

    def __init__(self) -> None:
        # A short path: those of unix sockets have 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="sb-", dir="/tmp"))
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self.data = self.root / "data"
        self.runtime = self.root / "r"
        spec = self.data / "kernels" / NULL
        spec.mkdir(parents=True)
        shutil.copy(NULL_KERNEL, spec)
        (spec / "kernel.json").write_text(json.dumps(null_spec("{resource_dir}/null_kernel.py")))

    @property
    def env(self) -> dict[str, str]:
        theirs = ("JUPYTER", "SORNA_", "XDG_", "IPYTHON")
        name, _, value = self.mark.partition("=")
        here = {
            "HOME": self.root,
            "TMPDIR": self.root,
            "IPYTHONDIR": self.root / "ipython",
            "JUPYTER_DATA_DIR": self.data,
            "JUPYTER_CONFIG_DIR": self.root / "etc",
            "JUPYTER_RUNTIME_DIR": self.root / "run",
            "SORNA_RUNTIME_DIR": self.runtime,
        }
        kept = {n: v for n, v in os.environ.items() if not n.startswith(theirs)}
        base = {n: v for n, v in os.environ.items() if n == "SORNA_BASE_IMAGE"}
        return kept | base | {n: str(path) for n, path in here.items()} | {name: value}

    def spawn(self, argv: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.root / log).open("wb") as output:
            return subprocess.Popen(
                argv,
                env=self.env,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.root / name).read_text(errors="replace")

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def null_spec(program: str) -> dict[str, Any]:
    return {
        "argv": ["python3", program, "{connection_file}"],
        "display_name": "Null",
        "language": "null",
        "interrupt_mode": "message",
    }


_free_ports = iter(random.sample(range(10_000, 32_000), 22_000))
_choosing = threading.Lock()


def free_ports(count: int) -> list[int]:
    """Each is given out once, and lies below those that outgoing connections get: what is free now
    is still free when its kernel has started."""
    ports: list[int] = []
    with _choosing:
        while len(ports) < count:
            port = next(_free_ports)
            try:
                socket.create_server(("127.0.0.1", port)).close()
            except OSError:
                continue  # someone listens there
            ports.append(port)
    return ports


def stop_process(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was faster


def all_servers() -> list[Server]:
    """By the keys that `rows` has."""
    return [
        Direct(),
        JupyterServer("jupyter-server", "jupyter_server", [NO_RATE_LIMIT]),
        KernelGateway("kernel-gateway", "kernel_gateway", [NO_RATE_LIMIT]),
        JupyterServer("jupyter-server-as-shipped", "jupyter_server as shipped"),
        KernelGateway("kernel-gateway-as-shipped", "kernel_gateway as shipped"),
        Sorna("sorna-local", "Sorna, local", "local"),
        SornaDocker("sorna-docker", "Sorna, Docker", "docker"),
    ]

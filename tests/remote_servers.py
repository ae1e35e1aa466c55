"""A plain Jupyter server as the far end of remote kernels, and a network that can fail.

No server of ours: what works with this one works with any that speaks Jupyter's protocol.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.gateways import free_port, wait_until

ROOT = Path(__file__).parent.parent


class StockServer:
    """`jupyter server`, in a directory of its own."""

    token = "a-token-that-nobody-may-see"

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._log = (directory / "server.log").open("wb")
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        places = {
            "JUPYTER_DATA_DIR": str(self._directory / "data"),
            "JUPYTER_CONFIG_DIR": str(self._directory / "config"),
            "JUPYTER_RUNTIME_DIR": str(self._directory / "runtime"),
            "JUPYTER_TOKEN": self.token,
            "IPYTHONDIR": str(self._directory / "ipython"),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", "--allow-root", "--no-browser"]
            + [f"--ServerApp.port={self.port}", f"--ServerApp.root_dir={self._directory}"]
            + ["--ServerApp.port_retries=0", "--KernelRestarter.time_to_dead=0.3"]
            # It would drop output that comes fast, and we test the proxy.
            + ["--ZMQChannelsWebsocketConnection.limit_rate=False"],
            env=os.environ | places,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        wait_until(self._answers, "the stock server answers", 60)
        return process

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/api", timeout=5).ok
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, method: str, path: str) -> requests.Response:
        headers = {"Authorization": f"token {self.token}"}
        return requests.request(method, self.url + path, headers=headers, timeout=30)

    def kernels(self) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self.ask("GET", "/api/kernels").json()
        return answer


class Network:
    """Carries TCP connections to `port` until it is told not to."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.carried = 0
        self.swallowed = 0
        """bytes from clients"""
        self._is_up = True
        self._swallows = False
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Every connection breaks, and no new one comes about."""
        self._is_up = False
        for each in list(self._sockets):
            _close(each)

    def restore(self) -> None:
        self._is_up, self._swallows = True, False

    def swallow(self) -> None:
        """From now on, what clients send is received and never arrives."""
        self._swallows = True

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._is_up:
                _close(near)
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            self._sockets |= {near, far}
            threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        try:
            while data := source.recv(65536):
                if from_client and self._swallows:
                    self.swallowed += len(data)
                    continue
                sink.sendall(data)
                self.carried += len(data) if from_client else 0
        except OSError:
            pass
        for each in (source, sink):
            self._sockets.discard(each)
            _close(each)


def _close(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    each.close()


@pytest.fixture(scope="session")
def stock_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockServer]:
    server = StockServer(tmp_path_factory.mktemp("far"))
    yield server
    server.stop()


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as a user's machine that knows nothing yet; returns its data directory."""
    for name in ("SORNA_URL", "SORNA_TOKEN", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DATA", "CONFIG", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / name.lower()))
    paths = f"{ROOT}{os.pathsep}{ROOT / 'agent'}"
    monkeypatch.setenv("PYTHONPATH", paths)
    return tmp_path / "data"

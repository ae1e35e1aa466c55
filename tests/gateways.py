"""`jupyter sorna` as its users run it: a process of its own, with a home of its own.

`Gateway` starts one, speaks HTTP to it, stops it and finds what it left behind. Everything it
makes lies in one temporary directory; its processes are known by an environment variable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import requests

from tests.waiting import wait_until

MARK = "SORNA_TEST_MARK"
"""Environment variable that every process of a test's gateway inherits."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def command(name: str) -> str:
    """The path of one of this Python environment's console scripts."""
    path = Path(sys.executable).parent / name
    if path.exists():
        return str(path)
    found = shutil.which(name)
    assert found, f"{name} is not installed"
    return found


def docker(*args: str) -> str:
    return subprocess.run(
        ["docker", *args], check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


class Home:
    """A user's machine as far as Jupyter sees it: home, data, config, runtime and temp folders."""

    def __init__(self) -> None:
        # Short, since the paths of unix sockets may have 107 characters only
        self.root = Path(tempfile.mkdtemp(prefix="sg-", dir="/tmp"))
        self.mark = uuid.uuid4().hex
        self.tmp = self.root / "tmp"
        self.work = self.root / "work"
        self.runtime = self.root / "r"
        self.jupyter_data = self.root / "share/jupyter"
        for folder in (self.tmp, self.work, self.jupyter_data):
            folder.mkdir(parents=True)

    @property
    def data_dir(self) -> Path:
        return self.jupyter_data / "sorna"

    @property
    def env(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JUPYTER", "SORNA_URL", "SORNA_TOKEN", "XDG_", "IPYTHON"))
        }
        return inherited | {
            "HOME": str(self.root),
            "TMPDIR": str(self.tmp),
            "IPYTHONDIR": str(self.root / ".ipython"),
            "JUPYTER_DATA_DIR": str(self.jupyter_data),
            "JUPYTER_CONFIG_DIR": str(self.root / "etc"),
            "JUPYTER_RUNTIME_DIR": str(self.jupyter_data / "runtime"),
            "SORNA_RUNTIME_DIR": str(self.runtime),
            "PYTHONUNBUFFERED": "1",
            MARK: self.mark,
        }

    def run(self, *argv: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess:
        """Run a command as this home's user; `argv[0]` may be one of our console scripts."""
        options = {"text": True, "stdin": subprocess.DEVNULL} | options
        if "input" in options:
            del options["stdin"]
        env = self.env | options.pop("env", {})
        return subprocess.run(
            [command(argv[0]), *argv[1:]],
            env=env,
            cwd=options.pop("cwd", self.work),
            capture_output=True,
            timeout=timeout,
            **options,
        )

    def processes(self) -> dict[int, str]:
        """Every live process that carries our mark, with its command line."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                environ = (folder / "environ").read_bytes()
                if f"{MARK}={self.mark}".encode() not in environ:
                    continue
                argv = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, UnicodeDecodeError):
                continue
            if argv:  # a zombie has none
                found[int(folder.name)] = argv
        return found

    def agent_id(self) -> str | None:
        path = self.data_dir / "agent/agent.json"
        return json.loads(path.read_text())["agent_id"] if path.exists() else None

    def containers(self) -> list[str]:
        agent_id = self.agent_id()
        if agent_id is None or shutil.which("docker") is None:
            return []
        return docker("ps", "-aq", "--filter", f"label=sorna.agent-id={agent_id}").split()

    def sockets(self) -> list[str]:
        return [str(path) for path in self.root.rglob("*") if path.is_socket()]

    def temp_files(self) -> list[str]:
        return [str(path) for path in self.tmp.rglob("*")]

    def leftovers(self) -> dict[str, object]:
        """What a stopped gateway must not have left: empty if all is well."""
        found = {
            "containers": self.containers(),
            "processes": self.processes(),
            "sockets": self.sockets(),
            "temp files": self.temp_files(),
        }
        return {what: things for what, things in found.items() if things}

    def remove(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        containers = self.containers()
        if containers:
            docker("rm", "-f", *containers)
        shutil.rmtree(self.root, ignore_errors=True)


class Gateway:
    """A running `jupyter sorna`."""

    def __init__(self, process: subprocess.Popen, home: Home, log: Path) -> None:
        self.process = process
        self.home = home
        self.log = log
        self.url = ""
        self.token = ""

    @classmethod
    def start(
        cls,
        *args: str,
        home: Home | None = None,
        env: dict[str, str] | None = None,
        wait: bool = True,
        timeout: float = 90,
    ) -> Gateway:
        """`jupyter sorna --no-browser ARGS`; returns when it answers."""
        home = home or Home()
        log = home.root / f"gateway-{uuid.uuid4().hex[:6]}.log"
        argv = [command("jupyter"), "sorna", "--no-browser", *args]
        if os.geteuid() == 0:
            argv.append("--allow-root")
        if not any(arg.startswith("--port") for arg in args):
            argv.append(f"--port={free_port()}")
        with log.open("wb") as out:
            process = subprocess.Popen(
                argv,
                env=home.env | (env or {}),
                cwd=home.work,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        gateway = cls(process, home, log)
        if wait:
            try:
                gateway.wait_until_ready(timeout)
            except BaseException:
                gateway.dispose()
                raise
        return gateway

    @property
    def data_dir(self) -> Path:
        return self.home.data_dir

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_ready(self, timeout: float = 90) -> None:
        wait_until(self._answers, f"the gateway answers; its log:\n{self.output}", timeout)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (
            f"the gateway ended with {self.process.returncode}:\n{self.output}"
        )
        try:
            info = json.loads((self.data_dir / "gateway.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        if info["pid"] != self.process.pid:
            return False  # what a gateway before this one left
        self.url, self.token = info["url"].rstrip("/"), info["token"]
        try:
            return requests.get(f"{self.url}/api", timeout=5).ok
        except requests.ConnectionError:
            return False

    # -- HTTP

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """Any status is returned; `token=None` sends none, `token=…` another one."""
        headers = dict(options.pop("headers", {}))
        token = options.pop("token", self.token)
        if token is not None:
            headers.setdefault("Authorization", f"token {token}")
        options.setdefault("timeout", 120)
        return requests.request(method, self.url + path, headers=headers, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        return self.request("POST", path, json=json, **options)

    def put(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        return self.request("PUT", path, json=json, **options)

    def patch(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        return self.request("PATCH", path, json=json, **options)

    def delete(self, path: str, **options: Any) -> requests.Response:
        return self.request("DELETE", path, **options)

    def websocket_url(self, path: str) -> str:
        return re.sub("^http", "ws", self.url) + path

    # -- kernels

    def wait_for_image(self, name: str = "python3", timeout: float = 600) -> None:
        """Until this kernelspec can start kernels; building its image may take minutes."""

        def ready() -> bool:
            response = self.get("/sorna/images")
            assert response.status_code == 200, response.text
            image = next((i for i in response.json() if i["name"] == name), None)
            if image is None:
                return False
            assert image["state"] != "failed", f"{image}\n{self.output}"
            return bool(image["state"] == "ready")

        wait_until(ready, f"kernelspec {name} is ready", timeout)

    def start_kernel(self, **body: Any) -> str:
        response = self.post("/api/kernels", body)
        assert response.status_code == 201, response.text
        kernel_id: str = response.json()["id"]
        return kernel_id

    def execute(
        self, kernel_id: str, code: str, token: str | None = None, **body: Any
    ) -> dict[str, Any]:
        response = self.post(
            f"/api/kernels/{kernel_id}/execute",
            {"code": code, **body},
            token=token or self.token,
        )
        assert response.status_code == 200, response.text
        result: dict[str, Any] = response.json()
        return result

    def text(self, kernel_id: str, code: str, **body: Any) -> str:
        """What the code printed, and the text of its result."""
        return text_of(self.execute(kernel_id, code, **body)["outputs"])

    def stop_kernel(self, kernel_id: str) -> None:
        response = self.delete(f"/api/kernels/{kernel_id}")
        assert response.status_code in (204, 404), response.text

    # -- the end

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send the signal once, wait, return the exit code."""
        self.process.send_signal(signum)
        return self.wait(timeout)

    def wait(self, timeout: float = 60) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the gateway does not stop:\n{self.output}") from None

    def dispose(self) -> None:
        """Whatever state it is in: stop it, and remove what it had."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self.home.remove()


def text_of(outputs: list[dict[str, Any]]) -> str:
    """The text in a list of nbformat outputs, in their order."""
    parts = []
    for output in outputs:
        if output["output_type"] == "stream":
            parts.append(output["text"])
        elif output["output_type"] == "error":
            parts.append(f"{output['ename']}: {output['evalue']}")
        elif "text/plain" in output.get("data", {}):
            parts.append(output["data"]["text/plain"])
    return "".join("".join(part) for part in parts)


def start_front(
    url: str, token: str, *args: str, program: str = "server", env: dict[str, str] | None = None
) -> Gateway:
    """A stock `jupyter PROGRAM --gateway-url=URL ARGS`, as a laptop would run it."""
    home = Home()
    log = home.root / "front.log"
    port = free_port()
    argv = [command("jupyter"), program, "--no-browser", "--allow-root", f"--port={port}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*argv, "--IdentityProvider.token=t", f"--gateway-url={url}", *args],
            env=home.env | {"JUPYTER_GATEWAY_AUTH_TOKEN": token} | (env or {}),
            cwd=home.work,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    front = Gateway(process, home, log)
    front.url, front.token = f"http://127.0.0.1:{port}", "t"

    def answers() -> bool:
        assert process.poll() is None, front.output
        try:
            return front.get("/api", timeout=10).ok
        except requests.ConnectionError:
            return False

    try:
        wait_until(answers, "the server in front answers", 60)
    except BaseException:
        front.dispose()
        raise
    return front

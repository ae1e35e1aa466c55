"""A small Python client of our REST: start kernels, run code, see its output as it comes.

    from sorna_jupyter import Client

    with Client().kernel("python3") as kernel:
        kernel.execute("x = 6 * 7")
        print(kernel.execute("print(x)").text)

Synchronous, over `requests`. Used by programs and by `jupyter sorna run`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import requests

from sorna_jupyter.exceptions import NotFound, SornaError, Unavailable
from sorna_jupyter.remote import credentials
from sorna_jupyter.remote.server import refusal

OutputCallback = Callable[[dict[str, Any]], None]
Stdin = str | list[str] | Callable[[str, bool], str]
"""lines for `input()`, or who is asked for them: a function of the prompt and of whether what is
typed must not be seen"""

RECONNECT_FOR = 60.0
"""seconds that a broken stream is picked up again, where it was left"""


class RunFailed(SornaError):
    """A run did not end well."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.status}: {result.problem}")
        self.result = result


@dataclass(frozen=True)
class Result:
    """What came of a run. `outputs` are a notebook's (nbformat 4)."""

    id: str
    kernel_id: str
    status: str
    """ok, error, aborted, timeout, lost; queued, running or waiting-input if it goes on"""
    execution_count: int | None
    outputs: list[dict[str, Any]]
    truncated: bool
    error: dict[str, Any] | None
    """ename, evalue, traceback"""
    reason: str | None
    input_request: dict[str, Any] | None
    timings: dict[str, Any]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Result:
        return cls(**{name: answer[name] for name in cls.__dataclass_fields__})

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def stdout(self) -> str:
        return self._stream("stdout")

    @property
    def stderr(self) -> str:
        return self._stream("stderr")

    @property
    def text(self) -> str:
        """What one would read: stdout and the plain text of every display, in order."""
        return "".join(text_of(o) for o in self.outputs if o.get("name") != "stderr")

    @property
    def problem(self) -> str:
        """Why it did not end well; empty if it did."""
        if self.reason or not self.error:
            return self.reason or ""
        return f"{self.error['ename']}: {self.error['evalue']}"

    def data(self, mime_type: str) -> list[Any]:
        """Every display's data of this type, e.g. the plots as base64 of `image/png`."""
        return [o["data"][mime_type] for o in self.outputs if mime_type in o.get("data", {})]

    def check(self) -> Self:
        """Itself; raises `RunFailed` unless it is `ok`."""
        if not self.ok:
            raise RunFailed(self)
        return self

    def _stream(self, name: str) -> str:
        return "".join(o["text"] for o in self.outputs if o.get("name") == name)


def text_of(output: dict[str, Any]) -> str:
    """An output as plain text: a stream's, or a display's `text/plain` with its line end."""
    if output["output_type"] == "stream":
        return str(output["text"])
    if "text/plain" in (data := output.get("data", {})):
        text = data["text/plain"]
        return ("".join(text) if isinstance(text, list) else str(text)) + "\n"
    return ""


class Client:
    """One server, and who we are there."""

    def __init__(self, url: str | None = None, token: str | None = None, timeout: float = 90):
        """Without `url`: `SORNA_URL`, the last `jupyter sorna login`, or this machine's gateway.

        Without `token`: the one that is known for that server. `timeout`: seconds of silence
        after which a request fails; a server that runs code is never silent that long.
        """
        if url and token:
            self.url = credentials.normalise(url)
        else:
            self.url, known = credentials.choose(url)
            token = token or known
        self.timeout = timeout
        self._http = requests.Session()
        # A `.netrc` entry would replace our token; its proxies would see it.
        self._http.trust_env = False
        self._http.headers["Authorization"] = f"token {token}"

    def close(self) -> None:
        self._http.close()

    def kernel(
        self,
        name: str | None = None,
        *,
        env: dict[str, str] | None = None,
        path: str | None = None,
        limits: dict[str, Any] | None = None,
        idle_timeout: float | None = None,
    ) -> Kernel:
        """Start a kernel. Used with `with`, it is stopped at the end."""
        body = {
            "name": name,
            "env": env,
            "path": path,
            "limits": limits,
            "idle_timeout": idle_timeout,
        }
        given = {key: value for key, value in body.items() if value is not None}
        return Kernel(self, self._ask("POST", "/api/kernels", given), is_ours=True)

    def kernels(self) -> list[Kernel]:
        return [Kernel(self, model) for model in self._ask("GET", "/api/kernels")]

    def attach(self, kernel_id: str) -> Kernel:
        """A kernel that someone else started, a notebook perhaps. `with` does not stop it."""
        return Kernel(self, self._ask("GET", f"/api/kernels/{kernel_id}"))

    def run(
        self,
        code: str,
        *,
        name: str | None = None,
        env: dict[str, str] | None = None,
        limits: dict[str, Any] | None = None,
        timeout: float | None = None,
        stdin: Stdin | None = None,
        on_output: OutputCallback | None = None,
    ) -> Result:
        """Run code on a kernel of its own, which is gone afterwards."""
        body = _request(code, stdin, timeout=timeout, name=name, env=env, limits=limits)
        return self._submit("/api/run", body).follow(on_output, _asker(stdin))

    def _submit(self, path: str, body: dict[str, Any]) -> Run:
        answer = self._request("POST", path, json=body, headers={"Prefer": "respond-async"})
        location = answer.headers.get("Content-Location", "")
        # The location begins with the server's base URL, which our address has already.
        return Run(self, location[location.index("/api/") :], answer.json())

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._request(method, path, json=body)
        return answer.json() if answer.content else None

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", self.timeout)
        try:
            answer = self._http.request(method, self.url + path, allow_redirects=False, **options)
        except requests.RequestException as error:
            raise Unavailable(f"{self.url} does not answer: {error}") from error
        if not 200 <= answer.status_code < 300:
            with answer:
                raise refusal(self.url, answer.status_code, answer.content)
        return answer


class Kernel:
    """A kernel on the server; notebooks may use it at the same time."""

    def __init__(self, client: Client, model: dict[str, Any], *, is_ours: bool = False) -> None:
        self.client = client
        self.id: str = model["id"]
        self.name: str = model["name"]
        self._is_ours = is_ours
        self._path = f"/api/kernels/{self.id}"

    def __repr__(self) -> str:
        return f"<Kernel {self.name} {self.id}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_ours:
            with contextlib.suppress(NotFound):  # it ended by itself
                self.stop()

    def execute(
        self,
        code: str,
        *,
        on_output: OutputCallback | None = None,
        stdin: Stdin | None = None,
        timeout: float | None = None,
        silent: bool = False,
        store_history: bool | None = None,
    ) -> Result:
        """Run code and wait for its end. Code that fails raises nothing: see `Result.check`.

        `on_output` gets each output as it comes; a stream's with the text that is new.
        """
        run = self.submit(
            code, stdin=stdin, timeout=timeout, silent=silent, store_history=store_history
        )
        return run.follow(on_output, _asker(stdin))

    def submit(
        self,
        code: str,
        *,
        stdin: Stdin | None = None,
        timeout: float | None = None,
        silent: bool = False,
        store_history: bool | None = None,
    ) -> Run:
        """Run code without waiting for it."""
        body = _request(code, stdin, timeout=timeout, silent=silent, store_history=store_history)
        return self.client._submit(f"{self._path}/execute", body)

    def run(self, run_id: str) -> Run:
        """A run that was begun earlier, perhaps by someone else."""
        path = f"{self._path}/runs/{run_id}"
        return Run(self.client, path, self.client._ask("GET", path))

    def runs(self) -> list[dict[str, Any]]:
        """What goes on and what is still known, oldest first; without outputs."""
        summaries: list[dict[str, Any]] = self._ask("GET", "/runs")
        return summaries

    @property
    def state(self) -> str:
        """Jupyter's word: starting, idle, busy, …"""
        return str(self._ask("GET", "")["execution_state"])

    def complete(self, code: str, cursor_pos: int | None = None) -> dict[str, Any]:
        """What could stand at the cursor: `matches`, `cursor_start`, `cursor_end`, `metadata`."""
        return self._question("complete", code=code, cursor_pos=cursor_pos)

    def inspect(
        self, code: str, cursor_pos: int | None = None, detail_level: int = 0
    ) -> dict[str, Any]:
        """Documentation of what stands at the cursor: `found`, `data`, `metadata`."""
        return self._question(
            "inspect", code=code, cursor_pos=cursor_pos, detail_level=detail_level
        )

    def is_complete(self, code: str) -> dict[str, Any]:
        return self._question("is_complete", code=code)

    def interrupt(self) -> None:
        self._ask("POST", "/interrupt")

    def restart(self) -> None:
        """Same id, new process: variables are gone."""
        self._ask("POST", "/restart")

    def stop(self) -> None:
        self._ask("DELETE", "")

    def _question(self, question: str, **body: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._ask("POST", f"/{question}", body)
        return reply

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return self.client._ask(method, self._path + path, body)


class Run:
    """Code that was given to a kernel."""

    def __init__(self, client: Client, path: str, answer: dict[str, Any]) -> None:
        self.client = client
        self.id: str = answer["id"]
        self.kernel_id: str = answer["kernel_id"]
        self._path = path

    def result(self, wait: int = 0) -> Result:
        """How it stands; waits up to `wait` seconds for its end, or for it to ask for input."""
        headers = {"Prefer": f"wait={wait}"}
        timeout = self.client.timeout + wait
        answer = self.client._request("GET", self._path, headers=headers, timeout=timeout)
        return Result.of(answer.json())

    def input(self, value: str) -> None:
        """What the code's `input()` returns."""
        self.client._ask("POST", f"{self._path}/input", {"value": value})

    def interrupt(self) -> None:
        self.client._ask("POST", f"/api/kernels/{self.kernel_id}/interrupt")

    def follow(
        self,
        on_output: OutputCallback | None = None,
        ask: Callable[[str, bool], str] | None = None,
    ) -> Result:
        """Wait for its end, showing outputs and asking for input meanwhile."""
        for event in self.events():
            if event["type"] == "input_request" and ask:
                self.input(ask(event["prompt"], event["password"]))
            elif event["type"] == "result":
                return Result.of(event["run"])
            elif on_output:
                for output in _new_outputs(event):
                    on_output(output)
        raise Unavailable(f"The events of run {self.id} have no end")

    def events(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """What happens, from event number `start` to the last (docs/rest.md has them all).

        A connection that breaks is made again, and goes on after the last event seen.
        """
        broken_since = 0.0
        while True:
            try:
                for event in self._connect(start):
                    broken_since = 0.0
                    start = event["seq"] + 1
                    yield event
                    if event["type"] == "result":
                        return
                broken: Exception = Unavailable("the stream ended early")
            except (requests.RequestException, Unavailable) as error:
                broken = error
            broken_since = broken_since or time.monotonic()
            if time.monotonic() - broken_since > RECONNECT_FOR:
                raise Unavailable(f"Run {self.id} can't be followed: {broken}") from broken
            time.sleep(1)

    def _connect(self, start: int) -> Iterator[dict[str, Any]]:
        with self.client._request(
            "GET",
            f"{self._path}?from={start}",
            headers={"Accept": "application/x-ndjson"},
            stream=True,
        ) as answer:
            # Whatever has come, at once. A line that is long comes in many chunks.
            pending = bytearray()
            for chunk in answer.iter_content(chunk_size=None):
                pending += chunk
                if b"\n" in chunk:
                    *lines, rest = pending.split(b"\n")
                    pending = rest
                    for line in filter(None, lines):
                        yield json.loads(line)


def _request(code: str, stdin: Stdin | None, **options: Any) -> dict[str, Any]:
    body = {key: value for key, value in options.items() if value is not None}
    if callable(stdin):
        return {"code": code, "allow_stdin": True, **body}
    return {"code": code, **({} if stdin is None else {"stdin": stdin}), **body}


def _asker(stdin: Stdin | None) -> Callable[[str, bool], str] | None:
    return stdin if callable(stdin) else None


def _new_outputs(event: dict[str, Any]) -> list[dict[str, Any]]:
    match event["type"]:
        case "output" | "replace":
            return [event["output"]]
        case "append":
            return [{"output_type": "stream", "name": event["name"], "text": event["text"]}]
        case "reset":
            return list(event["outputs"])
    return []

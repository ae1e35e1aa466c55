"""What the tests of our REST share: a kernel played by a few words that it understands."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from tests.jupyter_app import App, Attached

UNKNOWN = "00000000-0000-4000-8000-000000000000"
NDJSON = {"Accept": "application/x-ndjson"}
SSE = {"Accept": "text/event-stream"}
ASYNC = {"Prefer": "respond-async"}


class Words:
    """A kernel that understands words: `say X`, `plot`, `fail`, `ask`, `wait`; one a line."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.go_on = asyncio.Event()
        self.requests: list[Any] = []

    async def serve(self) -> None:
        while True:
            _, (header, _, _, content) = await self._next()
            request = {"header": header, "content": content}
            self.requests.append(request)
            if header["msg_type"] == "execute_request":
                await self._execute(header, content["code"])
            else:
                kind = header["msg_type"].replace("request", "reply")
                self.attached.emit("shell", kind, {"echo": content}, parent=header)

    async def _execute(self, parent: Any, code: str) -> None:
        def tell(msg_type: str, content: Any, channel: str = "iopub") -> None:
            self.attached.emit(channel, msg_type, content, parent=parent)

        tell("status", {"execution_state": "busy"})
        tell("execute_input", {"execution_count": 1, "code": code})
        reply: Any = {"status": "ok", "execution_count": 1}
        for line in code.splitlines():
            word, _, rest_of_line = line.partition(" ")
            if word == "say":
                tell("stream", {"name": "stdout", "text": rest_of_line + "\n"})
            elif word == "plot":
                png = base64.b64encode(b"png").decode()
                tell("display_data", {"data": {"image/png": png}, "metadata": {}})
            elif word == "ask":
                tell("input_request", {"prompt": rest_of_line, "password": False}, "stdin")
                _, (_, _, _, answer) = await self._next()
                tell("stream", {"name": "stdout", "text": answer["value"]})
            elif word == "wait":
                await self.go_on.wait()
            elif word == "fail":
                error = {"ename": "Fail", "evalue": "as told", "traceback": ["Fail"]}
                tell("error", error)
                reply = {"status": "error", **error}
        tell("execute_reply", reply, "shell")
        tell("status", {"execution_state": "idle"})

    async def _next(self) -> tuple[str, list[Any]]:
        channel, parts = await self.attached.sent.get()
        return channel, [json.loads(part) for part in parts]


class RestApp:
    """The server with our face in it, and one kernel."""

    def __init__(self, app: App, kernel_id: str, words: Words) -> None:
        self.app = app
        self.kernel_id = kernel_id
        self.kernel = f"/api/kernels/{kernel_id}"
        self.words = words

    async def execute(self, code: str, headers: Any = None, **body: Any) -> Any:
        path = f"{self.kernel}/execute"
        return await self.app.fetch("POST", path, {"code": code, **body}, headers=headers)

    async def start(self, code: str, **body: Any) -> tuple[str, Any]:
        """Location and state of a run that goes on."""
        response = await self.execute(code, ASYNC, **body)
        assert response.code == 202, response.body
        assert response.headers["Preference-Applied"] == "respond-async"
        return response.headers["Location"], json.loads(response.body)


async def refusal(app: RestApp, status: int, method: str, path: str, body: Any = None, **o: Any):
    response = await app.app.fetch(method, path, body, **o)
    assert response.code == status, response.body
    answer = json.loads(response.body)
    assert answer.keys() == {"message", "reason"}
    assert b"Traceback" not in response.body
    return answer["message"]


def events(body: bytes) -> list[Any]:
    return [json.loads(line) for line in body.splitlines() if line]

"""One kernel on a Jupyter server: its REST verbs, and a websocket that outlives network cuts.

Works with any server that speaks `v1.kernel.websocket.jupyter.org`. Used by `proxy`, one
`RemoteKernel` each.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
import uuid
from contextlib import suppress
from typing import Any

import msgspec
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.iostream import StreamClosedError
from tornado.simple_httpclient import HTTPTimeoutError
from tornado.websocket import (
    WebSocketClientConnection,
    WebSocketClosedError,
    WebSocketError,
    websocket_connect,
)

from sorna_jupyter.exceptions import (
    Conflict,
    KernelStartFailed,
    NotAllowed,
    NotFound,
    SornaError,
    Unavailable,
)
from sorna_jupyter.remote import credentials
from sorna_jupyter.remote.server import refusal
from sorna_jupyter.wire import V1_PROTOCOL

log = logging.getLogger(__name__)

MAX_MESSAGE = 2**31 - 1
PING_INTERVAL = 20.0
CREATE_TIMEOUT = 180.0
"""Seconds for a kernel to be made and its websocket opened; its image may have to be fetched."""
STEADY_AFTER = 5.0
"""Seconds that a websocket must live until the next loss counts as a first one."""


class KernelGone(SornaError):
    """The remote kernel is gone."""


class ConnectionLost(SornaError):
    """The network did not come back in time."""


class RemoteKernel:
    """Between `create` and the end there is one kernel id; `session_id` is the same for every
    websocket, so that the server can give back what was said while there was none."""

    def __init__(self, url: str, *, reconnect_timeout: float) -> None:
        self.url = url
        self.id = ""
        self.session_id = uuid.uuid4().hex
        self._reconnect_timeout = reconnect_timeout
        self._http = AsyncHTTPClient()
        self._token = ""
        self._socket: WebSocketClientConnection | None = None
        self._connected = asyncio.Event()
        self._connected_at = 0.0
        self._pause = 0.0

    # -- REST --------------------------------------------------------------------------------

    async def create(self, kernel_id: str, name: str, env: dict[str, str]) -> None:
        """Create the kernel under an id that we choose, so that trying again can't make two.

        Servers that choose ids themselves answer another one, which then counts.
        """
        body = {"name": name, "kernel_id": kernel_id, "env": env}
        headers = {"Idempotency-Key": kernel_id}
        started, pause, is_repeated = time.monotonic(), 0.5, False
        while True:
            try:
                model = await self._ask(
                    "POST", "/api/kernels", body, headers, timeout=CREATE_TIMEOUT
                )
                break
            except Unavailable as error:
                # Where nothing listens, waiting seldom helps; a server that is busy gets time.
                patience = 3.0 if isinstance(error.__cause__, OSError) else CREATE_TIMEOUT
                if time.monotonic() + pause > started + patience:
                    raise
            except Conflict:
                if not is_repeated:
                    raise
                model = {"id": kernel_id}  # It is ours: only the answer was lost.
                break
            except NotAllowed:
                # Some say no more than that a cookie is missing; asked like this, they say why.
                await self._ask("GET", "/api/status")
                raise
            is_repeated = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, 10.0)
        if not isinstance(model, dict) or not isinstance(model.get("id"), str):
            raise KernelStartFailed(f"{self.url} answered something that is no kernel")
        self.id = model["id"]

    async def interrupt(self) -> None:
        await self._ask("POST", f"/api/kernels/{self.id}/interrupt", {}, timeout=10.0)

    async def check(self) -> None:
        """Raises `KernelGone` with the reason if the server says that this kernel is over."""
        try:
            model = await self._ask("GET", f"/api/kernels/{self.id}", timeout=10.0)
        except NotFound as error:
            # `Kernel does not exist: ID (REASON)`, where the server knows a reason.
            reason = error.message.removeprefix(f"Kernel does not exist: {self.id} ")
            raise KernelGone(reason.strip("()")) from error
        if isinstance(model, dict) and model.get("execution_state") == "dead":
            raise KernelGone(str(model.get("reason") or "The kernel died"))

    async def why_dead(self) -> KernelGone:
        """What to tell of a kernel that was just called dead."""
        try:
            await self.check()
        except KernelGone as gone:
            return gone
        except SornaError:
            pass
        return KernelGone("The kernel died")

    async def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 20.0,
    ) -> Any:
        request = HTTPRequest(
            self.url + path,
            method=method,
            headers={
                "Authorization": f"token {self._current_token()}",
                "Content-Type": "application/json",
                **(headers or {}),
            },
            body=None if body is None else msgspec.json.encode(body),
            follow_redirects=False,
            request_timeout=timeout,
        )
        try:
            response = await self._http.fetch(request)
        except HTTPTimeoutError as error:
            raise Unavailable(f"{self.url} does not answer: timed out") from error
        except HTTPClientError as error:
            raise _refusal(self.url, error.code, error.response) from error
        except (OSError, StreamClosedError) as error:
            raise Unavailable(f"{self.url} does not answer: {_words(error)}") from error
        try:
            return msgspec.json.decode(response.body) if response.body else None
        except msgspec.DecodeError as error:
            raise SornaError(f"{self.url} is not a Jupyter server") from error

    def _current_token(self) -> str:
        # Looked up each time: a gateway that was restarted meanwhile has another.
        self._token = credentials.token_for(self.url) or self._token
        return self._token

    # -- websocket ---------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open the websocket, also for the first time; tries until `reconnect_timeout` is over.

        Raises `KernelGone`, `ConnectionLost`, or `NotAllowed` if the token no longer counts.
        """
        self._connected.clear()
        if time.monotonic() - self._connected_at > STEADY_AFTER:
            self._pause = 0.0
        give_up_at, refusals = time.monotonic() + self._reconnect_timeout, 0
        while True:
            await asyncio.sleep(self._pause * random.uniform(0.7, 1.0))
            self._pause = min(max(self._pause * 2, 0.2), 10.0)
            try:
                await self.check()
                self._socket = await self._open()
            except NotAllowed:
                # A gateway that is just being restarted writes its new token down late.
                refusals += 1
                if refusals > 4:
                    raise
            except (Unavailable, NotFound) as error:
                log.info("kernel %s: %s", self.id, error)
                if time.monotonic() > give_up_at:
                    raise ConnectionLost(
                        f"{self.url} could not be reached for {self._reconnect_timeout:.0f} s"
                    ) from error
            else:
                self._connected_at = time.monotonic()
                self._connected.set()
                return

    async def _open(self) -> WebSocketClientConnection:
        url = f"ws{self.url.removeprefix('http')}/api/kernels/{self.id}/channels"
        request = HTTPRequest(
            f"{url}?session_id={self.session_id}",
            headers={"Authorization": f"token {self._current_token()}"},
            connect_timeout=20.0,
            # Some servers open it only when the kernel is ready, which may take an image's build.
            request_timeout=CREATE_TIMEOUT,
        )
        try:
            socket = await websocket_connect(
                request,
                subprotocols=[V1_PROTOCOL],
                max_message_size=MAX_MESSAGE,
                ping_interval=PING_INTERVAL,
                ping_timeout=PING_INTERVAL,
            )
        except HTTPTimeoutError as error:
            raise Unavailable(f"{self.url} does not answer: timed out") from error
        except HTTPClientError as error:
            raise _refusal(self.url, error.code, error.response) from error
        except (OSError, StreamClosedError, WebSocketError) as error:
            raise Unavailable(f"{self.url} does not answer: {_words(error)}") from error
        if socket.selected_subprotocol != V1_PROTOCOL:
            socket.close()
            raise SornaError(f"{self.url} does not speak {V1_PROTOCOL}")
        assert socket.protocol is not None
        socket.protocol.set_nodelay(True)
        return socket

    async def receive(self) -> str | bytes | None:
        """The next frame; None when the connection is gone."""
        assert self._socket is not None
        return await self._socket.read_message()

    async def send(self, frame: bytes) -> None:
        """Waits while there is no connection. What was under way when one broke may be lost."""
        while True:
            await self._connected.wait()
            assert self._socket is not None
            try:
                await self._socket.write_message(frame, binary=True)
                return
            except WebSocketClosedError:
                self._connected.clear()

    async def send_if_connected(self, frame: bytes) -> None:
        """For the task that also connects, which must not wait for itself."""
        assert self._socket is not None
        with suppress(WebSocketClosedError):
            await self._socket.write_message(frame, binary=True)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._http.close()


def environment_to_pass(names: list[str]) -> dict[str, str]:
    """What the remote kernel gets of our environment: `KERNEL_*`, as everywhere in Jupyter, and
    `names`. Not `KERNEL_ID`: a restarted kernel would clash with itself."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in names or (name.startswith("KERNEL_") and name != "KERNEL_ID")
    }


def _refusal(url: str, status: int, response: HTTPResponse | None) -> SornaError:
    body = response.body if response is not None and response.buffer is not None else b""
    if status == 599:
        return Unavailable(f"{url} does not answer")
    return refusal(url, status, body)


def _words(error: Exception) -> str:
    if isinstance(error, StreamClosedError):
        return str(error.real_error or "it closed the connection")
    return str(error) or type(error).__name__

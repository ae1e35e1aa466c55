"""For a Jupyter server with `--gateway-url`: a websocket client that carries every message.

The one that jupyter_server brings ends at the first binary frame, so that widgets stay empty, and
closes on messages above 10 MiB, which has no setting. This one is put in its place by the setting
`ServerApp.kernel_websocket_connection_class`; it passes frames on as they are, for any gateway.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from jupyter_server.utils import url_path_join
from tornado.escape import url_escape
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.iostream import StreamClosedError
from tornado.websocket import (
    WebSocketClientConnection,
    WebSocketClosedError,
    WebSocketError,
    websocket_connect,
)

from sorna_jupyter.remote.remote_kernel import MAX_MESSAGE

GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013

KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""seconds, seconds, probes"""

USER_AGENT = "sorna-jupyter"
"""`Tornado/…` is taken for jupyter_server's own client, and gets no message that would break it."""


class GatewayConnection(BaseKernelWebsocketConnection):
    """One front-end's websocket and the gateway's: when either ends, the other does.

    Front-ends come back by themselves, with the same session id, and get what they missed.
    """

    _gateway: WebSocketClientConnection | None = None
    _reader: asyncio.Task[None] | None = None

    # -- jupyter_server's hooks

    async def connect(self) -> None:
        """Called once the handshake is done; nothing is read from the client before it returns."""
        self.websocket_handler.set_nodelay(True)
        try:
            self._gateway = await self._open()
        except (HTTPClientError, OSError, StreamClosedError, WebSocketError) as error:
            self.log.warning("kernel %s: no websocket from the gateway: %s", self.kernel_id, error)
            self.websocket_handler.close(TRY_AGAIN_LATER, "no connection to the gateway")
            return
        self._reader = asyncio.create_task(self._read(self._gateway))

    def disconnect(self) -> None:  # type: ignore[override]  # what jupyter_server calls
        """Called when the client is gone; safe to repeat. Not a coroutine: nobody awaits it."""
        if self._reader is not None:
            self._reader.cancel()
        if self._gateway is not None:
            self._gateway.close()

    def handle_incoming_message(self, incoming_msg: bytes | str) -> None:
        if self._gateway is None:
            return  # it is being closed, as `connect` has said
        with suppress(WebSocketClosedError):  # `_read` tells it
            sent = self._gateway.write_message(incoming_msg, isinstance(incoming_msg, bytes))
            sent.add_done_callback(lambda sent: sent.cancelled() or sent.exception())

    # -- the gateway's websocket

    async def _open(self) -> WebSocketClientConnection:
        client: Any = GatewayClient.instance()  # typed in part only
        url = url_path_join(
            client.ws_url, client.kernels_endpoint, url_escape(self.kernel_id), "channels"
        )
        request = HTTPRequest(
            f"{url}?session_id={url_escape(self.session_id)}",
            user_agent=USER_AGENT,
            **client.load_connection_args(),
        )
        # Frames pass unread, so that both websockets must speak the same.
        protocol = self.websocket_handler.selected_subprotocol
        gateway = await websocket_connect(
            request,
            subprotocols=[protocol] if protocol else None,
            max_message_size=MAX_MESSAGE,
        )
        if gateway.selected_subprotocol != protocol:
            gateway.close()
            raise WebSocketError(f"it does not speak {protocol}")
        assert gateway.protocol is not None and gateway.protocol.stream is not None
        gateway.protocol.set_nodelay(True)
        _watch(gateway.protocol.stream.socket)
        return gateway

    async def _read(self, gateway: WebSocketClientConnection) -> None:
        """Until either is gone. A front-end that does not read holds the gateway back."""
        with suppress(WebSocketClosedError):
            while (message := await gateway.read_message()) is not None:
                await self.websocket_handler.write_message(message, isinstance(message, bytes))
        self.log.info("kernel %s: the gateway has closed the websocket", self.kernel_id)
        self.websocket_handler.close(GOING_AWAY, "the connection to the gateway is gone")


def _watch(connection: socket.socket) -> None:
    """Notice within a minute that the network is gone, by the system's own probes: a websocket's
    ping would have to wait behind what a slow front-end has not read yet."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

"""The chaos proxy does what it says: the fault suite stands on it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.chaos import ChaosProxy, Cut


@dataclass
class Connection:
    proxy: ChaosProxy
    client: socket.socket
    server: socket.socket


@pytest.fixture
def connection() -> Iterator[Connection]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = ChaosProxy(listener.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as client:
            server, _ = listener.accept()
            with server:
                yield Connection(proxy, client, server)
        proxy.close()


def received(sock: socket.socket) -> tuple[int, str]:
    """How much comes until the end, and how it ends."""
    size = 0
    sock.settimeout(0.5)
    try:
        while data := sock.recv(1 << 16):
            size += len(data)
    except OSError as error:
        return size, type(error).__name__
    return size, "closed"


@pytest.mark.parametrize(
    ("how", "client_sees", "server_sees"),
    [
        (Cut.FIN, "closed", "closed"),
        (Cut.RST, "ConnectionResetError", "ConnectionResetError"),
        (Cut.SILENCE, "ConnectionResetError", "TimeoutError"),
    ],
)
def test_a_connection_is_cut_after_so_many_bytes(
    connection: Connection, how: Cut, client_sees: str, server_sees: str
) -> None:
    assert connection.proxy.cut(how, after=700) == 1

    connection.server.sendall(b"x" * 1000)

    assert received(connection.client) == (700, client_sees)
    assert received(connection.server) == (0, server_sees)


def test_a_cut_that_is_spared_does_not_come(connection: Connection) -> None:
    connection.proxy.cut(Cut.RST, after=700)
    connection.proxy.spare()

    connection.server.sendall(b"x" * 1000)

    assert received(connection.client) == (1000, "TimeoutError")


def test_what_is_stalled_fills_the_servers_buffers_and_then_comes(connection: Connection) -> None:
    connection.proxy.stall()
    connection.server.settimeout(0.2)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            sent += connection.server.send(b"x" * (1 << 16))

    connection.proxy.go_on()

    assert received(connection.client) == (sent, "TimeoutError")


def test_a_slow_link_is_slow(connection: Connection) -> None:
    connection.proxy.rate = 2000
    connection.server.sendall(b"x")  # ends the read that began before the rate was set
    assert received(connection.client) == (1, "TimeoutError")
    began = time.monotonic()

    connection.server.sendall(b"x" * 1000)

    assert received(connection.client) == (1000, "TimeoutError")
    assert time.monotonic() - began - 0.5 > 0.3

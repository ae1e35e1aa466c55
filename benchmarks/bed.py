"""A server under test with the kernels that stand on it, and how much is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.clients import Client
from benchmarks.processes import Usage
from benchmarks.servers import Kernel, Server


@dataclass(frozen=True)
class Scale:
    """How much is asked in one round."""

    rounds: int
    executes: int
    """at most, in a loop of single ones"""
    seconds: float
    """and at most, of such a loop"""
    messages: int
    """of a burst"""
    fanout_messages: int
    flood: int
    """MiB that a stalled reader leaves unread"""
    idle_kernels: int


FULL = Scale(5, 300, 1.5, 20_000, 3_000, 200, 200)
QUICK = Scale(2, 40, 0.5, 5_000, 1_000, 50, 20)


class Bed:
    def __init__(self, server: Server, scale: Scale) -> None:
        self.server = server
        self.scale = scale
        self._kernels: dict[str, list[Kernel]] = {}

    def kernel(self, spec: str) -> Kernel:
        return self.kernels(spec, 1)[0]

    def kernels(self, spec: str, count: int) -> list[Kernel]:
        """That many of them; they stay for the next round. Raises `Unavailable`."""
        standing = self._kernels.setdefault(spec, [])
        standing += start_kernels(self.server, spec, count - len(standing))
        return standing[:count]

    def release(self, keep: int = 1) -> None:
        """Stop all but so many kernels of each kind."""
        for standing in self._kernels.values():
            stop_kernels(self.server, standing[keep:])
            del standing[keep:]

    @contextmanager
    def client(self, spec: str, framing: str = "v1") -> Iterator[Client]:
        """Of the standing kernel; it has executed something already."""
        client = self.server.connect(self.kernel(spec), framing=framing)
        try:
            client.execute("0")
            yield client
        finally:
            client.close()

    def usage(self) -> Usage:
        return Usage.of(self.server.roles())


def start_kernels(server: Server, spec: str, count: int) -> list[Kernel]:
    """A few at a time, as a server can take it."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: server.start_kernel(spec), range(count)))


@contextmanager
def fresh_kernels(server: Server, spec: str, count: int) -> Iterator[list[Kernel]]:
    """Gone at the end."""
    kernels = start_kernels(server, spec, count)
    try:
        yield kernels
    finally:
        stop_kernels(server, kernels)


def stop_kernels(server: Server, kernels: list[Kernel]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(server.stop_kernel, kernels))

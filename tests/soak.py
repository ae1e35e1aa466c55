"""An hour of use in one table: kernels that work, clients that come and go, and what it costs.

    python -m tests.soak [--minutes 30] [--kernels 50] [--clients 20] [--runtime local]

Starts a gateway, kernels and clients; each client attaches to a random kernel, runs cells, cuts
its connection or leaves, and comes back as itself or as somebody new; others run code over REST.
Every minute one line: memory, file descriptors and threads of gateway, agent and relay. Exits 1 if
one of them grew, or a client missed anything. Run by `scripts/test --soak [MINUTES]`.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import websocket

from tests.acceptance.fault_parts import (
    Cell,
    Follower,
    Scene,
    Tab,
    difference,
    hole_in,
    once,
    rss,
    units,
)
from tests.chaos import Cut
from tests.gateways import text_of
from tests.waiting import wait_until

PARTS = {"agent": "sorna_agent.app", "relay": "sorna_agent.relay"}
MiB = 1 << 20

SETTLED = 0.2
"""the part of the time after which everything has its size: caches, journals, sessions"""
ROOM = {"memory": 32 * MiB, "files": 300, "threads": 4}
"""by how much the last quarter's median may exceed that of the first quarter after settling. Files:
the relay keeps a client session, which has some six, for 10 s and while its kernel is busy; had it
kept those of all visits, there would be thousands."""


@dataclass(frozen=True)
class Reading:
    memory: int
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Reading:
        folder = Path(f"/proc/{pid}")
        return cls(rss(pid), len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")))

    def __str__(self) -> str:
        return f"{self.memory / MiB:7.1f} MiB {self.files:5d} fds {self.threads:3d} threads"


PATIENCE = 300.0
"""seconds for one cell, behind those of others on a busy machine"""


class Visitor(threading.Thread):
    """Comes to a kernel, works there for a while, is cut or leaves, goes to another."""

    def __init__(self, soak: Soak, seed: str) -> None:
        super().__init__(name=f"visitor {seed}", daemon=True)
        self._soak = soak
        self._rng = random.Random(seed)

    def run(self) -> None:
        while not self._soak.is_over.is_set():
            try:
                self._visit(self._rng.choice(self._soak.kernels))
            except Exception as error:  # all are told at the end, and the others go on
                self._soak.failures.append(f"{self.name}: {error!r}")
                return

    def _visit(self, kernel_id: str) -> None:
        scene = self._soak.scene
        tab = scene.tab(self._soak.scene.proxy.url, kernel_id)
        try:
            for _ in range(self._rng.randint(1, 4)):
                cell = Cell(self._rng.randint(1, 100), self._rng.choice((0, 0.001, 0.02)))
                if missing := self._work(tab, kernel_id, cell):
                    raise AssertionError(missing)
                self._soak.cells += 1
                if self._soak.is_over.wait(self._rng.uniform(0, 2)):
                    return
        finally:
            tab.close()
        self._soak.visits += 1

    def _work(self, tab: Tab, kernel_id: str, cell: Cell) -> str:
        """Returns what of the cell's output was not got."""
        scene = self._soak.scene
        match self._rng.choices(("tab", "tab that leaves", "REST", "journal"), (6, 1, 3, 1))[0]:
            case "REST":
                run = scene.gateway.execute(kernel_id, cell.code)
                return difference(text_of(run["outputs"]), cell)
            case "journal":
                follower = Follower(scene.proxy.url, kernel_id, scene.gateway.token)
                self._soak.is_over.wait(1)
                follower.close()
                return hole_in(follower.items)
            case way:
                parent = self._begin(tab, cell)
                if way == "tab that leaves":
                    tab.leave()
                    tab.come_back()
                wait_until(lambda: tab.has_finished(parent), "the cell ends", PATIENCE)
                return _missing(tab, parent, cell)

    def _begin(self, tab: Tab, cell: Cell) -> str:
        """A request may get lost with the connection that it was sent on: it is sent again."""
        while True:
            cuts = len(tab.connections)
            try:
                parent = tab.execute(cell.code)
            except (OSError, websocket.WebSocketException):
                continue
            wait_until(
                lambda: tab.of(parent) or len(tab.connections) > cuts,  # noqa: B023
                "the cell begins or the connection ends",
                PATIENCE,
            )
            if tab.of(parent):
                return parent


def _missing(tab: Tab, parent: str, cell: Cell) -> str:
    numbers = [unit for unit in once(units(tab.of(parent))) if isinstance(unit, int)]
    return "" if numbers == list(range(cell.count)) else f"{len(numbers)} lines of {cell.count}"


class Soak:
    def __init__(self, scene: Scene, kernels: int, seed: str) -> None:
        self.scene = scene
        self.is_over = threading.Event()
        self.failures: list[str] = []
        self.cells = 0
        self.visits = 0
        self._rng = random.Random(seed)
        self._readings: dict[str, list[Reading]] = {}
        scene.gateway.wait_for_image()
        self.kernels = [scene.gateway.start_kernel(name="python3") for _ in range(kernels)]

    def run(self, seconds: float, clients: int) -> None:
        visitors = [Visitor(self, f"{self._rng.random()}") for _ in range(clients)]
        for visitor in visitors:
            visitor.start()
        interval = min(60.0, seconds / 20)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds and not self.failures:
            self._cut_until(began + passed + interval)
            self._read(time.monotonic() - began)
        self.is_over.set()
        for visitor in visitors:
            visitor.join(PATIENCE)

    def _cut_until(self, moment: float) -> None:
        """Networks fail now and then."""
        while (left := moment - time.monotonic()) > 0 and not self.failures:
            time.sleep(min(left, self._rng.uniform(1, 10)))
            self.scene.proxy.cut(self._rng.choice(list(Cut)), after=self._rng.choice((0, 2000)))

    def _read(self, passed: float) -> None:
        pids = {"gateway": self.scene.gateway.pid}
        pids |= {name: self.scene.pid(module) for name, module in PARTS.items()}
        now = {name: Reading.of(pid) for name, pid in pids.items()}
        for name, reading in now.items():
            self._readings.setdefault(name, []).append(reading)
        line = "  ".join(f"{name} {reading}" for name, reading in now.items())
        print(f"{passed / 60:5.1f} min  {line}  {self.cells} cells, {self.visits} visits")

    def growth(self) -> list[str]:
        """What is not flat, in words."""
        found = []
        for name, readings in self._readings.items():
            settled = readings[int(len(readings) * SETTLED) :]
            quarter = max(1, len(settled) // 4)
            for what, room in ROOM.items():
                first = statistics.median(getattr(r, what) for r in settled[:quarter])
                last = statistics.median(getattr(r, what) for r in settled[-quarter:])
                if last > first + room:
                    found.append(f"{name}: {what} went from {first:g} to {last:g}")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kernels", type=int, default=50)
    parser.add_argument("--clients", type=int, default=20, help="at any moment")
    parser.add_argument("--runtime", default="local", choices=("local", "docker"))
    parser.add_argument("--seed", default=str(secrets.randbelow(1_000_000)))
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"{options.kernels} kernels, {options.clients} clients, seed {options.seed}")

    scene = Scene(
        f"--runtime={options.runtime}",
        "--SornaApp.default_memory=512 MiB",
        # Full within minutes: a journal that still fills grows, as it should
        "--SornaApp.output_retention=1 MiB",
    )
    try:
        soak = Soak(scene, options.kernels, options.seed)
        soak.run(options.minutes * 60, options.clients)
        for problem in (problems := soak.failures + soak.growth()):
            print(f"FAILED: {problem}")
        if problems:
            print(scene.gateway.output[-5000:])
    finally:
        scene.close()
    print("not flat" if problems else "flat, and nobody missed anything")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""`jupyter sorna ps | stop | logs`: the kernels of a server, from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from sorna_jupyter.cli.server import add_url, reporting, server_of, whole_id
from sorna_jupyter.exceptions import SornaError
from sorna_jupyter.remote.server import Server

ID_LENGTH = 13
"""characters of an id that a line shows; `stop` and `logs` take the beginning of one"""


@reporting
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jupyter sorna ps", description="List kernels.")
    parser.add_argument("-a", "--all", action="store_true", help="everyone's; for admins")
    parser.add_argument("-q", "--quiet", action="store_true", help="whole ids only")
    add_url(parser)
    arguments = parser.parse_args(argv)
    kernels = _kernels(server_of(arguments), everyone=arguments.all)
    if arguments.quiet:
        for kernel in kernels:
            print(kernel["id"])
        return 0
    if not kernels:
        print("No kernels. Make one with: jupyter sorna run -c 'print(1)', or in a notebook.")
        return 0
    Console(highlight=False).print(_table(kernels, show_owner=arguments.all))
    return 0


@reporting
def stop(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jupyter sorna stop", description="Stop kernels and remove what they had."
    )
    parser.add_argument("kernels", nargs="*", metavar="ID", help="or the beginning of one")
    parser.add_argument("--all", action="store_true", help="all of yours")
    add_url(parser)
    arguments = parser.parse_args(argv)
    if arguments.all == bool(arguments.kernels):
        parser.error("name the kernels to stop, or say --all")
    server = server_of(arguments)
    known = [kernel["id"] for kernel in _kernels(server)]
    failures = 0
    for kernel_id in known if arguments.all else arguments.kernels:
        try:
            kernel_id = whole_id(kernel_id, known)
            server.delete(f"/api/kernels/{kernel_id}")
            print(f"stopped {kernel_id}")
        except SornaError as error:
            print(f"jupyter sorna stop: {error}", file=sys.stderr)
            failures += 1
    return 1 if failures else 0


@reporting
def logs(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jupyter sorna logs",
        description="Show what a kernel's process wrote to its own stdout and stderr "
        "(the output of cells goes to the cells).",
    )
    parser.add_argument("kernel", metavar="ID", help="or the beginning of one")
    parser.add_argument("-n", "--lines", type=int, default=200)
    add_url(parser)
    arguments = parser.parse_args(argv)
    server = server_of(arguments)
    kernel_id = whole_id(arguments.kernel, [kernel["id"] for kernel in _kernels(server)])
    text = server.get(f"/sorna/kernels/{kernel_id}/logs?lines={arguments.lines}")["text"]
    print(text, end="" if text.endswith("\n") or not text else "\n")
    return 0


def _kernels(server: Server, *, everyone: bool = False) -> list[dict[str, Any]]:
    return list(server.get("/sorna/kernels" + ("?all=1" if everyone else "")))


def _table(kernels: list[dict[str, Any]], *, show_owner: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ID", "NAME", "STATE", "CLIENTS", "AGE", "IDLE", "MEMORY", "PIDS"):
        table.add_column(column, no_wrap=column != "STATE")
    if show_owner:
        table.add_column("OWNER")
    now = time.time()
    for kernel in kernels:
        limits = kernel["limits"]
        state = kernel["execution_state"]
        if kernel["reason"]:
            state = f"{kernel['status']}: {kernel['reason']}"
        table.add_row(
            kernel["id"][:ID_LENGTH],
            kernel["name"],
            state,
            str(kernel["connections"]),
            _span(now - kernel["created_at"]),
            "" if kernel["execution_state"] == "busy" else _span(now - kernel["last_activity"]),
            f"{limits['memory'] >> 20} MiB" if limits["memory"] else "",
            str(limits["pids"] or ""),
            *([kernel["owner"]] if show_owner else []),
        )
    return table


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"

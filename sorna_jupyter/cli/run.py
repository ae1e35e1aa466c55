"""`jupyter sorna run`: run code on a server's kernel, streaming what it writes.

stdout and stderr go where they belong, displays as their plain text. `input()` asks the terminal.
Exits with 0, with 1 if the code failed, with 130 if Ctrl-C stopped it.
"""

from __future__ import annotations

import argparse
import getpass
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sorna_jupyter.cli.server import add_url, whole_id
from sorna_jupyter.exceptions import SornaError
from sorna_jupyter.remote.client import Client, Kernel, Result, Run, text_of

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(argv: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.kernel and options.name:
        parser.error("--kernel is a kernel that runs already, -k makes a new one: give one of them")
    try:
        code = _code(options)
    except (OSError, UnicodeDecodeError) as error:
        print(f"jupyter sorna run: {error}", file=sys.stderr)
        return USAGE
    try:
        with _kernel(options) as kernel:
            return _execute(kernel, code, options.timeout)
    except SornaError as error:
        print(f"jupyter sorna run: {error.message}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupyter sorna run",
        description="Run code on a kernel and stream its output.",
        epilog="The server is --url, SORNA_URL, the last `jupyter sorna login`, or the one that "
        "runs here. Exit status: 0; 1 if the code failed; 130 after Ctrl-C.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("file", nargs="?", metavar="FILE", help="file to run; - or none: stdin")
    what.add_argument("-c", dest="code", metavar="CODE", help="code to run")
    parser.add_argument("-k", dest="name", metavar="NAME", help="kernelspec of a new kernel")
    parser.add_argument(
        "--kernel",
        metavar="ID",
        help="a kernel that runs already, or the beginning of its id; it stays",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="interrupt it after this")
    add_url(parser)
    return parser


def _code(options: argparse.Namespace) -> str:
    if options.code is not None:
        return str(options.code)
    if options.file in (None, "-"):
        return sys.stdin.read()
    return Path(options.file).read_text(encoding="utf-8")


@contextmanager
def _kernel(options: argparse.Namespace) -> Iterator[Kernel]:
    client = Client(options.url)
    with (
        _attach(client, options.kernel) if options.kernel else client.kernel(options.name) as kernel
    ):
        yield kernel


def _attach(client: Client, beginning: str) -> Kernel:
    """By a whole id, or as much of it as `ps` shows."""
    return client.attach(whole_id(beginning, [kernel.id for kernel in client.kernels()]))


def _execute(kernel: Kernel, code: str, timeout: float | None) -> int:
    run = kernel.submit(code, stdin=_ask, timeout=timeout)
    result, interrupted = _follow(run)
    if result.error is None and result.problem:
        print(f"jupyter sorna run: {result.status}: {result.problem}", file=sys.stderr)
    if interrupted and not result.ok:
        return INTERRUPTED
    return 0 if result.ok else FAILED


def _follow(run: Run) -> tuple[Result, bool]:
    """The run's result, and whether Ctrl-C interrupted it. A second Ctrl-C ends the waiting.

    So does the first while the run is queued: an interrupt would hit someone else's code.
    """
    screen = _Screen()
    seen, interrupted, started = 0, False, False
    while True:
        try:
            for event in run.events(seen):
                seen = event["seq"] + 1
                if event["type"] == "result":
                    return Result.of(event["run"]), interrupted
                if event["type"] == "input_request":
                    run.input(_ask(event["prompt"], event["password"]))
                started = started or event["type"] != "status" or event["status"] != "queued"
                screen.show(event)
        except KeyboardInterrupt:
            if interrupted or not started:
                raise
            interrupted = True
            run.interrupt()


def _ask(prompt: str, password: bool) -> str:
    """U+0004, at the end of stdin, ends the code's `input()` with EOFError too."""
    try:
        return getpass.getpass(prompt) if password else input(prompt)
    except EOFError:
        return "\x04"


class _Screen:
    """Writes outputs to where a terminal program would have written them."""

    def show(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "append":
                _write(sys.stderr if event["name"] == "stderr" else sys.stdout, event["text"])
            case "output":
                self._show_output(event["output"])
            case "reset":
                _write(sys.stderr, "\n[some output was too fast for this terminal]\n")

    def _show_output(self, output: dict[str, Any]) -> None:
        if output["output_type"] == "error":
            traceback = "\n".join(output["traceback"]) + "\n"
            _write(sys.stderr, traceback if sys.stderr.isatty() else _COLOURS.sub("", traceback))
        else:
            is_stderr = output.get("name") == "stderr"
            _write(sys.stderr if is_stderr else sys.stdout, text_of(output))


def _write(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

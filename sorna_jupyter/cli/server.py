"""What the subcommands that talk to a server share: which one, and how failures are told."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

from sorna_jupyter.exceptions import NotFound, SornaError
from sorna_jupyter.remote import credentials
from sorna_jupyter.remote.server import Server


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", help="which server; else SORNA_URL, the last login, or the one on this machine"
    )


def server_of(arguments: argparse.Namespace) -> Server:
    """Raises `NotAllowed` saying what to type."""
    return Server(*credentials.choose(arguments.url))


def reporting(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """An error of ours or of the system's ends a command with one sentence and status 1."""

    @functools.wraps(main)
    def wrapped(argv: list[str]) -> int:
        try:
            return main(argv)
        except BrokenPipeError:
            raise  # whoever read our output has had enough; `cli.main` knows
        except (SornaError, OSError) as error:
            print(f"jupyter sorna: {error}", file=sys.stderr)
            return 1

    return wrapped


def whole_id(beginning: str, known: list[str]) -> str:
    """Raises `NotFound` unless exactly one id begins so."""
    matches = [kernel_id for kernel_id in known if kernel_id.startswith(beginning)]
    if len(matches) > 1:
        raise NotFound(f"{beginning!r} is the beginning of {len(matches)} kernels; type more of it")
    if not matches:
        raise NotFound(f"no kernel of yours begins with {beginning!r}; see: jupyter sorna ps")
    return matches[0]

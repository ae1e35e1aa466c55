"""`jupyter sorna login URL | logout [URL]`: check and keep a server's token, or forget it."""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path

from sorna_jupyter.cli.server import reporting
from sorna_jupyter.exceptions import InvalidRequest, NotFound, SornaError
from sorna_jupyter.remote import credentials
from sorna_jupyter.remote.server import Server


@reporting
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jupyter sorna login",
        description="Keep a server's token in a file that only you can read, so that kernelspecs, "
        "`jupyter sorna run` and the Python client find it. The token is asked for, or read from "
        "standard input: never type it into the command line.",
    )
    parser.add_argument("url", metavar="URL", help="the server, e.g. https://gpu.example.org:8888")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="read the token from FILE instead"
    )
    args = parser.parse_args(argv)
    try:
        url = credentials.normalise(args.url)
        token = read_token(url, args.token_file)
        who = check(Server(url, token))
        credentials.save(url, token)
    except (KeyboardInterrupt, EOFError):
        print("\nNothing was changed.", file=sys.stderr)
        return 130
    print(f"Logged in to {url}{f' as {who}' if who else ''}.")
    return 0


def read_token(url: str, token_file: Path | None) -> str:
    if token_file is not None:
        token = token_file.read_text()
    elif sys.stdin.isatty():
        token = getpass.getpass(f"Token for {url}: ")
    else:
        token = sys.stdin.readline()
    token = token.strip()
    # What the server printed may be pasted as it stands.
    token = token.rpartition("token=")[2].partition("&")[0] if "token=" in token else token
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest("That is no token")
    return token


def check(server: Server) -> str:
    """Who the server takes us for. Raises `NotAllowed` if it does not accept the token."""
    try:
        identity = server.get("/api/me").get("identity") or {}
    except NotFound:
        server.get("/api/status")  # An older server, which knows only whether, not who.
        return ""
    except AttributeError as error:
        raise SornaError(f"{server.url} is not a Jupyter server") from error
    return str(identity.get("display_name") or identity.get("username") or "")


@reporting
def logout(argv: list[str]) -> int:
    """`jupyter sorna logout [URL]`"""
    parser = argparse.ArgumentParser(
        prog="jupyter sorna logout",
        description="Forget a server's token. Its kernelspecs stay, and work again after a login.",
    )
    parser.add_argument("url", metavar="URL", nargs="?", help="the server; without: the last login")
    args = parser.parse_args(argv)
    last = credentials.default()
    url = args.url or (last[0] if last else None)
    if url is None or not credentials.remove(url):
        known = ", ".join(credentials.servers()) or "none"
        print(f"Not logged in to {url or 'any server'}; known: {known}", file=sys.stderr)
        return 1
    print(f"Logged out of {credentials.normalise(url)}.")
    return 0

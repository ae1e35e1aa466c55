"""Which token opens which server: what `jupyter sorna login` keeps, and what others told us.

One file, `credentials.json` in the data directory, readable by its owner alone. A token never
stands in a command line, a kernelspec or a log, so whoever needs one asks here, at the time of use.
Used by the command line, the Python client and the local proxy kernel.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from sorna_jupyter import places
from sorna_jupyter.exceptions import InvalidRequest, NotAllowed

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def credentials_file() -> Path:
    return places.data_dir() / "credentials.json"


def normalise(url: str) -> str:
    """The one spelling of a server's address: no trailing slash, no page, no default port.

    `http://Host:80/tree?` and `http://host` are the same server. Raises `InvalidRequest` for what
    is no such address, and for one that carries a secret: it came from a command line, where
    every process of the machine can read it.
    """
    parts = urlsplit(url.strip())
    if "token" in parse_qs(parts.query) or parts.username or parts.password:
        raise InvalidRequest(
            "Leave the token out of the address: other people can see a command line. "
            "Type the address alone, and paste the token when you are asked for it."
        )
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise InvalidRequest(f"{url!r} is not an address like https://host:8888/base")
    path = re.sub(r"/(lab|tree)(/.*)?$", "", parts.path).rstrip("/")
    return f"{parts.scheme}://{_place(parts)}{path}"


def _place(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    try:
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(f"{parts.netloc!r} has no valid port") from error
    return host if port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{host}:{port}"


# -- what login keeps ------------------------------------------------------------------------


def save(url: str, token: str) -> None:
    """Remember `token` for `url`, which becomes the default server."""
    stored = _read()
    stored["servers"][normalise(url)] = {"token": token}
    stored["default"] = normalise(url)
    _write(stored)


def remove(url: str) -> bool:
    """Forget the token of `url`. False if there was none."""
    stored = _read()
    known = stored["servers"].pop(normalise(url), None)
    if stored["default"] == normalise(url):
        stored["default"] = next(iter(stored["servers"]), None)
    if known:
        _write(stored)
    return bool(known)


def find(url: str) -> str | None:
    entry = _read()["servers"].get(normalise(url))
    return str(entry["token"]) if entry else None


def default() -> tuple[str, str] | None:
    """The server that was logged in to last, and its token."""
    stored = _read()
    url = stored["default"]
    return (url, str(stored["servers"][url]["token"])) if url in stored["servers"] else None


def servers() -> list[str]:
    return sorted(_read()["servers"])


def _read() -> dict[str, Any]:
    path = credentials_file()
    try:
        text = _read_private(path)
    except FileNotFoundError:
        return {"default": None, "servers": {}}
    try:
        stored = json.loads(text)
        return {"default": stored["default"], "servers": dict(stored["servers"])}
    except (ValueError, KeyError, TypeError) as error:
        raise NotAllowed(f"{path} is damaged: remove it and log in again") from error


def _read_private(path: Path) -> str:
    """What stands in `path`, unless others could have read or written it."""
    with path.open() as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid():
            raise NotAllowed(f"{path} belongs to someone else; it is not used")
        if found.st_mode & 0o077:
            raise NotAllowed(f"{path} can be read by others; type: chmod 600 {path}")
        return file.read()


def _write(stored: dict[str, Any]) -> None:
    path = credentials_file()
    places.make_private(path.parent)
    places.write_private(path, json.dumps(stored, indent=1))


# -- what else there is ----------------------------------------------------------------------


def running() -> tuple[str, str] | None:
    """Address and token of the gateway that runs on this machine for this user."""
    try:
        found = json.loads(_read_private(places.data_dir() / "gateway.json"))
        url, token, pid = str(found["url"]), str(found["token"]), int(found["pid"])
        os.kill(pid, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return normalise(url), token


def from_environment() -> tuple[str, str] | None:
    """`SORNA_URL` and `SORNA_TOKEN`, which count together only: a token is for one server."""
    url, token = os.environ.get("SORNA_URL"), os.environ.get("SORNA_TOKEN")
    return (normalise(url), token) if url and token else None


def token_for(url: str) -> str | None:
    """The token to show to `url`: the environment's, the kept one, or this machine's gateway's."""
    url = normalise(url)
    given, local = from_environment(), running()
    if given and given[0] == url:
        return given[1]
    if stored := find(url):
        return stored
    return local[1] if local and _same_loopback(local[0], url) else None


def choose(url: str | None = None) -> tuple[str, str]:
    """The server to talk to and its token: `url`, or `SORNA_URL`, or the last login, or this
    machine's gateway. Raises `NotAllowed` saying what to type."""
    if url or (url := os.environ.get("SORNA_URL")):
        url = normalise(url)
        if token := token_for(url):
            return url, token
        raise NotAllowed(f"There is no token for {url}; type: jupyter sorna login {url}")
    if found := default() or running():
        return found
    raise NotAllowed(
        "No server is known. Start one here with: jupyter sorna — or type: jupyter sorna login URL"
    )


def _same_loopback(one: str, other: str) -> bool:
    """Whether two addresses are the same, where `localhost` is `127.0.0.1`."""

    def key(url: str) -> tuple[str, str, int | None, str]:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return parts.scheme, "loopback" if host in _LOOPBACK else host, parts.port, parts.path

    return key(one) == key(other)

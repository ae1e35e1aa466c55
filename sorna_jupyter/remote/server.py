"""A Jupyter server, asked for short answers over HTTP.

Standard library only and synchronous, so that the guardian starts at once and stays small. What
the library raises becomes one of our errors here. Used by the command line, `kernelspecs` and the
guardian.
"""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from sorna_jupyter.exceptions import (
    Conflict,
    InvalidRequest,
    NotAllowed,
    NotFound,
    SornaError,
    Unavailable,
)

MAX_ANSWER = 16 * 1024 * 1024


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would take the token along, to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """`url` without trailing slash; every request carries `token`."""

    def __init__(self, url: str, token: str, timeout: float = 20.0) -> None:
        self.url = url
        self._token = token
        self._timeout = timeout
        # No HTTP proxies: a token is for the server alone, and most servers are on loopback.
        self._opener = build_opener(_NoRedirects, ProxyHandler({}))

    def get(self, path: str) -> Any:
        """The JSON at `path`, e.g. `/api/kernelspecs`."""
        return self._parse(self._ask("GET", self.url + path))

    def post(self, path: str, body: Any) -> Any:
        return self._parse(self._ask("POST", self.url + path, json.dumps(body).encode()))

    def delete(self, path: str) -> None:
        self._ask("DELETE", self.url + path)

    def fetch(self, path_from_root: str) -> bytes:
        """The bytes of a file that the server named, by a path on the same host."""
        if not path_from_root.startswith("/") or path_from_root.startswith("//"):
            raise InvalidRequest(f"{path_from_root!r} is not a path on {self.url}")
        parts = urlsplit(self.url)
        return self._ask("GET", f"{parts.scheme}://{parts.netloc}{path_from_root}")

    def _parse(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError as error:
            raise SornaError(f"{self.url} is not a Jupyter server") from error

    def _ask(self, method: str, url: str, body: bytes | None = None) -> bytes:
        headers = {"Authorization": f"token {self._token}", "Content-Type": "application/json"}
        request = Request(url, data=body, method=method, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                return bytes(answer.read(MAX_ANSWER))
        except HTTPError as error:
            with error:
                raise refusal(self.url, error.code, _read_some(error)) from error
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unavailable(f"{self.url} does not answer: {reason}") from error


def _read_some(answer: IO[bytes]) -> bytes:
    try:
        return answer.read(64 * 1024)
    except (HTTPException, OSError):
        return b""


def refusal(url: str, status: int, body: bytes) -> SornaError:
    """What a server's answer other than 2xx means, with its own words where it has some."""
    words = _message(body)
    if 300 <= status < 400:
        return NotAllowed(f"{url} sends us to another page to log in; check address and token")
    if status in (400, 413):
        return InvalidRequest(words or f"{url} does not understand ({status})")
    if status in (401, 403):
        if words in ("", "Forbidden", "Unauthorized"):
            return NotAllowed(f"{url} does not accept this token; type: jupyter sorna login {url}")
        return NotAllowed(f"{url} refused: {words}")
    if status == 404:
        return NotFound(words or f"{url} does not know that (404)")
    if status == 409:
        return Conflict(words or f"{url} refused (409)")
    if status in (408, 429, 502, 503, 504):
        return Unavailable(f"{url} is not ready: {words or status}")
    return SornaError(f"{url} failed: {words or status}")


def _message(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    message = answer.get("message") if isinstance(answer, dict) else None
    return message.strip() if isinstance(message, str) else ""

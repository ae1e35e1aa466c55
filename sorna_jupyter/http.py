"""What every JSON route of ours has in common: errors, request bodies, who asks.

One table says which error becomes which status. A body is read into a msgspec type, never into a
dict of anything. The faces subclass `SornaAPIHandler` and let the errors of `exceptions` pass.

What someone asks for and can't have (4xx) is told to them and is no warning in the log, which
anyone could fill with it.
"""

from __future__ import annotations

import logging
from http.client import responses
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from jupyter_server import log as jupyter_log
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from jupyter_server.prometheus.log_functions import prometheus_log_method
from tornado import web
from tornado.log import access_log

from sorna_jupyter import exceptions as errors

if TYPE_CHECKING:
    from sorna_jupyter.kernels import Kernels
    from sorna_jupyter.registry import Registry
    from sorna_jupyter.runs import Runs

T = TypeVar("T")

STATUS_OF_ERROR: dict[type[errors.SornaError], int] = {
    errors.InvalidRequest: 400,
    errors.NotAllowed: 403,
    errors.LimitExceeded: 403,
    errors.AgentRefused: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.AlreadyRunning: 409,
    errors.KernelStartFailed: 500,
    # No Retry-After: someone has to build the image first.
    errors.ImageUnavailable: 503,
    errors.Unavailable: 503,
    errors.SornaError: 500,
}
"""By class; a subclass that is not here has the status of its nearest ancestor."""

MAX_BODY = 10 * 1024 * 1024

KERNEL_ID = r"(?P<kernel_id>[^/]+)"
"""in a route: any text, so that an ill-formed id gets the same answer as one that no kernel has"""


def status_of(error: errors.SornaError) -> int:
    return next(STATUS_OF_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_OF_ERROR)


def decode_body(data: bytes, kind: type[T]) -> T:
    """`data` as a `kind`; an empty body is `{}`. Raises `InvalidRequest` saying what and where."""
    try:
        return msgspec.json.decode(data.strip() or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise errors.InvalidRequest(f"Invalid request body: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidRequest(f"Invalid JSON in body of request: {error}") from error


def log_request(handler: web.RequestHandler, record_prometheus_metrics: bool = True) -> None:
    """jupyter_server's own, but for refusals; called by tornado for every request that is over."""
    status, request = handler.get_status(), handler.request
    if not 400 <= status < 500:
        jupyter_log.log_request(handler, record_prometheus_metrics)  # type: ignore[no-untyped-call]
        return
    # The path alone: behind it there may be a token.
    what = (status, request.method, request.path, request.remote_ip)
    access_log.info("%d %s %s (%s) %.2fms", *what, 1000 * request.request_time())
    if record_prometheus_metrics:
        prometheus_log_method(handler)  # type: ignore[no-untyped-call]


class QuietHandler(JupyterHandler):
    """Base of our handlers, in whose log refusals are no warnings."""

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        if isinstance(value, errors.SornaError):
            status, message = status_of(value), value.message
        elif isinstance(value, web.HTTPError):
            status, message = value.status_code, value.get_message() or ""
        else:
            super().log_exception(typ, value, tb)
            return
        level = logging.DEBUG if status < 500 else logging.WARNING
        what = (status, self.request.method, self.request.path)
        self.log.log(level, "%d %s %s: %s", *what, message)


@web.stream_request_body
class SornaAPIHandler(QuietHandler, APIHandler):
    """Base of our JSON routes. Errors of `exceptions.py` may simply be raised.

    Bodies are taken chunk by chunk, so that one that is too big is never held in memory: its
    bytes are let go as they come, and whoever asks for the body then raises 413. (Answering
    at once would reset the connection of a client that is still sending, before it read why.)
    """

    max_body = MAX_BODY
    """bytes; the server's own limit is far above, because contents may be big"""

    _chunks: list[bytes]
    _received = 0

    @property
    def kernels(self) -> Kernels:
        kernels: Kernels = self.settings["sorna_kernels"]
        return kernels

    @property
    def runs(self) -> Runs:
        runs: Runs = self.settings["sorna_runs"]
        return runs

    @property
    def registry(self) -> Registry:
        registry: Registry = self.settings["sorna_registry"]
        return registry

    @property
    def username(self) -> str:
        return str(self.current_user.username)

    # -- request bodies ----------------------------------------------------------------------

    def initialize(self, **kwargs: Any) -> None:
        super().initialize(**kwargs)
        self._chunks = []

    async def prepare(self) -> None:  # type: ignore[override]  # as jupyter_server's own
        self._stream_without_delay()
        await super().prepare()
        self._require_user()
        announced = self.request.headers.get("Content-Length", "")
        waits_for_a_go_ahead = self.request.headers.get("Expect", "").lower() == "100-continue"
        if waits_for_a_go_ahead and announced.isdigit() and int(announced) > self.max_body:
            raise self._too_large()

    def _require_user(self) -> None:
        """Also for methods that there are not, and before a stranger's body is taken."""
        method = getattr(self, str(self.request.method).lower(), None)
        if not self.current_user and not getattr(method, "__allow_unauthenticated", False):
            raise web.HTTPError(403)

    def _stream_without_delay(self) -> None:
        # Else Nagle's algorithm holds back every small chunk for the client's delayed ACK: 40 ms.
        stream = getattr(self.request.connection, "stream", None)
        if stream is not None:
            stream.set_nodelay(True)

    def data_received(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received <= self.max_body:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def _has_whole_body(self) -> bool:
        announced = self.request.headers.get("Content-Length", "0")
        is_chunked = "Transfer-Encoding" in self.request.headers
        return not is_chunked and announced.isdigit() and self._received >= int(announced)

    def body_bytes(self) -> bytes:
        if self._received > self.max_body:
            raise self._too_large()
        return b"".join(self._chunks)

    def body(self, kind: type[T]) -> T:
        """The request's JSON body as a `kind`; an empty body is `{}`."""
        return decode_body(self.body_bytes(), kind)

    def get_json_body(self) -> dict[str, Any] | None:
        """What jupyter_server's own handlers call where a face of ours builds on them."""
        return decode_body(data, dict[str, Any]) if (data := self.body_bytes()) else None

    def _too_large(self) -> web.HTTPError:
        return web.HTTPError(413, f"The request's body is above {self.max_body} bytes")

    # -- answers -----------------------------------------------------------------------------

    def write_json(self, value: Any, status: int = 200) -> None:
        """The whole answer: `value` (dicts, lists, msgspec types) as JSON."""
        self.set_status(status)
        self.finish(msgspec.json.encode(value))

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        error = _error_of(kwargs)
        if isinstance(error, errors.SornaError):
            status_code = status_of(error)
        super().send_error(status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """`{"message", "reason"}`: the text for people, and the status in words. No traceback."""
        if not self._has_whole_body():
            # The rest is never read, so the connection can't be used again.
            self.set_header("Connection", "close")
        error = _error_of(kwargs)
        reason = responses.get(status_code, "Unknown HTTP error")
        message = reason
        if isinstance(error, errors.SornaError):
            message = error.message
            if isinstance(error, errors.Unavailable):
                self.set_header("Retry-After", str(error.retry_after))
        elif isinstance(error, web.HTTPError):
            message = error.get_message() or reason
            reason = error.reason or reason
        self.finish(msgspec.json.encode({"message": message, "reason": reason}))


def _error_of(kwargs: dict[str, Any]) -> BaseException | None:
    exc_info = kwargs.get("exc_info")
    return exc_info[1] if exc_info else None

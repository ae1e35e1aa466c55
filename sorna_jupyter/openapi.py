"""What our REST takes and gives: request bodies, and the OpenAPI 3.1 document of it all.

Schemas are msgspec's, of the very types that the handlers decode and encode. Used by `faces.rest`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sorna_jupyter import __version__
from sorna_jupyter.bodies import LimitsBody, NewKernel
from sorna_jupyter.run import Event, Execute, RunResult, RunSummary


class OneShot(Execute, kw_only=True, forbid_unknown_fields=True):
    """Code and the kernel to make for it."""

    name: str | None = None
    """of the kernelspec"""
    env: dict[str, str] = {}
    limits: LimitsBody = msgspec.field(default_factory=LimitsBody)


class Input(msgspec.Struct, forbid_unknown_fields=True):
    value: str
    """what `input()` returns; U+0004 alone: EOFError instead"""


class Complete(msgspec.Struct, forbid_unknown_fields=True):
    code: str
    cursor_pos: int | None = None
    """in characters (code points); by default the end of the code"""


class Inspect(Complete, forbid_unknown_fields=True):
    detail_level: int = 0


class IsComplete(msgspec.Struct, forbid_unknown_fields=True):
    code: str


class JournalMessage(msgspec.Struct):
    """A message that left the kernel, as Jupyter's messaging protocol has it."""

    seq: int
    """its number; they have no holes"""
    channel: str
    header: dict[str, Any]
    parent_header: dict[str, Any]
    metadata: dict[str, Any]
    content: dict[str, Any]
    buffers: list[bytes]
    """base64"""


class GapModel(msgspec.Struct):
    from_: int = msgspec.field(name="from")
    to: int
    """numbers of the first and the last message that are gone"""
    messages: int | None
    """how many; null: nobody knows, and perhaps none"""
    bytes: int | None
    reason: str


class JournalGap(msgspec.Struct):
    """Stands where messages are gone."""

    gap: GapModel


class Problem(msgspec.Struct):
    """Every error's body."""

    message: str
    """for people: what is wrong"""
    reason: str
    """the status in words"""


class KernelModel(msgspec.Struct):
    id: str
    name: str
    last_activity: str
    execution_state: str
    connections: int
    reason: str = ""


REF = "#/components/schemas/{name}"
EMPTY_LINES = "; empty lines mean nothing"


def document(base_url: str) -> dict[str, Any]:
    """The document, for a server whose routes begin with `base_url`."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sorna Jupyter",
            "version": __version__,
            "description": "Run code on live Jupyter kernels. The kernels are those of the Jupyter "
            "API beside it, so a notebook and a program may share one.",
        },
        "servers": [{"url": base_url}],
        "security": [{"token": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "also `Authorization: token …` and `?token=…`",
                }
            },
            "responses": {
                "Problem": {
                    "description": "What is wrong",
                    "content": {"application/json": {"schema": _ref("Problem")}},
                }
            },
            "schemas": _schemas(),
        },
    }


def _schemas() -> dict[str, Any]:
    types = [
        *(Execute, OneShot, Input, Complete, Inspect, IsComplete, NewKernel),
        *(RunResult, RunSummary, KernelModel, JournalMessage, JournalGap, Problem),
    ]
    (*_, event), schemas = msgspec.json.schema_components([*types, Event], ref_template=REF)
    return {**schemas, "Event": event}


def _paths() -> dict[str, Any]:
    kernel = "/api/kernels/{kernel_id}"
    paths: dict[str, Any] = {
        "/healthz": {
            "get": {
                "operationId": "check_health",
                "summary": "Whether the server answers",
                "security": [],
                "responses": {"200": {"description": "It does"}},
            }
        },
        "/api/kernels": {
            "get": _operation(
                "list_kernels",
                "Your kernels",
                _json({"type": "array", "items": _ref("KernelModel")}),
            ),
            "post": _operation(
                "start_kernel",
                "Start a kernel",
                _json(_ref("KernelModel"), 201, "A kernel, or one that is still `starting`"),
                body="NewKernel",
                parameters=[_header("Idempotency-Key", "the same key again: the same kernel")],
            ),
        },
        kernel: {
            "get": _operation("get_kernel", "A kernel", _json(_ref("KernelModel"))),
            "delete": _operation("stop_kernel", "Stop it", {"204": {"description": "It is gone"}}),
        },
        f"{kernel}/interrupt": {
            "post": _operation(
                "interrupt_kernel", "Interrupt what it runs", {"204": {"description": "Done"}}
            )
        },
        f"{kernel}/restart": {
            "post": _operation("restart_kernel", "Same id, new process", _json(_ref("KernelModel")))
        },
        f"{kernel}/execute": {
            "post": _operation(
                "execute", "Run code", _run_made(), body="Execute", parameters=_NEW_RUN
            )
        },
        f"{kernel}/runs": {
            "get": _operation("list_runs", "Its runs, oldest first", _json(_list_of("RunSummary")))
        },
        f"{kernel}/messages": {
            "get": _operation(
                "read_messages",
                "What left the kernel, on every channel and for every client",
                _lines_of("`JournalMessage` or `JournalGap`"),
                parameters=_MESSAGES,
            )
        },
        "/api/run": {
            "post": _operation(
                "run_one_shot",
                "Run code on a kernel made for it, and removed after it",
                _run_made(),
                body="OneShot",
                parameters=_NEW_RUN,
            )
        },
    }
    for path, run in ((f"{kernel}/runs/{{run_id}}", "run"), ("/api/run/{run_id}", "one_shot")):
        paths[path] = {"get": _operation(f"get_{run}", "A run", _run(), parameters=_OLD_RUN)}
        paths[f"{path}/input"] = {
            "post": _operation(
                f"answer_{run}",
                "Answer `input()`",
                {"204": {"description": "The run goes on"}},
                body="Input",
            )
        }
    for question, body, summary in _QUESTIONS:
        paths[f"{kernel}/{question}"] = {
            "post": _operation(
                question, summary, _json({"type": "object"}, 200, "The reply's content"), body=body
            )
        }
    for path, item in paths.items():
        item["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in ("kernel_id", "run_id")
            if f"{{{name}}}" in path
        ]
    return paths


def _operation(
    operation_id: str,
    summary: str,
    responses: dict[str, Any],
    body: str | None = None,
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`operation_id`: a generated client's name for it, so it stays as it is."""
    operation: dict[str, Any] = {
        "operationId": operation_id,
        "summary": summary,
        "responses": {**responses, "default": {"$ref": "#/components/responses/Problem"}},
    }
    if body:
        operation["requestBody"] = {"content": {"application/json": {"schema": _ref(body)}}}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _run() -> dict[str, Any]:
    lines = f"one `Event` a line{EMPTY_LINES}"
    return {
        "200": {
            "description": "The run, or its events as they come",
            "content": {
                "application/json": {"schema": _ref("RunResult")},
                "application/x-ndjson": {
                    "schema": {"type": "string", "description": lines},
                },
                "text/event-stream": {
                    "schema": {"type": "string", "description": "`data:` is an `Event`"},
                },
            },
        }
    }


def _lines_of(what: str) -> dict[str, Any]:
    return {
        "200": {
            "description": "Messages, in their order",
            "content": {
                "application/x-ndjson": {
                    "schema": {"type": "string", "description": f"one {what} a line{EMPTY_LINES}"}
                },
                "text/event-stream": {
                    "schema": {"type": "string", "description": f"`data:` is a {what}"}
                },
            },
        }
    }


def _run_made() -> dict[str, Any]:
    accepted = _json(_ref("RunResult"), 202, "It runs; read it at `Location`")
    accepted["202"]["headers"] = {"Location": {"schema": {"type": "string"}}}
    return {**_run(), **accepted}


def _json(schema: dict[str, Any], status: int = 200, what: str = "It") -> dict[str, Any]:
    return {str(status): {"description": what, "content": {"application/json": {"schema": schema}}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(name=name)}


def _list_of(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(name)}


def _header(name: str, what: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": what, "schema": {"type": "string"}}


_NEW_RUN = [_header("Prefer", "`respond-async` answers 202 at once, with `wait=N` after N seconds")]
_OLD_RUN = [
    _header("Prefer", "`wait=N`: up to N seconds for it to be over or to wait for input"),
    {
        "name": "from",
        "in": "query",
        "description": "streams only: number of the first event",
        "schema": {"type": "integer", "minimum": 0, "default": 0},
    },
]
_MESSAGES = [
    {
        "name": "since",
        "in": "query",
        "description": "number of the first message wanted",
        "schema": {"type": "integer", "minimum": 1, "default": 1},
    },
    {
        "name": "follow",
        "in": "query",
        "description": "go on with what comes, until the kernel is over",
        "schema": {"type": "boolean", "default": False},
    },
]
_QUESTIONS = (
    ("complete", "Complete", "What could stand at the cursor"),
    ("inspect", "Inspect", "Documentation of what stands at the cursor"),
    ("is_complete", "IsComplete", "Whether the code is complete"),
)

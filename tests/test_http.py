"""The table of errors, and bodies."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest

from sorna_jupyter import exceptions
from sorna_jupyter.exceptions import InvalidRequest, SornaError
from sorna_jupyter.http import decode_body, status_of


class Body(msgspec.Struct):
    name: str = ""
    more: Any = None


def every_error() -> list[type[SornaError]]:
    found = [kind for _, kind in inspect.getmembers(exceptions, inspect.isclass)]
    return [kind for kind in found if issubclass(kind, SornaError)]


@pytest.mark.parametrize("kind", every_error())
def test_every_error_has_a_status(kind: type[SornaError]) -> None:
    error = kind.__new__(kind)

    expected = {"InvalidRequest": 400, "NotAllowed": 403, "LimitExceeded": 403}
    expected |= {"AgentRefused": 403, "AlreadyRunning": 409}
    expected |= {"NotFound": 404, "KernelNotFound": 404, "RunNotFound": 404}
    expected |= {"SessionNotFound": 404, "UnknownKernelspec": 404}
    expected |= {"Conflict": 409, "KernelExists": 409, "IllegalTransition": 409}
    expected |= {"Unavailable": 503, "NoAgentAvailable": 503, "AgentUnreachable": 503}
    expected |= {"RuntimeUnavailable": 503, "ImageUnavailable": 503, "AgentDiskFull": 503}
    expected |= {"KernelStartFailed": 500, "NotebookNotWritten": 500, "SornaError": 500}
    assert status_of(error) == expected[kind.__name__]


@pytest.mark.parametrize("data", [b"", b"{}", b"  \n"])
def test_an_empty_body_is_an_empty_object(data: bytes) -> None:
    assert decode_body(data, Body) == Body()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"nonsense", "Invalid JSON"),
        (b'{"name": "half \\ud800 pair"}', "surrogate"),
        (b'{"name": "\xff"}', "Invalid JSON"),
        (b'{"name": 1}', "Expected `str`, got `int` - at `$.name`"),
        (b'{"more": ' + b"[" * 100_000, "Invalid JSON"),
    ],
)
def test_a_body_that_is_wrong_says_what_and_where(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=".*") as raised:
        decode_body(data, Body)

    assert says in raised.value.message

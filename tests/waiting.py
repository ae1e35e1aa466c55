"""Waiting for what no event tells: asking again until it is so, with a bound, never for luck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 30.0
"""seconds; what takes longer is broken"""


async def until(claim: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """The claim's value, once it is true."""
    async with asyncio.timeout(timeout):
        while not (value := claim()):
            await asyncio.sleep(0.005)
    return value


def wait_until(claim: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """The same for tests that are no coroutines; `what` is said if it never is so."""
    deadline = time.monotonic() + timeout
    while True:
        answer = claim()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not so after {timeout} s: {what}")
        time.sleep(0.05)

"""Which requests wait for an answer that was lost with other messages of their kernel. No I/O.

Used by `runs` and `websocket`, whose clients would wait for ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable


async def wait_in_vain(
    unanswered: Callable[[], Iterable[str]], ask: Callable[[], Awaitable[object]]
) -> list[str]:
    """Of the requests that are unanswered now, by their ids, those that will be so for ever.

    Kernels work their shell off in order: when a question (`ask`, by the same client session) is
    answered, what was sent before it and has no answer by then never will have one. Two questions
    in a row, as a kernel reads its peers in turns: what a relay that died had sent is still queued
    there, beside what the next relay sends, and may come after one question, but not after two.

    Raises what `ask` raises.
    """
    left = list(unanswered())
    quiet = 0
    while quiet < 2:
        await ask()
        now = set(unanswered())
        still = [request_id for request_id in left if request_id in now]
        quiet = quiet + 1 if still == left else 0
        left = still
    return left

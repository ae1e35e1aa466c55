"""Kernels are queues here: what is asked is answered behind what they hold."""

from __future__ import annotations

from sorna_jupyter.unanswered import wait_in_vain


class TwoQueues:
    """A kernel that reads in turns what two relays have sent, the newer one first."""

    def __init__(self, *queued: str) -> None:
        self.queued = list(queued)
        self.unanswered = {"lost", *queued}

    async def ask(self) -> None:
        if self.asked and self.queued:
            self.unanswered.remove(self.queued.pop(0))
        self.asked += 1

    asked = 0


async def test_what_is_not_answered_before_a_later_question_never_will_be() -> None:
    kernel = TwoQueues()

    assert await wait_in_vain(lambda: kernel.unanswered, kernel.ask) == ["lost"]


async def test_what_still_waits_in_the_queue_of_a_former_relay_is_waited_for() -> None:
    kernel = TwoQueues("a", "b", "c")

    assert await wait_in_vain(lambda: kernel.unanswered, kernel.ask) == ["lost"]
    assert kernel.queued == []


async def test_what_is_asked_later_is_not_judged() -> None:
    unanswered = {"lost"}

    async def ask() -> None:
        unanswered.add("later")

    assert await wait_in_vain(lambda: unanswered, ask) == ["lost"]

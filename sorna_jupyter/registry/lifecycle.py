"""A kernel's life: which moves are legal, and what an agent's beat says about it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sorna_jupyter.protocol import KernelReport, KernelStatus

PREPARING, RUNNING, RESTARTING, LOST, TERMINATING, TERMINATED, DEAD = KernelStatus

BEAT_MAY_LAG = 10.0
"""Seconds by which a beat may be older than what the registry knows. A kernel's agent knows it
before `mark_running`, but a beat packed before that may be read after it; so an absence counts
only against a state that is older than this."""

_NEXT: dict[KernelStatus, frozenset[KernelStatus]] = {
    PREPARING: frozenset({RUNNING, TERMINATING, TERMINATED, DEAD}),
    RUNNING: frozenset({RESTARTING, LOST, TERMINATING, TERMINATED, DEAD}),
    RESTARTING: frozenset({RUNNING, LOST, TERMINATING, TERMINATED, DEAD}),
    LOST: frozenset({RUNNING, TERMINATING, TERMINATED, DEAD}),
    TERMINATING: frozenset({TERMINATED, DEAD}),
    TERMINATED: frozenset(),
    DEAD: frozenset(),
}


def may_move(old: KernelStatus, new: KernelStatus) -> bool:
    return new in _NEXT[old]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a beat for one kernel of its agent."""

    status: KernelStatus
    reason: str = ""
    destroy: bool = False
    """the agent shall stop it and forget it"""
    confirmed: bool = False
    """the agent still works on what the registry waits for"""


def judge(status: KernelStatus, reason: str, age: float, report: KernelReport | None) -> Verdict:
    """The one rule that reconciles the registry with an agent.

    `status` and `reason` are the registry's, `age` is how many seconds ago they were set, and
    `report` is the agent's word, None where the beat does not name the kernel.
    """
    if report is None:
        return _judge_absent(status, reason, age)
    if status.is_final:
        return Verdict(status, reason, destroy=True)
    if report.status.is_final:
        if status is TERMINATING:
            return Verdict(TERMINATED, reason or report.reason, destroy=True)
        return Verdict(DEAD, report.reason or "its agent reported it dead", destroy=True)
    if status is TERMINATING:
        # Young ones are being destroyed by a gateway right now; old ones lost that gateway.
        return Verdict(status, reason, destroy=age > BEAT_MAY_LAG)
    if report.status is PREPARING:
        if status is PREPARING:
            return Verdict(status, report.reason, confirmed=True)
        return Verdict(status, reason)
    if status is RESTARTING and (report.status is RESTARTING or age <= BEAT_MAY_LAG):
        return Verdict(status, reason)
    return Verdict(RUNNING, "" if status is not RUNNING else reason)


def _judge_absent(status: KernelStatus, reason: str, age: float) -> Verdict:
    if status.is_final or status is PREPARING:
        # The request to start it may not have reached the agent; `end_lost_kernels` ends those
        # whose gateway died.
        return Verdict(status, reason)
    if status is TERMINATING:
        return Verdict(TERMINATED, reason)
    if status is LOST or age > BEAT_MAY_LAG:
        return Verdict(DEAD, "its agent no longer has it")
    return Verdict(status, reason)

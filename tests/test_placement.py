"""Which agent a kernel goes to, what it may use, how its life may go: all from plain values."""

import dataclasses
import itertools

import pytest

from sorna_jupyter.exceptions import InvalidRequest, LimitExceeded
from sorna_jupyter.protocol import ImageState, KernelReport, KernelStatus, Limits, Slots
from sorna_jupyter.registry import Candidate, Policy, pick_agent
from sorna_jupyter.registry.lifecycle import BEAT_MAY_LAG, Verdict, judge, may_move
from sorna_jupyter.registry.placement import settle_limits

GiB = 1 << 30
EMPTY = Candidate("a", Slots(cpus=4, memory=8 * GiB, kernels=10), ImageState.READY)
PREPARING, RUNNING, RESTARTING, LOST, TERMINATING, TERMINATED, DEAD = KernelStatus
OLD, YOUNG = BEAT_MAY_LAG + 1, BEAT_MAY_LAG - 1


def other(agent_id: str, **changes) -> Candidate:
    return dataclasses.replace(EMPTY, agent_id=agent_id, **changes)


# -- placement --------------------------------------------------------------------------------


def test_no_agent_is_picked_when_there_is_none():
    assert pick_agent([], Limits()) is None


@pytest.mark.parametrize(
    ("candidate", "need", "fits"),
    [
        (EMPTY, Limits(), True),
        (EMPTY, Limits(memory=8 * GiB), True),
        (EMPTY, Limits(memory=8 * GiB + 1), False),
        (other("a", used_memory=6 * GiB), Limits(memory=2 * GiB), True),
        (other("a", used_memory=6 * GiB), Limits(memory=2 * GiB + 1), False),
        (other("a", used_kernels=9), Limits(), True),
        (other("a", used_kernels=10), Limits(), False),
        (EMPTY, Limits(cpus=4.0), True),
        (EMPTY, Limits(cpus=4.5), False),
        (EMPTY, Limits(pids=10**6, disk=10**15), True),
    ],
)
def test_a_kernel_fits_where_memory_and_a_place_are_free(candidate, need, fits):
    assert candidate.fits(need) is fits
    assert (pick_agent([candidate], need) is candidate) is fits


def test_the_agent_with_most_free_is_picked():
    busy, idle = other("busy", used_kernels=5), other("idle", used_kernels=1)

    assert pick_agent([busy, idle], Limits()) is idle


def test_agents_of_different_sizes_fill_evenly():
    big = other("big", slots=Slots(cpus=4, memory=80 * GiB, kernels=100), used_kernels=50)
    small = other("small", used_kernels=1)

    assert pick_agent([big, small], Limits()) is small


def test_memory_counts_when_it_runs_out_before_kernels_do():
    full, roomy = other("full", used_memory=7 * GiB), other("roomy", used_kernels=3)

    assert pick_agent([full, roomy], Limits(memory=GiB)) is roomy


def test_an_agent_that_has_the_image_ready_is_preferred_to_an_emptier_one():
    by_state = [
        other("ready", image=ImageState.READY, used_kernels=9),
        other("building", image=ImageState.BUILDING, used_kernels=6),
        other("missing", image=ImageState.MISSING, used_kernels=3),
        other("failed", image=ImageState.FAILED),
    ]

    picked = []
    while by_state:
        picked.append(pick_agent(by_state, Limits()).agent_id)
        by_state.pop(0)

    assert picked == ["ready", "building", "missing", "failed"]


def test_the_order_of_the_agents_does_not_matter():
    agents = [EMPTY, other("b"), other("c", used_kernels=1)]

    picks = {pick_agent(order, Limits()) for order in itertools.permutations(agents)}

    assert len(picks) == 1


# -- limits -----------------------------------------------------------------------------------


def test_limits_are_what_is_asked_else_the_default_else_the_maximum():
    policy = Policy(
        max_limits=Limits(memory=4 * GiB, cpus=2.0, pids=500),
        default_limits=Limits(memory=GiB, cpus=1.0),
    )

    settled = settle_limits(Limits(memory=2 * GiB), policy)

    assert settled == Limits(memory=2 * GiB, cpus=1.0, pids=500, disk=None)


def test_limits_above_the_maximum_are_refused_and_not_cut():
    policy = Policy(max_limits=Limits(memory=GiB))

    with pytest.raises(LimitExceeded, match=f"memory may be at most {GiB}, not {GiB + 1}"):
        settle_limits(Limits(memory=GiB + 1), policy)


@pytest.mark.parametrize("value", [0, -1, 2**63, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["memory", "cpus", "pids", "disk"])
def test_limits_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InvalidRequest, match=name):
        settle_limits(Limits(**{name: value}), Policy())


# -- the life of a kernel ---------------------------------------------------------------------


def test_legal_moves_are_these_and_no_others():
    moves = {(old, new) for old in KernelStatus for new in KernelStatus if may_move(old, new)}

    ends = {
        (old, new)
        for old in (PREPARING, RUNNING, RESTARTING, LOST)
        for new in (TERMINATING, TERMINATED, DEAD)
    }
    assert moves == ends | {
        (PREPARING, RUNNING),
        (RUNNING, RESTARTING),
        (RESTARTING, RUNNING),
        (RUNNING, LOST),
        (RESTARTING, LOST),
        (LOST, RUNNING),
        (TERMINATING, TERMINATED),
        (TERMINATING, DEAD),
    }


def said(status: KernelStatus, reason: str = "") -> KernelReport:
    return KernelReport(kernel_id="k", status=status, reason=reason)


GONE = "its agent no longer has it"


@pytest.mark.parametrize(
    ("status", "age", "report", "verdict"),
    [
        # The agent says nothing of it.
        (PREPARING, OLD, None, Verdict(PREPARING, "was")),
        (RUNNING, YOUNG, None, Verdict(RUNNING, "was")),
        (RUNNING, OLD, None, Verdict(DEAD, GONE)),
        (RESTARTING, YOUNG, None, Verdict(RESTARTING, "was")),
        (RESTARTING, OLD, None, Verdict(DEAD, GONE)),
        (LOST, YOUNG, None, Verdict(DEAD, GONE)),
        (TERMINATING, YOUNG, None, Verdict(TERMINATED, "was")),
        # The agent holds it, and it should not be there.
        (DEAD, OLD, said(RUNNING), Verdict(DEAD, "was", destroy=True)),
        (TERMINATED, YOUNG, said(RUNNING), Verdict(TERMINATED, "was", destroy=True)),
        (TERMINATING, YOUNG, said(RUNNING), Verdict(TERMINATING, "was")),
        (TERMINATING, OLD, said(RUNNING), Verdict(TERMINATING, "was", destroy=True)),
        # The agent starts it.
        (PREPARING, OLD, said(PREPARING, "building"), Verdict(PREPARING, "building", False, True)),
        (PREPARING, YOUNG, said(RUNNING), Verdict(RUNNING)),
        # The agent runs it.
        (RUNNING, YOUNG, said(RUNNING), Verdict(RUNNING, "was")),
        (RUNNING, YOUNG, said(PREPARING), Verdict(RUNNING, "was")),
        (LOST, OLD, said(RUNNING), Verdict(RUNNING)),
        (LOST, OLD, said(RESTARTING), Verdict(RUNNING)),
        (RESTARTING, YOUNG, said(RUNNING), Verdict(RESTARTING, "was")),
        (RESTARTING, OLD, said(RUNNING), Verdict(RUNNING)),
        (RESTARTING, OLD, said(RESTARTING), Verdict(RESTARTING, "was")),
        # The agent says that it is over.
        (RUNNING, YOUNG, said(DEAD, "exit code 1"), Verdict(DEAD, "exit code 1", destroy=True)),
        (PREPARING, YOUNG, said(DEAD, "no image"), Verdict(DEAD, "no image", destroy=True)),
        (LOST, OLD, said(DEAD, "exit code 1"), Verdict(DEAD, "exit code 1", destroy=True)),
        (TERMINATING, OLD, said(DEAD, "exit code 1"), Verdict(TERMINATED, "was", destroy=True)),
    ],
)
def test_a_beat_is_judged(status, age, report, verdict):
    assert judge(status, "was", age, report) == verdict


def test_every_verdict_is_a_legal_move():
    reports = [None, *(said(status) for status in KernelStatus)]
    for status, age, report in itertools.product(KernelStatus, (OLD, YOUNG), reports):
        verdict = judge(status, "", age, report)

        assert verdict.status is status or may_move(status, verdict.status)

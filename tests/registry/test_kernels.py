"""Kernels: who gets which place, and their moves from one status to the next."""

import asyncio

import pytest

from sorna_jupyter.exceptions import (
    IllegalTransition,
    InvalidRequest,
    KernelExists,
    KernelNotFound,
    LimitExceeded,
    NoAgentAvailable,
    NotFound,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import (
    KernelStatus,
    Limits,
)
from sorna_jupyter.registry import (
    KernelRow,
    Policy,
    Registry,
)
from tests.registry.parts import (
    LATER,
    NOW,
    GiB,
    beat,
    reserve,
    run,
    try_reserve,
)

# -- reserving kernels -----------------------------------------------------------------------


async def test_a_reserved_kernel_is_preparing_on_an_agent_with_its_limits_settled(registry):
    policy = Policy(default_limits=Limits(memory=GiB, pids=256))

    reserved = await try_reserve(
        registry, "k1", limits=Limits(cpus=0.5), path="work", idle_timeout=60.0, policy=policy
    )

    row = KernelRow(
        id="k1",
        name="python3",
        owner="ada",
        agent_id="agent-1",
        image="python3",
        status=KernelStatus.PREPARING,
        reason="",
        path="work",
        limits=Limits(memory=GiB, cpus=0.5, pids=256),
        idle_timeout=60.0,
        created_at=NOW,
        ended_at=None,
        idempotency_key=None,
        revision=0,
    )
    assert reserved == (row, True)
    assert await registry.get_kernel("k1") == row


async def test_of_fifty_reservations_at_once_exactly_as_many_succeed_as_the_user_may_have(registry):
    outcomes = await asyncio.gather(
        *(reserve(registry, f"k{n}", policy=Policy(max_kernels=10)) for n in range(50)),
        return_exceptions=True,
    )

    assert sum(isinstance(outcome, KernelRow) for outcome in outcomes) == 10
    assert sum(isinstance(outcome, LimitExceeded) for outcome in outcomes) == 40
    assert len(await registry.list_kernels()) == 10


async def test_two_gateways_never_give_an_agents_last_places_twice(registry, database_url):
    other = Registry(database_url)
    gateways = [registry, other]

    outcomes = await asyncio.gather(
        *(reserve(gateways[n % 2], f"k{n}", owner=("ada", "bob")[n // 2 % 2]) for n in range(40)),
        return_exceptions=True,
    )
    await other.close()

    assert sum(isinstance(outcome, KernelRow) for outcome in outcomes) == 20
    assert sum(isinstance(outcome, NoAgentAvailable) for outcome in outcomes) == 20


async def test_memory_is_reserved_until_the_kernel_is_over(registry):
    await reserve(registry, "k1", limits=Limits(memory=5 * GiB))
    with pytest.raises(NoAgentAvailable):
        await reserve(registry, "k2", limits=Limits(memory=5 * GiB))

    await registry.mark_dead("k1", "out of memory")

    assert (await reserve(registry, "k2", limits=Limits(memory=5 * GiB))).id == "k2"


async def test_the_same_idempotency_key_is_the_same_kernel_also_at_once_and_afterwards(registry):
    outcomes = await asyncio.gather(
        *(try_reserve(registry, f"k{n}", idempotency_key="once") for n in range(8))
    )

    assert len({row.id for row, _ in outcomes}) == 1
    assert sorted(created for _, created in outcomes) == [False] * 7 + [True]

    dead = await registry.mark_dead(outcomes[0][0].id, "exit code 1")

    assert await try_reserve(registry, "k9", idempotency_key="once") == (dead, False)


async def test_an_idempotency_key_is_its_owners_alone(registry):
    await reserve(registry, "k1", owner="ada", idempotency_key="once")

    assert (await reserve(registry, "k2", owner="bob", idempotency_key="once")).id == "k2"


async def test_an_id_is_given_once_also_when_two_ask_at_once(registry):
    outcomes = await asyncio.gather(
        *(reserve(registry, "k1", owner=("ada", "bob")[n % 2]) for n in range(8)),
        return_exceptions=True,
    )

    assert sum(isinstance(outcome, KernelRow) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, KernelExists) for outcome in outcomes) == 7


async def test_limits_above_the_policy_are_refused_and_nothing_is_reserved(registry):
    with pytest.raises(LimitExceeded, match="memory"):
        await reserve(
            registry, limits=Limits(memory=2 * GiB), policy=Policy(max_limits=Limits(memory=GiB))
        )

    assert await registry.list_kernels() == []


async def test_an_unknown_kernelspec_is_refused_and_the_known_are_named(registry):
    with pytest.raises(UnknownKernelspec, match="'perl'; there are: python3"):
        await reserve(registry, name="perl")


async def test_a_kernelspec_of_a_lost_agent_is_known_but_not_available(registry):
    await registry.record_beat(beat(agent_id="agent-2", images=[]), NOW + 60)
    await registry.mark_lost_agents(15.0, NOW + 60)

    with pytest.raises(NoAgentAvailable, match="python3"):
        await reserve(registry)


async def test_without_an_agent_there_is_no_kernel(empty):
    await empty.ensure_user("ada")

    with pytest.raises(NoAgentAvailable, match="No agent is connected"):
        await reserve(empty)


async def test_a_kernel_needs_an_owner_that_exists(registry):
    with pytest.raises(NotFound, match="eve"):
        await reserve(registry, owner="eve")


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "nul\0"},
        {"path": "surrogate\udcff"},
        {"name": "x" * 256},
        {"idempotency_key": "x" * 256},
        {"limits": Limits(memory=2**63)},
    ],
)
async def test_what_no_database_can_hold_is_an_invalid_request(registry, fields):
    with pytest.raises(InvalidRequest):
        await reserve(registry, **fields)


# -- the life of a kernel --------------------------------------------------------------------


async def test_a_kernel_lives_from_preparing_to_terminated(registry):
    await reserve(registry)
    lives = [
        await registry.mark_running("k1"),
        await registry.mark_running("k1"),
        await registry.mark_restarting("k1"),
        await registry.mark_running("k1"),
        await registry.mark_terminating("k1"),
        await registry.mark_terminated("k1", "shut down", now=LATER),
    ]

    assert [row.status.value for row in lives] == [
        "running",
        "running",
        "restarting",
        "running",
        "terminating",
        "terminated",
    ]
    assert (lives[-1].reason, lives[-1].ended_at) == ("shut down", LATER)


async def test_an_illegal_move_is_refused_naming_both_sides(registry):
    await reserve(registry)
    await registry.mark_dead("k1", "exit code 1")

    with pytest.raises(IllegalTransition, match="kernel k1 cannot go from dead to running"):
        await registry.mark_running("k1")


async def test_the_first_end_of_a_kernel_stands(registry):
    await reserve(registry)
    dead = await registry.mark_dead("k1", "exit code 1", now=NOW)

    assert await registry.mark_dead("k1", "something else", now=LATER) == dead
    assert await registry.mark_terminated("k1", "shut down", now=LATER) == dead


async def test_an_end_without_a_reason_takes_the_first_that_is_told(registry):
    await run(registry)
    await registry.mark_terminating("k1")
    await registry.record_beat(beat(), LATER)

    row = await registry.mark_terminated("k1", "idle for 60 s")

    assert (row.status, row.reason) == (KernelStatus.TERMINATED, "idle for 60 s")


async def test_unknown_kernels_are_not_found(registry):
    for asked in (registry.get_kernel("k9"), registry.mark_dead("k9", "why")):
        with pytest.raises(KernelNotFound):
            await asked


async def test_kernels_are_listed_by_owner_and_without_those_that_are_over(registry):
    for n, owner in enumerate(["ada", "ada", "bob"]):
        await reserve(registry, f"k{n}", owner=owner, now=NOW - n)
    await registry.mark_dead("k0", "exit code 1")

    async def ids(**asked):
        return [row.id for row in await registry.list_kernels(**asked)]

    assert await ids() == ["k2", "k1"]
    assert await ids(owner="ada") == ["k1"]
    assert await ids(owner="ada", live_only=False) == ["k1", "k0"]

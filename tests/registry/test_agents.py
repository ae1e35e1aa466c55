"""Agents: what a beat means, and what silence does."""

import asyncio

import pytest

from sorna_jupyter.exceptions import (
    AgentRefused,
    LimitExceeded,
    NotFound,
)
from sorna_jupyter.protocol import (
    ImageState,
    ImageStatus,
    KernelStatus,
    Slots,
)
from sorna_jupyter.registry import (
    AgentRow,
    BeatOutcome,
    Policy,
    SessionRow,
)
from tests.registry.parts import (
    LATER,
    NOW,
    PYTHON,
    GiB,
    beat,
    reserve,
    run,
    said,
    statuses,
)


async def test_a_beat_makes_an_agent_known(registry):
    assert await registry.list_agents() == [
        AgentRow(
            id="agent-1",
            status="alive",
            public_key="key of agent-1",
            addresses=["ipc:///run/relay.sock", "tcp://10.0.0.1:6001"],
            host="host/boot",
            runtime="docker",
            isolation="containers without network",
            slots=Slots(cpus=4.0, memory=8 * GiB, kernels=20),
            last_beat=NOW,
        )
    ]
    assert await registry.list_images() == {"python3": PYTHON}


async def test_a_beat_replaces_what_the_agent_said_before(registry):
    building = ImageStatus(
        name="r", reference="r:1", state=ImageState.BUILDING, spec={}, progress=0.5, message="apt\0"
    )
    await registry.record_beat(beat(addresses=["tcp://10.0.0.2:6001"], images=[building]), LATER)

    agent = await registry.get_agent("agent-1")
    [image] = (await registry.list_images()).values()
    assert (agent.addresses, agent.last_beat) == (["tcp://10.0.0.2:6001"], LATER)
    assert (image.name, image.progress, image.message) == ("r", 0.5, "apt")


async def test_an_unknown_agent_is_not_found(registry):
    with pytest.raises(NotFound, match="agent-9"):
        await registry.get_agent("agent-9")


async def test_a_known_agent_with_another_key_is_refused_and_changes_nothing(registry):
    with pytest.raises(AgentRefused, match="agent-1"):
        await registry.record_beat(beat(public_key="stolen", addresses=["tcp://evil:1"]), LATER)

    assert (await registry.get_agent("agent-1")).addresses[1] == "tcp://10.0.0.1:6001"


async def test_first_beats_of_one_agent_at_several_gateways_are_one_agent(empty):
    await asyncio.gather(*(empty.record_beat(beat(), NOW + n) for n in range(8)))

    assert [agent.last_beat for agent in await empty.list_agents()] == [NOW + 7]


async def test_an_image_is_listed_in_its_best_state_of_all_live_agents(registry):
    missing = ImageStatus(name="python3", reference="x", state=ImageState.MISSING, spec={})
    await registry.record_beat(beat(agent_id="agent-0", images=[missing]), LATER)
    await registry.record_beat(beat(agent_id="agent-2", images=[missing]), LATER)

    assert (await registry.list_images())["python3"] == PYTHON

    await registry.mark_lost_agents(1.0, LATER)

    assert (await registry.list_images())["python3"] == missing


async def test_a_kernel_of_which_the_agent_no_longer_knows_is_dead(registry):
    await run(registry)

    outcome = await registry.record_beat(beat(), LATER)

    [dead] = outcome.changed
    assert (dead.status, dead.reason, dead.ended_at) == (
        KernelStatus.DEAD,
        "its agent no longer has it",
        LATER,
    )
    assert outcome.destroy == []


async def test_a_beat_packed_before_the_kernel_was_there_does_not_kill_it(registry):
    await reserve(registry)
    before = await registry.record_beat(beat(), NOW + 1)
    await registry.mark_running("k1", now=NOW + 2)
    after = await registry.record_beat(beat(), NOW + 3)

    assert before == after == BeatOutcome([], [])
    assert await statuses(registry) == {"k1": ("running", "")}


async def test_kernels_that_nobody_here_knows_are_destroyed(registry):
    await run(registry, "ended")
    await registry.mark_terminated("ended", "shut down")

    outcome = await registry.record_beat(
        beat(said("stranger", "running"), said("ended", "running")), LATER
    )

    assert outcome == BeatOutcome(destroy=["ended", "stranger"], changed=[])


async def test_an_agent_has_no_say_over_the_kernels_of_another(registry):
    await run(registry)

    outcome = await registry.record_beat(beat(said("k1", "dead"), agent_id="agent-2"), LATER)

    assert outcome == BeatOutcome(destroy=["k1"], changed=[])
    assert await statuses(registry) == {"k1": ("running", "")}


async def test_a_death_that_is_reported_keeps_its_reason(registry):
    await run(registry)

    outcome = await registry.record_beat(beat(said("k1", "dead", "killed by SIGSEGV\0")), NOW + 1)

    assert outcome.destroy == ["k1"]
    assert [row.reason for row in outcome.changed] == ["killed by SIGSEGV"]
    assert await statuses(registry) == {"k1": ("dead", "killed by SIGSEGV")}


async def test_the_progress_of_a_start_is_its_reason_until_it_runs(registry):
    await reserve(registry)

    seen = [
        await registry.record_beat(beat(said("k1", "preparing", "building 40 %")), NOW + 1),
        await registry.record_beat(beat(said("k1", "preparing", "building 40 %")), NOW + 2),
        await registry.record_beat(beat(said("k1", "running")), NOW + 3),
    ]

    assert [[(row.status.value, row.reason) for row in outcome.changed] for outcome in seen] == [
        [("preparing", "building 40 %")],
        [],
        [("running", "")],
    ]


async def test_kernels_of_a_silent_agent_are_lost_and_come_back_with_it(registry):
    await run(registry)
    assert await registry.mark_lost_agents(15.0, NOW + 15) == []

    lost = await registry.mark_lost_agents(15.0, NOW + 16)
    again = await registry.mark_lost_agents(15.0, NOW + 17)

    assert [(row.id, row.status.value) for row in lost] == [("k1", "lost")]
    assert again == []
    assert (await registry.get_agent("agent-1")).status == "lost"

    outcome = await registry.record_beat(beat(said("k1", "running")), NOW + 18)

    assert [(row.id, row.status.value, row.reason) for row in outcome.changed] == [
        ("k1", "running", "")
    ]
    assert (await registry.get_agent("agent-1")).status == "alive"


async def test_after_a_pause_of_everything_kernels_are_lost_first_and_not_given_up(registry):
    await run(registry)
    next_day = NOW + 24 * 3600

    lost = await registry.mark_lost_agents(15.0, next_day)
    ended = await registry.end_lost_kernels(300.0, next_day)
    back = await registry.record_beat(beat(said("k1", "running")), next_day + 3)

    assert [row.status.value for row in lost] == ["lost"]
    assert ended == []
    assert [row.status.value for row in back.changed] == ["running"]


async def test_several_gateways_sweep_at_once_and_one_of_them_finds_the_lost(registry):
    await run(registry)

    sweeps = await asyncio.gather(*(registry.mark_lost_agents(15.0, NOW + 60) for _ in range(6)))

    assert sorted(len(lost) for lost in sweeps) == [0, 0, 0, 0, 0, 1]


async def test_a_lost_kernel_keeps_its_place_until_it_is_given_up(registry):
    await run(registry)
    await registry.mark_lost_agents(15.0, NOW + 20)
    assert await registry.end_lost_kernels(300.0, NOW + 320) == []
    with pytest.raises(LimitExceeded):
        await reserve(registry, "k2", policy=Policy(max_kernels=1))

    ended = await registry.end_lost_kernels(300.0, NOW + 321)

    assert [(row.id, row.status.value, row.reason) for row in ended] == [
        ("k1", "dead", "agent lost")
    ]
    assert (await registry.get_agent("agent-1")).status == "gone"


async def test_a_start_whose_gateway_died_is_ended_unless_the_agent_works_on_it(registry):
    await reserve(registry, "abandoned")
    await reserve(registry, "building")
    await registry.record_beat(beat(said("building", "preparing", "40 %")), NOW + 250)

    ended = await registry.end_lost_kernels(300.0, NOW + 301)

    assert [(row.id, row.status.value, row.reason) for row in ended] == [
        ("abandoned", "dead", "its start was abandoned")
    ]
    assert (await registry.get_kernel("building")).status is KernelStatus.PREPARING


async def test_a_stop_whose_gateway_died_is_finished_by_the_agents_next_beats(registry):
    await run(registry)
    await registry.mark_terminating("k1", "idle for 60 s", now=NOW)

    young = await registry.record_beat(beat(said("k1", "running")), NOW + 1)
    old = await registry.record_beat(beat(said("k1", "running")), LATER)
    last = await registry.record_beat(beat(), LATER + 3)

    assert (young.destroy, old.destroy, last.destroy) == ([], ["k1"], [])
    assert await statuses(registry) == {"k1": ("terminated", "idle for 60 s")}


async def test_beats_sweeps_and_reservations_at_once_never_block_each_other_for_good(registry):
    for n in range(10):
        await run(registry, f"old{n}")
    reports = [said(f"old{n}", "running") for n in range(10)]
    work = []
    for n in range(12):
        session = SessionRow(f"s{n}", "a.ipynb", "a", "notebook", f"old{n % 10}", "ada")
        work += [
            registry.record_beat(beat(*reports), NOW + 1),
            registry.mark_lost_agents(15.0, NOW + 1),
            registry.end_lost_kernels(300.0, NOW + 1),
            reserve(registry, f"new{n}", policy=Policy(max_kernels=15)),
            registry.create_session(session),
        ]

    outcomes = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), timeout=60)

    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert {type(error) for error in failed} == {LimitExceeded}
    assert len(await registry.list_kernels()) == 15

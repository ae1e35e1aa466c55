"""The registry on SQLite and PostgreSQL: users, placing kernels, beats, sessions, migrations."""

import asyncio
import logging
import multiprocessing
import sqlite3
import uuid
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text

from sorna_jupyter.exceptions import (
    AgentRefused,
    Conflict,
    IllegalTransition,
    InvalidRequest,
    KernelExists,
    KernelNotFound,
    LimitExceeded,
    NoAgentAvailable,
    NotFound,
    SessionNotFound,
    Unavailable,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import (
    Beat,
    ImageState,
    ImageStatus,
    KernelReport,
    KernelStatus,
    Limits,
    Slots,
)
from sorna_jupyter.registry import (
    AgentRow,
    BeatOutcome,
    KernelRow,
    Policy,
    Registry,
    SessionRow,
    UserRow,
)
from sorna_jupyter.registry.lifecycle import BEAT_MAY_LAG
from sorna_jupyter.registry.models import Base

NOW = 1_700_000_000.0
LATER = NOW + BEAT_MAY_LAG + 1
GiB = 1 << 30

PYTHON = ImageStatus(
    name="python3",
    reference="sorna-kernel-python:1",
    state=ImageState.READY,
    spec={"argv": ["python"], "language": "python"},
    logo=b"\x89PNG\0",
)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request, tmp_path):
    """An empty database of this test's own."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/data/registry.sqlite"
        return
    server = make_url(request.getfixturevalue("postgres_url"))
    name = f"sorna_test_{uuid.uuid4().hex}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name}"))
    admin.dispose()


@pytest.fixture
async def empty(database_url):
    registry = Registry(database_url)
    await registry.upgrade()
    yield registry
    await registry.close()


@pytest.fixture
async def registry(empty):
    """With the users ada and bob, and one agent that has room and the image python3."""
    await empty.ensure_user("ada")
    await empty.ensure_user("bob")
    await empty.record_beat(beat(), NOW)
    return empty


def beat(*reports: KernelReport, agent_id: str = "agent-1", **fields) -> Beat:
    values = dict(
        agent_id=agent_id,
        join_token="join",
        public_key=f"key of {agent_id}",
        addresses=["ipc:///run/relay.sock", "tcp://10.0.0.1:6001"],
        host="host/boot",
        runtime="docker",
        isolation="containers without network",
        slots=Slots(cpus=4.0, memory=8 * GiB, kernels=20),
        images=[PYTHON],
        kernels=list(reports),
    )
    return Beat(**(values | fields))


def said(kernel_id: str, status: str, reason: str = "") -> KernelReport:
    return KernelReport(kernel_id=kernel_id, status=KernelStatus(status), reason=reason)


async def reserve(registry: Registry, kernel_id: str = "k1", **fields) -> KernelRow:
    return (await try_reserve(registry, kernel_id, **fields))[0]


async def try_reserve(registry: Registry, kernel_id: str, **fields) -> tuple[KernelRow, bool]:
    values = dict(
        name="python3",
        owner="ada",
        limits=Limits(),
        path="",
        idle_timeout=None,
        policy=Policy(),
        now=NOW,
    )
    return await registry.reserve_kernel(kernel_id=kernel_id, **(values | fields))


async def run(registry: Registry, kernel_id: str = "k1", **fields) -> KernelRow:
    await reserve(registry, kernel_id, **fields)
    return await registry.mark_running(kernel_id, now=NOW)


async def statuses(registry: Registry) -> dict[str, tuple[str, str]]:
    rows = await registry.list_kernels(live_only=False)
    return {row.id: (row.status.value, row.reason) for row in rows}


# -- users and tokens -------------------------------------------------------------------------


async def test_a_user_is_made_once_and_stays_an_admin(empty):
    await empty.ensure_user("ada", is_admin=True)
    await empty.ensure_user("ada")
    await empty.ensure_user("bob")

    assert await empty.list_users() == [UserRow("ada", True), UserRow("bob", False)]
    assert await empty.find_user("ada") == UserRow("ada", True)
    assert await empty.find_user("eve") is None


async def test_a_user_made_by_many_at_once_is_one_user(empty):
    rows = await asyncio.gather(*(empty.ensure_user("ada") for _ in range(16)))

    assert set(rows) == {UserRow("ada", False)}
    assert await empty.list_users() == [UserRow("ada", False)]


async def test_a_token_tells_its_user_until_it_is_revoked(registry):
    token = await registry.create_token("ada", "laptop")
    [row] = await registry.list_tokens("ada")

    assert token.startswith("sorna_") and len(token) > 40
    assert (row.user_name, row.label) == ("ada", "laptop")
    assert await registry.user_of_token(token) == UserRow("ada", False)

    await registry.revoke_token(row.id)

    assert await registry.user_of_token(token) is None
    assert await registry.list_tokens() == []
    with pytest.raises(NotFound):
        await registry.revoke_token(row.id)


@pytest.mark.parametrize("token", ["", "sorna_x", "nul \0", "surrogate \udcff"])
async def test_a_wrong_token_is_nobodys(registry, token):
    assert await registry.user_of_token(token) is None


async def test_a_token_stands_nowhere_in_the_database(tmp_path):
    registry = Registry(f"sqlite:///{tmp_path}/registry.sqlite")
    await registry.upgrade()
    await registry.ensure_user("ada")

    token = await registry.create_token("ada")
    await registry.close()

    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token.removeprefix("sorna_").encode() not in stored


async def test_a_tokens_label_is_text(registry):
    with pytest.raises(InvalidRequest, match="label"):
        await registry.create_token("ada", "nul\0")


async def test_nobody_gets_a_token_without_being_a_user(registry):
    with pytest.raises(NotFound, match="eve"):
        await registry.create_token("eve")


# -- reserving kernels ------------------------------------------------------------------------


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


# -- the life of a kernel ---------------------------------------------------------------------


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


# -- agents and their beats -------------------------------------------------------------------


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


# -- sessions ---------------------------------------------------------------------------------

NOTEBOOK = SessionRow("s1", "work/a.ipynb", "a.ipynb", "notebook", "k1", "ada")


async def test_a_session_is_found_by_whatever_is_known_of_it(registry):
    await run(registry)
    await registry.create_session(NOTEBOOK)

    for asked in (
        {"id": "s1"},
        {"path": "work/a.ipynb", "type": "notebook"},
        {"kernel_id": "k1", "owner": "ada"},
        {"name": "a.ipynb"},
    ):
        assert await registry.get_session(**asked) == NOTEBOOK
    with pytest.raises(SessionNotFound):
        await registry.get_session(id="s1", owner="bob")
    assert await registry.list_sessions("ada") == await registry.list_sessions() == [NOTEBOOK]
    assert await registry.list_sessions("bob") == []


async def test_a_session_is_renamed_and_changes_its_kernel(registry):
    await run(registry, "k1")
    await run(registry, "k2")
    await registry.create_session(NOTEBOOK)

    changed = await registry.update_session("s1", path="b.ipynb", kernel_id="k2")

    assert changed == replace(NOTEBOOK, path="b.ipynb", kernel_id="k2")
    assert await registry.get_session(id="s1") == changed


async def test_a_deleted_session_is_not_found(registry):
    await run(registry)
    await registry.create_session(NOTEBOOK)

    await registry.delete_session("s1")

    for asked in (
        registry.get_session(id="s1"),
        registry.delete_session("s1"),
        registry.update_session("s1", path="x"),
    ):
        with pytest.raises(SessionNotFound):
            await asked


async def test_sessions_vanish_with_their_kernel_however_it_ends(registry):
    for n in range(3):
        await run(registry, f"k{n}")
        await registry.create_session(replace(NOTEBOOK, id=f"s{n}", kernel_id=f"k{n}"))

    await registry.mark_dead("k0", "exit code 1")
    await registry.record_beat(beat(said("k1", "dead"), said("k2", "running")), NOW + 1)

    assert [session.id for session in await registry.list_sessions()] == ["s2"]


async def test_a_session_needs_a_kernel_that_lives(registry):
    with pytest.raises(KernelNotFound):
        await registry.create_session(NOTEBOOK)

    await run(registry)
    await registry.mark_dead("k1", "exit code 1")

    with pytest.raises(KernelNotFound, match="exit code 1"):
        await registry.create_session(NOTEBOOK)


async def test_a_session_id_is_given_once(registry):
    await run(registry)
    await registry.create_session(NOTEBOOK)

    with pytest.raises(Conflict, match="s1"):
        await registry.create_session(NOTEBOOK)


async def test_a_session_refuses_what_is_no_text(registry):
    await run(registry)
    await registry.create_session(NOTEBOOK)

    for path in ("nul\0", "surrogate\udcff", 3):
        with pytest.raises(InvalidRequest, match="path"):
            await registry.update_session("s1", path=path)


# -- the database itself ----------------------------------------------------------------------


async def test_upgrading_again_changes_nothing_and_loses_nothing(registry):
    await run(registry)
    before = await registry.list_kernels()

    await registry.upgrade()

    assert await registry.list_kernels() == before


async def test_kernels_of_the_first_tables_live_on_in_the_newest(database_url):
    registry = Registry(database_url)
    await registry.upgrade("0001")
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO users (name, is_admin) VALUES ('ada', false)"))
        connection.execute(
            text(
                "INSERT INTO agents (id, status, public_key, addresses, host, runtime, isolation,"
                " cpus, memory, kernels, last_beat)"
                " VALUES ('a1', 'alive', 'key', '[]', 'here', 'docker', 'well', 4, 1000, 9, 0)"
            )
        )
        connection.execute(
            text(
                "INSERT INTO kernels (id, name, owner, agent_id, image, status, reason, path,"
                " created_at, confirmed_at)"
                " VALUES ('k1', 'python3', 'ada', 'a1', 'python3', 'running', '', '', 1, 1)"
            )
        )
    engine.dispose()

    await registry.upgrade()
    [kernel] = await registry.list_kernels()
    restarting = await registry.mark_restarting("k1")
    await registry.close()

    assert (kernel.status, kernel.revision) == (KernelStatus.RUNNING, 0)
    assert (restarting.status, restarting.revision) == (KernelStatus.RESTARTING, 1)


async def test_migrations_make_exactly_the_tables_of_the_models(empty, database_url):
    engine = create_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, Base.metadata)
    engine.dispose()

    assert differences == []


async def test_migrations_leave_logging_as_it_is(database_url):
    before = logging.root.level, list(logging.root.handlers)
    mine = logging.getLogger("sorna_jupyter.test")

    registry = Registry(database_url)
    await registry.upgrade()
    await registry.close()

    assert (logging.root.level, list(logging.root.handlers)) == before
    assert not mine.disabled


def upgrade_when_all_are_ready(url: str, barrier) -> None:
    async def upgrade() -> None:
        registry = Registry(url)
        await registry.upgrade()
        await registry.ensure_user("ada")
        await registry.close()

    barrier.wait(60)
    asyncio.run(upgrade())


def test_several_processes_may_upgrade_an_empty_database_at_once(database_url):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    processes = [
        spawn.Process(target=upgrade_when_all_are_ready, args=(database_url, barrier))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)

    assert [process.exitcode for process in processes] == [0, 0, 0]


async def test_the_file_of_the_registry_is_its_owners_alone(tmp_path):
    path = tmp_path / "data" / "registry.sqlite"
    path.parent.mkdir()
    path.touch(0o644)

    registry = Registry(f"sqlite:///{path}")
    await registry.upgrade()
    await registry.ensure_user("ada")
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    await registry.close()

    assert "registry.sqlite" in modes
    assert set(modes.values()) == {0o600}


async def test_foreign_keys_hold_in_sqlite_too(tmp_path):
    registry = Registry(f"sqlite:///{tmp_path}/registry.sqlite")
    await registry.upgrade()
    await registry.ensure_user("ada")
    await registry.record_beat(beat(), NOW)
    await reserve(registry)

    def forget_the_user() -> None:
        with registry._writer.begin() as connection:
            connection.exec_driver_sql("DELETE FROM users")

    with pytest.raises(Exception, match="FOREIGN KEY"):
        await registry._in_thread(forget_the_user)
    await registry.close()


async def test_a_database_in_memory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="file"):
        Registry("sqlite://")


async def test_a_database_that_is_away_makes_the_call_unavailable():
    registry = Registry("postgresql+psycopg2://nobody@127.0.0.1:1/none")

    with pytest.raises(Unavailable):
        await registry.list_users()
    await registry.close()


async def test_a_locked_registry_is_waited_for_and_read_meanwhile(tmp_path):
    path = tmp_path / "registry.sqlite"
    registry = Registry(f"sqlite:///{path}")
    await registry.upgrade()
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")

    waiting = asyncio.ensure_future(registry.ensure_user("ada"))
    assert await registry.list_users() == []
    assert not waiting.done()
    writer.execute("COMMIT")
    await waiting

    assert await registry.list_users() == [UserRow("ada", False)]
    writer.close()
    await registry.close()

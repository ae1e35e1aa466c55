"""Migrations, and databases that are away, locked, or someone else's."""

import asyncio
import logging
import multiprocessing
import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from sorna_jupyter.exceptions import (
    Unavailable,
)
from sorna_jupyter.protocol import (
    KernelStatus,
)
from sorna_jupyter.registry import (
    Registry,
    UserRow,
)
from sorna_jupyter.registry.models import Base
from tests.registry.parts import (
    NOW,
    beat,
    reserve,
    run,
)


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

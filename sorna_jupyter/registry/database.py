"""The registry's database: its engine, its transactions, its migrations.

Every transaction runs in a thread of a small pool, so the event loop never waits for SQL. Used
by `registry.registry` only.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sqlite3
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, exc, make_url, text
from sqlalchemy.orm import Session

from sorna_jupyter.exceptions import Unavailable

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", bound="Database")

_UPGRADE_LOCK = 0x50_12_4A
"""PostgreSQL advisory lock that upgrades take; any number that nobody else uses"""

_ATTEMPTS = 5

_COLLISIONS = {"23505": "unique_violation", "40001": "serialization", "40P01": "deadlock"}


class Database:
    """Base of `Registry`: `@reading` and `@writing` methods become one transaction each."""

    def __init__(self, url: str, threads: int = 8) -> None:
        """`sqlite:///path` or `postgresql+psycopg2://…`; opens nothing yet."""
        self._engine = _sqlite(url, threads) if url.startswith("sqlite") else _server(url, threads)
        # SQLite lets one write at a time; to take that right at BEGIN, not at the first write,
        # is what makes "look, decide, write" safe there.
        self._writer = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="registry")

    async def upgrade(self, revision: str = "head") -> None:
        """Create or migrate the tables. Safe to repeat, and from several processes at once."""
        await self._in_thread(lambda: self._upgrade(revision))

    async def close(self) -> None:
        """Finish what runs, then close all connections."""
        await asyncio.to_thread(self._threads.shutdown)
        self._engine.dispose()

    async def _in_thread(self, work: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            log.warning("the registry's database does not answer: %s", error)
            raise Unavailable("The registry's database does not answer") from error

    def _transact(self, engine: Engine, work: Callable[[Session], R]) -> R:
        """Run `work` in one transaction, again if another one came between."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with Session(engine) as db, db.begin():
                    return work(db)
            except (exc.IntegrityError, exc.OperationalError) as error:
                # Someone else inserted the same key first, or PostgreSQL broke a deadlock: the
                # next look sees what they did.
                if attempt == _ATTEMPTS or not _is_collision(error):
                    raise
        raise AssertionError("unreachable")

    def _upgrade(self, revision: str) -> None:
        if self._engine.dialect.name == "sqlite":
            _make_private(Path(self._engine.url.database or ""))
            with closing(self._engine.raw_connection()) as raw:
                # Lasts in the file; not possible in a transaction. Readers then never wait for
                # the writer.
                raw.cursor().execute("PRAGMA journal_mode=WAL")
        with self._writer.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _UPGRADE_LOCK})
            config = Config()
            config.set_main_option("script_location", "sorna_jupyter.registry:migrations")
            config.attributes["connection"] = connection
            command.upgrade(config, revision)


def reading(
    work: Callable[Concatenate[D, Session, P], R],
) -> Callable[Concatenate[D, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of one that reads in one transaction."""

    @functools.wraps(work)
    async def method(self: D, /, *args: P.args, **kwargs: P.kwargs) -> R:
        def run() -> R:
            return self._transact(self._engine, lambda db: work(self, db, *args, **kwargs))

        return await self._in_thread(run)

    return method


def writing(
    work: Callable[Concatenate[D, Session, P], R],
) -> Callable[Concatenate[D, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of one that writes in one transaction; it may run several times.

    A cancelled caller does not undo it: what was asked for may still happen.
    """

    @functools.wraps(work)
    async def method(self: D, /, *args: P.args, **kwargs: P.kwargs) -> R:
        def run() -> R:
            return self._transact(self._writer, lambda db: work(self, db, *args, **kwargs))

        return await self._in_thread(run)

    return method


def _sqlite(url: str, threads: int) -> Engine:
    if make_url(url).database in (None, "", ":memory:"):
        raise ValueError("the registry needs a file: several connections share it")
    engine = create_engine(url, pool_size=threads, connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN would come too late
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=NORMAL")  # safe with WAL against all but power cuts

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _server(url: str, threads: int) -> Engine:
    return create_engine(
        url,
        pool_size=threads,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            "application_name": "sorna",
            "options": "-c statement_timeout=30000",
        },
    )


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        # Not opened: closing it would drop the locks that this process holds on it.
        path.chmod(0o600)  # SQLite gives -wal and -shm the same mode


def _is_collision(error: exc.DBAPIError) -> bool:
    state = getattr(error.orig, "pgcode", None)
    return state in _COLLISIONS

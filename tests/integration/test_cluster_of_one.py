"""The same gateway with PostgreSQL and Redis in place of SQLite and memory."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.gateways import Gateway, wait_until


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """The URL of a database of this test's own."""
    name = f"sorna_{uuid.uuid4().hex[:8]}"
    server = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


def test_a_gateway_on_postgresql_and_redis_serves_kernels(
    new_gateway: Callable[..., Gateway], database: str, redis_url: str
) -> None:
    gateway = new_gateway(
        "--runtime=local",
        f"--SornaApp.database_url={database}",
        f"--SornaApp.redis_url={redis_url}",
    )

    run = gateway.post("/api/run", json={"name": "python3", "code": "print(6 * 7)"}).json()

    assert run["status"] == "ok"
    assert run["outputs"][0]["text"] == "42\n"
    assert not (gateway.data_dir / "registry.sqlite").exists()
    engine = create_engine(database)

    def rows() -> list[tuple[str, str]]:
        with engine.connect() as connection:
            return [tuple(r) for r in connection.execute(text("SELECT status, name FROM kernels"))]

    # The answer does not wait for the kernel's removal.
    wait_until(lambda: rows() == [("terminated", "python3")], "the kernel is over")
    engine.dispose()

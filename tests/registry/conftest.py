"""A registry on SQLite and one on PostgreSQL, each in an empty database of its own."""

import uuid

import pytest
from sqlalchemy import create_engine, make_url, text

from sorna_jupyter.registry import (
    Registry,
)
from tests.registry.parts import NOW, beat


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

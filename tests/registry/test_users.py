"""Users and their tokens."""

import asyncio

import pytest

from sorna_jupyter.exceptions import (
    InvalidRequest,
    NotFound,
)
from sorna_jupyter.registry import (
    Registry,
    UserRow,
)


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

"""Jupyter's sessions, which come and go with their kernels."""

from dataclasses import replace

import pytest

from sorna_jupyter.exceptions import (
    Conflict,
    InvalidRequest,
    KernelNotFound,
    SessionNotFound,
)
from sorna_jupyter.registry import (
    SessionRow,
)
from tests.registry.parts import NOW, beat, run, said

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

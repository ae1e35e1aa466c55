"""Our REST in a whole jupyter_server, with one kernel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sorna_jupyter.faces import rest
from sorna_jupyter.runs import Runs
from tests.jupyter_app import running_app
from tests.rest.parts import RestApp, Words


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[RestApp]:
    async with running_app(tmp_path) as app:
        runs = Runs(app.kernels, answer_timeout=0.2)
        app.server.web_app.settings["sorna_runs"] = runs
        app.server.web_app.add_handlers(".*$", rest.handlers())
        kernel_id = await app.start_kernel()
        runs._session(app.kernels.get(kernel_id))
        words = Words(app.agents.attached[-1])
        serving = asyncio.create_task(words.serve())
        yield RestApp(app, kernel_id, words)
        await runs.close()
        serving.cancel()

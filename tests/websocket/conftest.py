"""A server with one kernel, which the tests play, and a socket in each framing."""

import pytest

from tests.jupyter_app import running_app
from tests.websocket.parts import FRAMINGS


@pytest.fixture
async def app(tmp_path):
    async with running_app(tmp_path) as app:
        yield app


@pytest.fixture
async def kernel_id(app):
    return await app.start_kernel()


@pytest.fixture(params=FRAMINGS)
async def socket(app, kernel_id, request):
    """One in each framing."""
    return await app.socket(kernel_id, *request.param)

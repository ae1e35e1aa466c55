"""`Runs` on a kernel that the test plays."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sorna_jupyter.runs import Runs
from tests.runs.parts import PlayedKernels


@pytest.fixture
def kernels() -> PlayedKernels:
    return PlayedKernels()


@pytest.fixture
async def runs(kernels: PlayedKernels) -> AsyncIterator[Runs]:
    runs = Runs(kernels, interrupt_grace=30, answer_timeout=30)  # type: ignore[arg-type]  # played
    yield runs
    await runs.close()

"""A journal's directory, or none: then it lives in memory."""

from pathlib import Path

import pytest


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "kernel" if request.param == "disk" else None

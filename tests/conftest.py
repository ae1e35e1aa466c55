"""Fixtures that every test may use: what `scripts/test` started, free ports, running gateways.

Without `scripts/test` the tests that need PostgreSQL, Redis, Docker or a browser are skipped,
and say so; under CI nothing may be skipped for want of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disks import small_disk
from tests.gateways import Gateway

HERE = Path(__file__).parent


NEEDS = {
    "docker": {"docker_engine", "base_image", "docker_gateway"},
    "postgres": {"postgres_url"},
    "redis": {"redis_url"},
    "browser": {"browser"},
}
"""What each marker means: the test asks for one of these fixtures."""


def pytest_configure() -> None:
    # A shell's background job is started with Ctrl-C ignored, and so would be what tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: unit, integration, acceptance. Mark what needs more than Python."""
    for item in items:
        for mark, fixtures in NEEDS.items():
            if fixtures.intersection(getattr(item, "fixturenames", ())):
                item.add_marker(mark)
    items.sort(key=_slowness)


def _slowness(item: pytest.Item) -> int:
    folder = item.path.relative_to(HERE).parts[0]
    return {"integration": 1, "acceptance": 2}.get(folder, 0)


def _needed(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what}: scripts/test should have started it")
    pytest.skip(f"{what}; scripts/test starts one")


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        yield disk


@pytest.fixture(scope="session")
def docker_engine() -> str:
    """The version of the Docker engine that answers."""
    if shutil.which("docker"):
        asked = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    _needed("no Docker engine answers")
    raise AssertionError


@pytest.fixture(scope="session")
def base_image(docker_engine: str) -> str:
    """The image that kernel images are built on."""
    name = os.environ.get("SORNA_BASE_IMAGE")
    if not name:
        _needed("SORNA_BASE_IMAGE names no base image")
    return str(name)


@pytest.fixture(scope="session")
def postgres_url() -> str:
    if "SORNA_TEST_POSTGRES" not in os.environ:
        _needed("no PostgreSQL in SORNA_TEST_POSTGRES")
    return os.environ["SORNA_TEST_POSTGRES"]


@pytest.fixture(scope="session")
def redis_url() -> str:
    if "SORNA_TEST_REDIS" not in os.environ:
        _needed("no Redis in SORNA_TEST_REDIS")
    return os.environ["SORNA_TEST_REDIS"]


@pytest.fixture
def new_gateway() -> Iterator[Callable[..., Gateway]]:
    """Starts gateways of this test's own; whatever still runs at its end is stopped."""
    started: list[Gateway] = []

    def start(*args: str, **options: object) -> Gateway:
        gateway = Gateway.start(*args, **options)  # type: ignore[arg-type]
        started.append(gateway)
        return gateway

    yield start
    for gateway in reversed(started):
        gateway.dispose()


@pytest.fixture(scope="session")
def local_gateway() -> Iterator[Gateway]:
    """One gateway with the `local` runtime for all tests that leave it as they found it."""
    gateway = Gateway.start("--runtime=local")
    yield gateway
    gateway.dispose()


@pytest.fixture(scope="session")
def docker_gateway(base_image: str) -> Iterator[Gateway]:
    """One gateway with Docker kernels for all tests that leave it as they found it."""
    gateway = Gateway.start("--runtime=docker")
    gateway.wait_for_image("python3")
    yield gateway
    gateway.dispose()

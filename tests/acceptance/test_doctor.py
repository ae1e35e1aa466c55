"""`jupyter sorna doctor` says what is found, what is missing and what to type."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateways import Gateway, Home


@pytest.fixture
def home() -> Iterator[Home]:
    home = Home()
    yield home
    assert home.leftovers() == {}
    home.remove()


def test_with_an_engine_all_is_well(home: Home, docker_engine: str) -> None:
    told = home.run("jupyter", "sorna", "doctor")

    assert told.returncode == 0, told.stderr
    assert "docker" in told.stdout
    assert docker_engine.split("+")[0] in told.stdout or "container" in told.stdout
    assert "jupyter sorna" in told.stdout


def test_without_an_engine_it_says_how_kernels_are_isolated_and_how_to_get_docker(
    home: Home,
) -> None:
    told = home.run("jupyter", "sorna", "doctor", env={"DOCKER_HOST": f"unix://{home.root}/no"})

    assert told.returncode == 0, told.stderr
    assert "local runtime" in told.stdout
    assert "→" in told.stdout
    assert "docker" in told.stdout
    assert "Traceback" not in told.stdout + told.stderr


def test_it_finds_the_running_gateway(local_gateway: Gateway) -> None:
    told = local_gateway.home.run("jupyter", "sorna", "doctor")

    assert told.returncode == 0, told.stderr
    assert local_gateway.url in told.stdout
    assert local_gateway.token not in told.stdout


def test_a_data_directory_that_cannot_be_used_is_told(home: Home) -> None:
    (home.root / "file").write_text("")

    told = home.run("jupyter", "sorna", "doctor", env={"JUPYTER_DATA_DIR": f"{home.root}/file"})

    assert told.returncode == 1, told.stdout
    assert str(home.root) in told.stdout
    assert "Traceback" not in told.stdout + told.stderr

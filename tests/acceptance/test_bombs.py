"""Code that wants the whole machine gets its kernel's share; the neighbour hardly notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.gateways import Gateway, wait_until

PATIENCE = 10.0
"""seconds within which the neighbour must always be answered"""
LIMITS = {"memory": 256 << 20, "pids": 128, "disk": 64 << 20, "cpus": 1}

SHELL_BOMB = "import subprocess; subprocess.run(['sh', '-c', 'b(){ b|b& };b'], timeout=20)"
PYTHON_BOMB = """
import subprocess
sleepers = []
try:
    for _ in range(10_000):
        sleepers.append(subprocess.Popen(['sleep', '60']))
except OSError as error:
    print('stopped:', type(error).__name__, len(sleepers) < 128)
for sleeper in sleepers:
    sleeper.kill()
    sleeper.wait()
"""
MEMORY_BOMB = "hoard = []\nwhile True: hoard.append(bytearray(b'x' * (16 << 20)))"
DISK_BOMB = """
import errno, os, pathlib
for place in [pathlib.Path.home(), pathlib.Path('/tmp')]:
    try:
        with (place / 'full').open('wb') as file:
            for _ in range(1024):
                file.write(b'x' * (1 << 20))
    except OSError as error:
        size = (place / 'full').stat().st_size
        # no space left, or the file is larger than any may be
        print('full:', error.errno in (errno.ENOSPC, errno.EFBIG), 32 << 20 < size <= 64 << 20)
    os.unlink(place / 'full')
for place in ['/', '/usr', '/etc', '/var/tmp']:
    try:
        pathlib.Path(place, 'full').write_bytes(b'x')
    except OSError as error:
        print(place, errno.errorcode[error.errno])
"""


@pytest.fixture
def bomb(docker_gateway: Gateway) -> Iterator[str]:
    """The kernel that the bomb goes off in; afterwards it can be removed, whatever it does."""
    kernel_id = docker_gateway.start_kernel(name="python3", limits=LIMITS)
    docker_gateway.execute(kernel_id, "1")
    before = len(docker_gateway.home.containers())
    yield kernel_id
    docker_gateway.stop_kernel(kernel_id)
    wait_until(lambda: len(docker_gateway.home.containers()) < before, "its container is gone", 60)


@pytest.fixture(autouse=True)
def neighbour(docker_gateway: Gateway, docker_kernel: str) -> Iterator[None]:
    """Another kernel, which is asked all the time and must always answer."""
    docker_gateway.execute(docker_kernel, "n = 0")
    slowest = 0.0
    answers: list[str] = []
    over = threading.Event()

    def ask() -> None:
        nonlocal slowest
        while not over.wait(0.1):
            asked = time.monotonic()
            answers.append(docker_gateway.text(docker_kernel, "n += 1; print(n)"))
            slowest = max(slowest, time.monotonic() - asked)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    over.set()
    thread.join(60)
    assert answers == [f"{n}\n" for n in range(1, len(answers) + 1)]
    assert len(answers) > 1
    assert slowest < PATIENCE


def reason_of_death(gateway: Gateway, kernel_id: str) -> str:
    def gone() -> str | None:
        response = gateway.get(f"/api/kernels/{kernel_id}")
        if response.status_code == 404 or response.json()["execution_state"] == "dead":
            return response.text
        return None

    reason: str = wait_until(gone, "the kernel is dead", 60)
    return reason


def test_a_fork_bomb_in_the_shell_is_contained(docker_gateway: Gateway, bomb: str) -> None:
    docker_gateway.post(f"/api/kernels/{bomb}/execute", {"code": SHELL_BOMB, "timeout": 30})

    answer = docker_gateway.post(
        f"/api/kernels/{bomb}/execute", {"code": "print(6 * 7)", "timeout": 20}
    )

    if answer.status_code == 200 and answer.json()["status"] != "lost":
        assert answer.json()["status"] in ("ok", "error", "timeout"), answer.text
    else:
        assert len(reason_of_death(docker_gateway, bomb)) > len(bomb)


def test_a_fork_bomb_in_python_is_stopped_at_the_limit(docker_gateway: Gateway, bomb: str) -> None:
    assert docker_gateway.text(bomb, PYTHON_BOMB) == "stopped: BlockingIOError True\n"
    assert docker_gateway.text(bomb, "print('alive')") == "alive\n"


def test_a_memory_bomb_kills_its_kernel_and_says_why(docker_gateway: Gateway, bomb: str) -> None:
    result = docker_gateway.execute(bomb, MEMORY_BOMB, timeout=120)

    assert result["status"] == "lost", result
    reason = reason_of_death(docker_gateway, bomb)
    assert "out of memory" in reason
    assert "256" in reason


def test_a_full_disk_is_an_error_in_its_kernel_only(docker_gateway: Gateway, bomb: str) -> None:
    printed = docker_gateway.text(bomb, DISK_BOMB)

    assert printed.splitlines() == [
        "full: True True",
        "full: True True",
        "/ EROFS",
        "/usr EROFS",
        "/etc EROFS",
        "/var/tmp EROFS",
    ]
    assert docker_gateway.text(bomb, "print('alive')") == "alive\n"

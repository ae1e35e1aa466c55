"""What the acceptance tests share: a browser, a user's machine with remote kernelspecs, people."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tests.gateways import Gateway, Home

CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1100",
)


@pytest.fixture
def new_browser(tmp_path: Path) -> Iterator[Callable[[], webdriver.Chrome]]:
    """Starts Debian's Chromium without a window, each with a profile of its own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("CI"):
            pytest.fail("Chromium: scripts/test should have installed it")
        pytest.skip("no Chromium; scripts/test installs it")
    started: list[webdriver.Chrome] = []

    def start() -> webdriver.Chrome:
        options = Options()
        options.binary_location = chromium
        profile = tmp_path / f"profile-{len(started)}"
        for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        started.append(webdriver.Chrome(options=options, service=Service(driver)))
        return started[-1]

    yield start
    for chrome in started:
        if chrome.service.process.poll() is None:  # else the test has quit it
            chrome.quit()


@pytest.fixture
def browser(
    new_browser: Callable[[], webdriver.Chrome], tmp_path: Path
) -> Iterator[webdriver.Chrome]:
    chrome = new_browser()
    yield chrome
    # What a failed test was looking at.
    chrome.save_screenshot(str(tmp_path / "at-the-end.png"))


@dataclass
class RemoteKernels:
    """A user's machine where a server's kernelspec is installed, by `jupyter sorna` itself."""

    home: Home
    kernel_name: str


def install_kernelspecs(gateway: Gateway, home: Home) -> RemoteKernels:
    login = home.run("jupyter", "sorna", "login", gateway.url, input=gateway.token + "\n")
    assert login.returncode == 0, login.stderr
    installed = home.run("jupyter", "sorna", "kernelspec", "install", "python3", "--user")
    assert installed.returncode == 0, installed.stderr
    return RemoteKernels(home, installed.stdout.split(":")[0].strip())


@pytest.fixture(scope="session")
def remote_kernels(docker_gateway: Gateway) -> Iterator[RemoteKernels]:
    home = Home()
    yield install_kernelspecs(docker_gateway, home)
    home.remove()


@pytest.fixture(scope="session")
def new_user(docker_gateway: Gateway) -> Callable[[str], str]:
    """Makes a user of the shared gateway who is no admin; returns their token."""

    def make(name: str) -> str:
        response = docker_gateway.post("/sorna/tokens", {"user": name})
        assert response.status_code == 201, response.text
        token: str = response.json()["token"]
        return token

    return make


@pytest.fixture
def docker_kernel(docker_gateway: Gateway) -> Iterator[str]:
    """The id of a fresh Docker kernel, gone afterwards."""
    kernel_id = docker_gateway.start_kernel(name="python3")
    yield kernel_id
    docker_gateway.stop_kernel(kernel_id)

"""The README, followed to the letter in a clean Debian 12 root, ends with a kernel that answers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.gateways import docker

TEST_FRESH = Path(__file__).parents[2] / "scripts/test-fresh"


@pytest.mark.timeout(900)
def test_command_one_works_on_a_machine_with_python_git_and_certificates(base_image: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a Debian root")
    if os.environ.get("SORNA_IN_TEST_FRESH"):
        pytest.skip("this is that machine")

    followed = subprocess.run(
        [TEST_FRESH], capture_output=True, text=True, timeout=840, stdin=subprocess.DEVNULL
    )

    assert followed.returncode == 0, followed.stdout[-3000:] + followed.stderr[-6000:]
    assert "a kernel answered: 42 3" in followed.stderr
    assert followed.stderr.splitlines()[-1] == "test-fresh: passed"
    [agent_id] = re.findall(r"^test-fresh: agent (\S+)$", followed.stderr, re.MULTILINE)
    assert docker("ps", "-aq", "--filter", f"label=sorna.agent-id={agent_id}") == ""

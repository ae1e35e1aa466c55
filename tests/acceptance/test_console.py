"""`jupyter console` on an installed remote kernelspec, typed into through a pty."""

from __future__ import annotations

from collections.abc import Iterator

import pexpect
import pytest

from tests.acceptance.conftest import RemoteKernels
from tests.gateways import Gateway, command, wait_until


@pytest.fixture
def console(remote_kernels: RemoteKernels) -> Iterator[pexpect.spawn]:
    process = pexpect.spawn(
        command("jupyter"),
        ["console", "--kernel", remote_kernels.kernel_name, "--simple-prompt"],
        env=remote_kernels.home.env | {"TERM": "dumb"},
        cwd=str(remote_kernels.home.work),
        encoding="utf-8",
        timeout=60,
        echo=False,
    )
    process.expect(r"In \[1\]:")
    yield process
    process.close(force=True)


def test_output_input_and_ctrl_c(console: pexpect.spawn) -> None:
    console.sendline("print('hello', 6 * 7)")
    console.expect("hello 42")

    console.expect(r"In \[2\]:")
    console.sendline("name = input('who? ')")
    console.expect_exact("who? ")
    console.sendline("Ada")
    console.expect(r"In \[3\]:")
    console.sendline("name")
    console.expect(r"Out\[3\]: 'Ada'")

    console.expect(r"In \[4\]:")
    console.sendline("import time; print('sleeping'); time.sleep(600)")
    console.expect("sleeping\r\n")
    console.sendintr()
    console.expect("KeyboardInterrupt")

    console.expect(r"In \[5\]:")
    console.sendline("print('still', name)")
    console.expect("still Ada")


def test_the_remote_kernel_goes_with_the_console(
    console: pexpect.spawn, docker_gateway: Gateway
) -> None:
    console.sendline("import os; print('pid', os.getpid())")
    console.expect(r"pid \d+")
    before = {kernel["id"] for kernel in docker_gateway.get("/api/kernels").json()}
    assert before

    console.expect(r"In \[2\]:")
    console.sendline("exit")
    console.expect(pexpect.EOF)

    def gone() -> bool:
        now = {kernel["id"] for kernel in docker_gateway.get("/api/kernels").json()}
        return len(now) < len(before)

    wait_until(gone, "the console's remote kernel is stopped", 30)

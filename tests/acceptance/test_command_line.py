"""The subcommands as people type them, against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import requests

from tests.gateways import Gateway


@pytest.fixture
def gateway(local_gateway: Gateway) -> Iterator[Gateway]:
    yield local_gateway
    local_gateway.home.run("jupyter", "sorna", "stop", "--all")


def sorna(gateway: Gateway, *arguments: str, **options: object) -> tuple[int, str, str]:
    done = gateway.home.run("jupyter", "sorna", *arguments, **options)
    return done.returncode, done.stdout, done.stderr


def new_kernel(gateway: Gateway) -> str:
    return str(gateway.post("/api/kernels").json()["id"])


def test_ps_stop_and_logs_take_the_beginning_of_an_id(gateway: Gateway) -> None:
    kernel_id = new_kernel(gateway)

    _, listed, _ = sorna(gateway, "ps")
    _, ids, _ = sorna(gateway, "ps", "-q")
    logs_status, _, _ = sorna(gateway, "logs", kernel_id[:8])
    stop_status, stopped, _ = sorna(gateway, "stop", kernel_id[:8])
    _, afterwards, _ = sorna(gateway, "ps", "-q")

    assert kernel_id[:13] in listed and "python3" in listed
    assert ids.split() == [kernel_id]
    assert (logs_status, stop_status) == (0, 0)
    assert stopped == f"stopped {kernel_id}\n"
    assert afterwards == ""


def test_logs_show_what_the_process_itself_wrote(gateway: Gateway) -> None:
    kernel_id = new_kernel(gateway)
    gateway.post(
        f"/api/kernels/{kernel_id}/execute",
        json={"code": "import os; os.write(2, b'from below\\n')"},
    )

    _, said, _ = sorna(gateway, "logs", kernel_id)

    assert "from below" in said


def test_run_streams_and_its_status_is_the_codes(gateway: Gateway) -> None:
    fine = sorna(gateway, "run", "-c", "print(6 * 7)")
    failing = sorna(gateway, "run", "-c", "print('before'); 1 / 0")
    unknown = sorna(gateway, "run", "-k", "cobol", "-c", "1")

    assert fine == (0, "42\n", "")
    assert failing[0] == 1
    assert failing[1] == "before\n"
    assert "ZeroDivisionError" in failing[2]
    assert unknown[0] != 0
    assert "there are: " in unknown[2] and "Traceback" not in unknown[2]
    assert sorna(gateway, "ps", "-q")[1] == ""


def test_run_uses_a_running_kernel(gateway: Gateway) -> None:
    kernel_id = new_kernel(gateway)

    sorna(gateway, "run", "--kernel", kernel_id, "-c", "x = 'shared'")
    _, printed, _ = sorna(gateway, "run", "--kernel", kernel_id, "-", input="print(x)")

    assert printed == "shared\n"


def test_a_token_opens_the_server_for_one_user_and_shows_only_theirs(gateway: Gateway) -> None:
    mine = new_kernel(gateway)
    _, token, _ = sorna(gateway, "token", "create", "bob", "--label", "laptop")
    bobs = {"Authorization": f"token {token.strip()}"}

    made = requests.post(f"{gateway.url}/api/kernels", headers=bobs, timeout=60)
    seen = requests.get(f"{gateway.url}/api/kernels", headers=bobs, timeout=60).json()
    everyones = requests.get(f"{gateway.url}/sorna/kernels?all=1", headers=bobs, timeout=60)
    others = requests.get(f"{gateway.url}/sorna/kernels/{mine}/logs", headers=bobs, timeout=60)
    more_tokens = requests.post(
        f"{gateway.url}/sorna/tokens", headers=bobs, data=json.dumps({"user": "eve"}), timeout=60
    )
    contents = requests.get(f"{gateway.url}/api/contents", headers=bobs, timeout=60)
    _, all_kernels, _ = sorna(gateway, "ps", "--all")

    assert [kernel["id"] for kernel in seen] == [made.json()["id"]]
    assert (everyones.status_code, more_tokens.status_code, contents.status_code) == (403,) * 3
    assert others.status_code == 404
    assert "bob" in all_kernels

    _, listed, _ = sorna(gateway, "token", "list")
    token_id = next(line.split()[0] for line in listed.splitlines() if "laptop" in line)
    requests.delete(
        f"{gateway.url}/api/kernels/{made.json()['id']}", headers=bobs, timeout=60
    ).raise_for_status()
    sorna(gateway, "token", "revoke", token_id)

    assert token.strip() not in listed
    refused = requests.get(f"{gateway.url}/api/kernels", headers=bobs, timeout=60)
    assert refused.status_code in (401, 403)


def test_images_are_listed(gateway: Gateway) -> None:
    status, listed, _ = sorna(gateway, "images")

    assert status == 0
    assert "python3" in listed and "ready" in listed


def test_without_a_server_commands_say_what_to_type(gateway: Gateway) -> None:
    empty = {"JUPYTER_DATA_DIR": str(gateway.home.tmp / "nothing")}

    status, _, said = sorna(gateway, "ps", env=empty)

    assert status == 1
    assert "jupyter sorna" in said and "Traceback" not in said


def test_an_unknown_command_names_the_known_ones(gateway: Gateway) -> None:
    status, _, said = sorna(gateway, "lunch")

    assert status == 2
    assert "run" in said and "doctor" in said

"""Kernels created at the same moment never see each other's environment or owner.

Today's gateways fail here: they patch a shared manager with one request's environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.gateways import Gateway

CREATIONS = 20
MARKED = "import os, json; print(json.dumps({k: v for k, v in os.environ.items() if 'RACE' in k}))"


@pytest.mark.timeout(600)
def test_twenty_concurrent_creations_keep_their_environments_apart(
    docker_gateway: Gateway, new_user: Callable[[str], str]
) -> None:
    users = [f"racer{n}" for n in range(CREATIONS)]
    tokens = {user: new_user(user) for user in users}
    # Every fourth has no environment of its own, and must not get another's
    envs = {
        user: {"RACE_SECRET": f"secret-of-{user}", f"RACE_{user}": "1"} if n % 4 else {}
        for n, user in enumerate(users)
    }

    def create(user: str) -> str:
        body = {"name": "python3", "env": envs[user], "limits": {"memory": 256 << 20}}
        response = docker_gateway.post(
            "/api/kernels", body if envs[user] else body | {"env": {}}, token=tokens[user]
        )
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def look(user: str) -> dict[str, str]:
        printed = docker_gateway.text(kernels[user], MARKED, token=tokens[user])
        seen: dict[str, str] = json.loads(printed)
        return seen

    with ThreadPoolExecutor(CREATIONS) as pool:
        kernels = dict(zip(users, pool.map(create, users), strict=True))
        seen = dict(zip(users, pool.map(look, users), strict=True))
    listed = {
        user: [k["id"] for k in docker_gateway.get("/api/kernels", token=tokens[user]).json()]
        for user in users
    }
    later = docker_gateway.start_kernel(name="python3")
    seen_later = json.loads(docker_gateway.text(later, MARKED))

    for kernel_id in (*kernels.values(), later):
        docker_gateway.stop_kernel(kernel_id)
    assert seen == envs
    assert listed == {user: [kernels[user]] for user in users}
    assert seen_later == {}

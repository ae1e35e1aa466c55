"""Without a token, or with a wrong one, only the door can be seen. Routes come from the app."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import websocket

from tests.acceptance.routes import a_path_for
from tests.gateways import Gateway, Home

OPEN = {("GET", "/api"), ("GET", "/healthz")}
DOOR = {"LoginFormHandler", "LogoutHandler", "PublicStaticFileHandler", "FileFindHandler"}
"""The login page with what it is made of: style sheets, scripts, logos. They come from installed
packages, the same for everyone."""
NEVER_ANSWERS = {"LicensesHandler"}
"""jupyterlab_server's, when it refuses: its `finish` takes the error for a MIME type. (Should it
answer one day, the test will say so.)"""
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.fixture(scope="module", params=[(), ("--headless",)], ids=["all", "headless"])
def gateway_and_routes(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Gateway, list[dict[str, Any]]]]:
    home = Home()
    root = Path(__file__).parents[2]
    shown = home.run(
        sys.executable,
        *("-m", "tests.acceptance.routes", "--no-browser", "--port=0", *request.param),
        cwd=root,
        env={"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
    )
    home.remove()
    assert shown.returncode == 0, shown.stderr
    gateway = Gateway.start("--runtime=local", *request.param)
    yield gateway, json.loads(shown.stdout.splitlines()[-1])
    gateway.dispose()


@pytest.mark.parametrize("token", [None, "wrong", "", "sorna_wrong"])
def test_every_route_asks_for_a_token(
    gateway_and_routes: tuple[Gateway, list[dict[str, Any]]], token: str | None
) -> None:
    gateway, routes = gateway_and_routes
    assert len(routes) > 20
    let_in = []

    for route in routes:
        path = a_path_for(route["pattern"])
        for method in route["methods"]:
            if (method, path) in OPEN or DOOR.intersection(route["bases"]):
                continue
            if NEVER_ANSWERS.intersection(route["bases"]):
                refusals, timeout = {"no answer"}, 2
            else:
                refusals, timeout = {401, 403, "login page", "nowhere"}, 60
            outcome = ask(gateway, method, path, token, route["websocket"], timeout)
            if outcome not in refusals:
                let_in.append((method, path, outcome, route["handler"]))

    assert let_in == []


def ask(
    gateway: Gateway, method: str, path: str, token: str | None, websocket: bool, timeout: float
) -> int | str:
    """The status, after redirects, which by themselves show nothing."""
    try:
        response = gateway.request(
            method,
            path,
            token=token,
            data=b"{}" if method != "GET" else None,
            headers=UPGRADE if websocket else {},
            stream=True,
            timeout=timeout,
        )
    except requests.Timeout:
        return "no answer"
    response.close()
    if urlsplit(response.url).path == "/login":
        return "login page"
    if response.history and response.status_code == 404:
        return "nowhere"
    return response.status_code


def test_only_the_door_is_open(
    gateway_and_routes: tuple[Gateway, list[dict[str, Any]]],
) -> None:
    gateway, _ = gateway_and_routes

    for method, path in OPEN:
        response = gateway.request(method, path, token=None)
        assert response.status_code == 200
        assert set(response.json()) <= {"version", "status"}
    assert gateway.get("/login", token=None).status_code == 200


@pytest.fixture
def gateway(local_gateway: Gateway) -> Gateway:
    return local_gateway


def logged_in(gateway: Gateway) -> requests.Session:
    """A browser's session: it has the cookie, which other origins' pages would ride on."""
    browser = requests.Session()
    browser.get(f"{gateway.url}/login", timeout=30)
    answer = browser.post(
        f"{gateway.url}/login",
        data={"password": gateway.token, "_xsrf": browser.cookies.get("_xsrf", "")},
        timeout=30,
    )
    assert answer.status_code == 200, answer.text
    assert browser.get(f"{gateway.url}/api/kernels", timeout=30).status_code == 200
    return browser


EVIL = {"Origin": "http://evil.example", "Referer": "http://evil.example/page"}


def test_a_page_of_another_origin_cannot_use_the_users_cookie(gateway: Gateway) -> None:
    browser = logged_in(gateway)

    posted = browser.post(f"{gateway.url}/api/kernels", json={}, headers=EVIL, timeout=30)
    run = browser.post(f"{gateway.url}/api/run", json={"code": "1"}, headers=EVIL, timeout=30)
    read = browser.get(f"{gateway.url}/api/kernels", headers=EVIL, timeout=30)

    assert posted.status_code in (403, 404)
    assert run.status_code in (403, 404)
    assert read.status_code in (403, 404)
    assert gateway.get("/api/kernels").json() == []


def test_a_page_of_another_origin_cannot_open_a_websocket(gateway: Gateway) -> None:
    browser = logged_in(gateway)
    cookies = "; ".join(f"{c.name}={c.value}" for c in browser.cookies)
    kernel_id = gateway.start_kernel()

    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(
            gateway.websocket_url(f"/api/kernels/{kernel_id}/channels?session_id=a"),
            cookie=cookies,
            origin="http://evil.example",
            timeout=30,
        )

    gateway.stop_kernel(kernel_id)
    assert refused.value.status_code == 403


@pytest.mark.parametrize("path", ["/api/kernels", "/tree", "/api", "/sorna/openapi.json"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(gateway: Gateway, path: str) -> None:
    port = gateway.url.rpartition(":")[2]

    response = gateway.get(path, headers={"Host": f"evil.example:{port}"})

    assert response.status_code == 403


def test_one_users_kernel_does_not_exist_for_another(gateway: Gateway) -> None:
    token = gateway.post("/sorna/tokens", {"user": "stranger"}).json()["token"]
    kernel_id = gateway.start_kernel()
    path = f"/api/kernels/{kernel_id}"

    answers = {
        "read": gateway.get(path, token=token).status_code,
        "execute": gateway.post(f"{path}/execute", {"code": "1"}, token=token).status_code,
        "interrupt": gateway.post(f"{path}/interrupt", token=token).status_code,
        "restart": gateway.post(f"{path}/restart", token=token).status_code,
        "stop": gateway.delete(path, token=token).status_code,
    }

    assert set(answers.values()) == {404}, answers
    assert gateway.get("/api/kernels", token=token).json() == []
    gateway.stop_kernel(kernel_id)

"""Who gets in, as whom, and what they see of others."""

import json
import uuid
from http.cookies import SimpleCookie

import pytest
from jupyter_server.base.handlers import JupyterHandler
from tornado import web
from tornado.httpclient import HTTPClientError

from sorna_jupyter.exceptions import SornaError
from tests.jupyter_app import TOKEN, basic, running_app


@pytest.fixture
async def app(tmp_path):
    async with running_app(tmp_path) as app:
        yield app


async def who(app, **options):
    options.setdefault("token", None)
    response = await app.fetch("GET", options.pop("path", "/api/me"), **options)
    return (
        json.loads(response.body)["identity"]["username"] if response.code == 200 else response.code
    )


def local_user(app):
    return app.server.identity_provider.local_user


# -- credentials -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["token", "Token", "Bearer", "bearer", "BEARER "])
async def test_jupyterlab_and_jupyter_kernel_client_name_their_scheme_as_they_like(app, scheme):
    alices = await app.user("alice")

    assert await who(app, headers={"Authorization": f"{scheme} {TOKEN}"}) == local_user(app)
    assert await who(app, headers={"Authorization": f"{scheme} {alices}"}) == "alice"


async def test_a_token_in_the_url_is_enough_for_browsers(app):
    alices = await app.user("alice")

    assert await who(app, path=f"/api/me?token={TOKEN}") == local_user(app)
    assert await who(app, path=f"/api/me?token={alices}") == "alice"


async def test_gateway_client_may_log_in_with_http_user_and_http_pwd(app):
    alices = await app.user("alice")

    assert await who(app, headers=basic("alice", alices)) == "alice"
    assert await who(app, headers=basic("", alices)) == "alice"
    assert await who(app, headers=basic(local_user(app), TOKEN)) == local_user(app)


async def test_a_name_that_does_not_go_with_the_token_is_refused(app):
    alices = await app.user("alice")
    await app.user("bob")

    assert await who(app, headers=basic("bob", alices)) == 403
    assert await who(app, headers=basic(local_user(app), alices)) == 403


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "token",
        "token ",
        "token wrong",
        f"token {TOKEN}x",
        f"token x{TOKEN}",
        f"digest {TOKEN}",
        TOKEN,
        "Basic",
        "Basic !!!",
        "Basic /////w==",
        "Bearer \xff\xfe",
        "token sorna_",
        "token %00",
        "token " + "a" * 5000,
    ],
)
async def test_nobody_else_gets_in(app, authorization):
    assert await who(app, headers={"Authorization": authorization}) == 403
    assert await who(app, headers=basic("a", "b")) == 403
    assert await who(app) == 403


async def test_gateway_client_sends_an_empty_token_where_it_has_none(app):
    assert await who(app, headers={"Authorization": "token "}) == 403


async def test_a_revoked_token_is_worth_nothing(app):
    alices = await app.user("alice")
    (row,) = await app.registry.list_tokens("alice")

    await app.registry.revoke_token(row.id)

    assert await who(app, headers={"Authorization": f"token {alices}"}) == 403


async def test_anyone_may_read_the_version(app):
    assert (await app.fetch("GET", "/api", token=None)).code == 200


async def test_api_me_is_exact_for_jupyterlab(app):
    model = await app.json("GET", "/api/me", token=await app.user("alice"))

    assert model["identity"] == {
        "username": "alice",
        "name": "alice",
        "display_name": "alice",
        "initials": None,
        "avatar_url": None,
        "color": None,
    }


async def test_api_me_tells_a_user_what_is_allowed(app):
    path = '/api/me?permissions={"kernels":["execute"],"contents":["read"],"server":["write"]}'
    path = path.replace('"', "%22")

    alices = (await app.json("GET", path, token=await app.user("alice")))["permissions"]
    mine = (await app.json("GET", path))["permissions"]

    assert (alices["kernels"], alices["contents"], alices["server"]) == (["execute"], [], [])
    assert (mine["kernels"], mine["contents"], mine["server"]) == (["execute"], ["read"], ["write"])


async def test_the_registry_may_be_out_of_reach(app, monkeypatch):
    async def away(token):
        raise SornaError("no database")

    monkeypatch.setattr(app.registry, "user_of_token", away)

    assert await who(app, headers={"Authorization": f"token {TOKEN}"}) == local_user(app)
    assert await who(app, headers={"Authorization": "token other"}) == 500


# -- cookies and the login page --------------------------------------------------------------


def cookies_of(response, known=""):
    jar = SimpleCookie(known)
    for line in response.headers.get_list("Set-Cookie"):
        jar.load(line)
    return "; ".join(f"{name}={morsel.value}" for name, morsel in jar.items())


async def login(app, password):
    page = await app.fetch("GET", "/login", token=None)
    cookies = cookies_of(page)
    xsrf = SimpleCookie(cookies)["_xsrf"].value
    response = await app.fetch(
        "POST",
        "/login?next=/api/me",
        f"password={password}&_xsrf={xsrf}".encode(),
        token=None,
        headers={"Cookie": cookies, "Content-Type": "application/x-www-form-urlencoded"},
    )
    return response, cookies_of(response, cookies)


async def test_anyones_token_opens_the_login_page(app):
    for token, name in ((TOKEN, local_user(app)), (await app.user("alice"), "alice")):
        response, cookies = await login(app, token)

        assert (response.code, response.headers["Location"]) == (302, "/api/me")
        assert await who(app, headers={"Cookie": cookies, "Referer": app.url}) == name


async def test_a_wrong_password_does_not(app):
    for password in ("wrong", "", "%00", TOKEN + "x"):
        response, _ = await login(app, password)

        assert response.code == 401
        assert b"Invalid credentials" in response.body


async def test_a_cookie_is_worth_nothing_once_its_user_is_gone(app, monkeypatch):
    _, cookies = await login(app, await app.user("alice"))

    async def nobody(name):
        return None

    monkeypatch.setattr(app.registry, "find_user", nobody)

    assert await who(app, headers={"Cookie": cookies, "Referer": app.url}) == 403


async def test_a_token_wins_over_the_cookie_of_another(app):
    _, cookies = await login(app, TOKEN)
    alices = await app.user("alice")

    headers = {"Cookie": cookies, "Authorization": f"token {alices}"}

    assert await who(app, headers=headers) == "alice"


async def test_a_cookie_alone_starts_no_kernel_from_another_site(app):
    _, cookies = await login(app, TOKEN)

    headers = {"Cookie": cookies, "Origin": "https://evil.example"}
    response = await app.fetch("POST", "/api/kernels", {}, token=None, headers=headers)

    assert response.code in (403, 404)
    assert app.agents.created == []


async def test_a_rebound_host_name_is_refused(app):
    response = await app.fetch("GET", "/api/kernels", headers={"Host": "evil.example"})

    assert response.code == 403


async def test_an_admin_chooses_a_colour_and_keeps_it(app):
    response = await app.fetch("PATCH", "/api/me", {"color": "red", "display_name": "Ann"})
    cookies = cookies_of(response)

    headers = {"Cookie": cookies, "Authorization": f"token {TOKEN}"}
    identity = (await app.json("GET", "/api/me", headers=headers))["identity"]

    assert (identity["color"], identity["display_name"]) == ("red", "Ann")
    assert identity["username"] == local_user(app)


# -- what belongs to others ------------------------------------------------------------------


async def test_everyone_sees_their_own_kernels_only(app):
    tokens = {name: await app.user(name) for name in ("alice", "bob")}
    kernels = {name: await app.start_kernel(token) for name, token in tokens.items()}

    for name, token in tokens.items():
        (model,) = await app.json("GET", "/api/kernels", token=token)
        assert model["id"] == kernels[name]
    assert await app.json("GET", "/api/kernels") == []
    assert (await app.json("GET", "/api/status", token=tokens["bob"]))["kernels"] == 1


@pytest.mark.parametrize(
    ("method", "action"),
    [("GET", ""), ("DELETE", ""), ("POST", "/interrupt"), ("POST", "/restart")],
)
async def test_anothers_kernel_is_404_as_if_it_were_not_there(app, method, action):
    alices = await app.start_kernel(await app.user("alice"))
    unknown = str(uuid.uuid4())

    for token in (await app.user("bob"), TOKEN, await app.user("carol", is_admin=True)):
        theirs = await app.fetch(method, f"/api/kernels/{alices}{action}", token=token)
        nobodys = await app.fetch(method, f"/api/kernels/{unknown}{action}", token=token)

        assert theirs.code == nobodys.code == 404
        assert theirs.body.replace(alices.encode(), b"") == nobodys.body.replace(
            unknown.encode(), b""
        )
    assert app.agents.asked == []


async def test_anothers_kernel_has_no_channels(app):
    alices = await app.start_kernel(await app.user("alice"))

    with pytest.raises(HTTPClientError) as refusal:
        await app.socket(alices, token=await app.user("bob"))

    assert refusal.value.code == 404
    assert app.agents.attached == []


async def test_how_anothers_kernel_ended_is_nobodys_business(app):
    alices = await app.start_kernel(await app.user("alice"))
    await app.kernels.stop(alices, "a secret reason")

    response = await app.fetch("GET", f"/api/kernels/{alices}", token=await app.user("bob"))

    assert response.code == 404
    assert b"secret" not in response.body


async def test_everyone_sees_their_own_sessions_only(app):
    tokens = {name: await app.user(name) for name in ("alice", "bob")}
    body = {"path": "same.ipynb", "type": "notebook", "name": ""}
    sessions = {
        name: await app.json("POST", "/api/sessions", body, token=token)
        for name, token in tokens.items()
    }

    assert sessions["alice"]["id"] != sessions["bob"]["id"]
    for name, token in tokens.items():
        assert await app.json("GET", "/api/sessions", token=token) == [sessions[name]]
    for method in ("GET", "PATCH", "DELETE"):
        path = f"/api/sessions/{sessions['alice']['id']}"
        patch = {"path": "x"} if method == "PATCH" else None
        assert (await app.fetch(method, path, patch, token=tokens["bob"])).code == 404
    assert await app.json("GET", "/api/sessions", token=tokens["alice"]) == [sessions["alice"]]


async def test_a_user_who_is_no_admin_reaches_kernels_and_nothing_of_the_machine(app):
    alices = await app.user("alice")
    allowed = ("/api/kernels", "/api/kernelspecs", "/api/sessions", "/api/status", "/api/me")
    machine = (
        "/api/contents",
        "/api/config/notebook",
        "/api/terminals",
        "/files/secret",
        "/api/events/subscribe",
        "/nbconvert/python/a.ipynb",
        "/view/a.html",
        "/metrics",
    )

    for path in allowed:
        assert (await app.fetch("GET", path, token=alices)).code == 200, path
    for path in machine:
        assert (await app.fetch("GET", path, token=alices)).code in (403, 404), path
    assert (await app.fetch("POST", "/api/shutdown", token=alices)).code == 403
    assert (await app.fetch("POST", "/api/contents", {}, token=alices)).code == 403


async def test_no_page_shows_the_servers_token_to_a_user_who_is_no_admin(app):
    """Notebook and JupyterLab write it into the HTML of every page."""
    alices = await app.user("alice")

    for handler in app.server.web_app.wildcard_router.rules:
        path = getattr(handler.matcher, "_path", None)
        if path is None or "%s" in path:
            continue
        response = await app.fetch("GET", path, token=alices)
        assert TOKEN.encode() not in response.body, path


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/nope", "/api/nope", "/static/nope", "/login", "/logout", "/api/spec.yaml", "/tree"]
)
async def test_no_page_of_an_error_shows_the_servers_token_to_a_user_who_is_no_admin(
    app, method, path
):
    body = b"password=wrong" if method in ("POST", "PUT") else None
    response = await app.fetch(method, path, body, token=await app.user("alice"))

    assert TOKEN.encode() not in response.body


async def test_a_page_of_an_extension_is_for_admins_only(app):
    """Such pages ask for a login and no more, and carry the server's token."""

    class Page(JupyterHandler):
        @web.authenticated
        def get(self):
            self.finish(self.settings["token"])

    app.server.web_app.add_handlers(".*$", [(r"/lab", Page)])

    assert (await app.fetch("GET", "/lab")).body == TOKEN.encode()
    refused = await app.fetch("GET", "/lab", token=await app.user("alice"))
    assert refused.code == 403
    assert TOKEN.encode() not in refused.body
    assert b"Only an admin of this server may see this" in refused.body

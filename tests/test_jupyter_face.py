"""Jupyter's REST routes, one test a rule, named after the client that depends on it."""

import asyncio
import json
import uuid
from datetime import datetime
from pathlib import Path

import pytest

from sorna_jupyter.exceptions import ImageUnavailable, KernelStartFailed
from sorna_jupyter.protocol import ImageState, KernelStatus, Limits
from sorna_jupyter.registry import Policy
from tests.jupyter_app import LOGO, SPEC, beat, image, running_app

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
async def app(tmp_path):
    async with running_app(tmp_path) as app:
        yield app


async def refused(app, status, method, path, body=None, **options):
    """The JSON that a refusal carries: a text for people, the status in words, no traceback."""
    response = await app.fetch(method, path, body, **options)
    assert response.code == status, response.body
    answer = json.loads(response.body)
    assert answer.keys() == {"message", "reason"}
    assert b"Traceback" not in response.body
    return answer["message"]


# -- kernels: models -------------------------------------------------------------------------


async def test_gateway_client_parses_last_activity(app):
    kernel_id = await app.start_kernel()

    (model,) = await app.json("GET", "/api/kernels")

    assert model.pop("last_activity") == datetime.strptime(
        (await app.json("GET", f"/api/kernels/{kernel_id}"))["last_activity"],
        "%Y-%m-%dT%H:%M:%S.%fZ",
    ).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert model == {
        "id": kernel_id,
        "name": "python3",
        "execution_state": "idle",
        "connections": 0,
    }


async def test_a_cache_buster_behind_the_url_is_ignored_for_jupyterlab(app):
    assert await app.json("GET", "/api/kernels?1690000000000") == []
    assert "kernelspecs" in await app.json("GET", "/api/kernelspecs?1690000000000")


async def test_jupyterlab_shows_a_slow_kernel_as_starting(app):
    app.agents.let_start.clear()

    model = await app.json("POST", "/api/kernels", {})

    assert model["execution_state"] == "starting"
    app.agents.let_start.set()
    await app.kernels.wait_ready(model["id"], 10)
    assert (await app.json("GET", f"/api/kernels/{model['id']}"))["execution_state"] == "idle"


async def test_a_kernel_that_died_lately_says_why(app):
    kernel_id = await app.start_kernel()
    await app.kernels.stop(kernel_id, "idle for 3600 s")

    message = await refused(app, 404, "GET", f"/api/kernels/{kernel_id}")

    assert message == f"Kernel does not exist: {kernel_id} (idle for 3600 s)"
    assert await app.json("GET", "/api/kernels") == []


# -- kernels: creation -----------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, b"", b"{}", b" \n"])
async def test_jupyter_kernel_client_may_send_no_body(app, body):
    response = await app.fetch("POST", "/api/kernels", body)

    assert response.code == 201
    model = json.loads(response.body)
    assert model["name"] == "python3"
    assert response.headers["Location"] == f"/api/kernels/{model['id']}"


async def test_jupyter_kernel_client_sends_a_null_path(app):
    await app.json("POST", "/api/kernels", {"name": "python3", "path": None})

    assert app.agents.created[0].path == ""


async def test_everything_goes_by_value_to_the_agent(app):
    kernel_id = str(uuid.uuid4())

    await app.json(
        "POST",
        "/api/kernels",
        {
            "name": "python3",
            "kernel_id": kernel_id,
            "env": {"A": "1", "B": "ü"},
            "path": "/some/./folder/",
            "limits": {"memory": "512m", "cpus": 0.5, "pids": 64, "disk": "1 GiB"},
            "idle_timeout": 3600,
        },
    )

    (request,) = app.agents.created
    assert request.kernel_id == kernel_id
    assert request.env == {"A": "1", "B": "ü"}
    assert request.path == "some/folder"
    assert request.limits == Limits(memory=512 << 20, cpus=0.5, pids=64, disk=1 << 30)
    assert app.kernels.get(kernel_id).idle_timeout == 3600


async def test_twenty_starts_at_once_never_mix_their_environments(app):
    users = [await app.user(f"user{i}") for i in range(5)]

    async def start(number):
        env = {"SECRET": f"secret-{number}"}
        return number, await app.start_kernel(users[number % 5], env=env)

    started = dict(await asyncio.gather(*map(start, range(20))))
    without_env = await app.start_kernel(users[0])

    requests = {request.kernel_id: request for request in app.agents.created}
    for number, kernel_id in started.items():
        assert requests[kernel_id].env == {"SECRET": f"secret-{number}"}
        assert requests[kernel_id].owner == f"user{number % 5}"
    assert requests[without_env].env == {}


async def test_enterprise_gateways_clients_choose_the_id_in_the_environment(app):
    kernel_id = str(uuid.uuid4())

    assert await app.start_kernel(env={"KERNEL_ID": kernel_id}) == kernel_id
    assert await app.start_kernel(id=(other := str(uuid.uuid4()))) == other


async def test_an_id_that_is_taken_is_a_conflict(app):
    kernel_id = await app.start_kernel()

    message = await refused(app, 409, "POST", "/api/kernels", {"kernel_id": kernel_id})

    assert kernel_id in message


async def test_another_users_id_is_a_conflict_too(app):
    kernel_id = await app.start_kernel(await app.user("alice"))

    await refused(app, 409, "POST", "/api/kernels", {"kernel_id": kernel_id})


@pytest.mark.parametrize("bad", ["x", "../../etc", "a-b-c-d-e", " ", UNKNOWN + "0"])
async def test_an_id_that_is_no_uuid_is_refused(app, bad):
    await refused(app, 400, "POST", "/api/kernels", {"kernel_id": bad})


async def test_gateway_client_may_repeat_a_post_after_a_proxys_504(app):
    headers = {"Idempotency-Key": "key-1"}

    first = await app.json("POST", "/api/kernels", {}, headers=headers)
    again = await app.json("POST", "/api/kernels", {}, headers=headers)

    assert first["id"] == again["id"]
    assert len(app.agents.created) == 1


async def test_kernel_username_is_only_a_claim(app):
    me = app.server.identity_provider.local_user

    await app.start_kernel(env={"KERNEL_USERNAME": "root-of-all", "A": "1"})
    await app.start_kernel(env={"KERNEL_USERNAME": me})

    assert [request.env for request in app.agents.created] == [
        {"A": "1"},
        {"KERNEL_USERNAME": me},
    ]
    assert {request.owner for request in app.agents.created} == {me}


async def test_an_unknown_kernelspec_is_404_and_names_the_known(app):
    message = await refused(app, 404, "POST", "/api/kernels", {"name": "cobol"})

    assert message == "No kernelspec is named 'cobol'; there are: julia, python3"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"python3"',
        b"null",
        {"env": []},
        {"env": "A=1"},
        {"env": {"A": 1}},
        {"env": {"A": None}},
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"env": {"A": "x\0y"}},
        {"env": {"A": "x" * 200_000}},
        {"name": 1},
        {"name": ["python3"]},
        {"path": 1},
        {"path": "../../etc"},
        {"path": "a/../../b"},
        {"path": "a\0b"},
        {"kernel_id": 5},
        {"limits": 1},
        {"limits": {"memory": "lots"}},
        {"limits": {"memory": -1}},
        {"limits": {"memory": 0}},
        {"limits": {"memory": 10**30}},
        {"limits": {"memory": "9" * 400}},
        {"limits": {"ram": 1}},
        {"limits": {"cpus": "two"}},
        {"limits": {"cpus": -0.5}},
        {"limits": {"pids": 1.5}},
        {"idle_timeout": -1},
        {"idle_timeout": "never"},
        b'{"env": {"A": "\\ud800"}}',
    ],
    ids=lambda body: str(body)[:40],
)
async def test_a_wrong_body_is_400_and_starts_nothing(app, body):
    await refused(app, 400, "POST", "/api/kernels", body)

    assert app.agents.created == []


async def test_fields_of_other_gateways_are_ignored(app):
    await app.start_kernel(name="python3", kernel_headers=[], transport_encryption="auto")


async def test_limits_above_the_policy_are_403(tmp_path):
    policy = Policy(
        max_kernels=1, max_limits=Limits(memory=1 << 30), default_limits=Limits(memory=1 << 28)
    )
    async with running_app(tmp_path, policy) as app:
        await refused(app, 403, "POST", "/api/kernels", {"limits": {"memory": "2 GiB"}})
        await app.start_kernel()
        await refused(app, 403, "POST", "/api/kernels")


async def test_a_kernel_that_does_not_start_says_why(app):
    app.agents.failure = KernelStartFailed("it exited with code 1: no module named ipykernel")

    message = await refused(app, 500, "POST", "/api/kernels")

    assert "no module named ipykernel" in message
    assert await app.json("GET", "/api/kernels") == []


# -- kernels: what is done with them ---------------------------------------------------------


@pytest.mark.parametrize("body", [None, b"{}", b"", b"no json"])
async def test_jupyterlab_gets_204_for_interrupt(app, body):
    kernel_id = await app.start_kernel()

    response = await app.fetch("POST", f"/api/kernels/{kernel_id}/interrupt", body)

    assert (response.code, response.body) == (204, b"")
    assert app.agents.asked == [("interrupt", kernel_id)]


async def test_jupyterlab_gets_200_and_the_model_for_restart(app):
    kernel_id = await app.start_kernel()

    model = await app.json("POST", f"/api/kernels/{kernel_id}/restart")

    assert (model["id"], model["execution_state"]) == (kernel_id, "idle")
    assert app.agents.asked == [("restart", kernel_id)]


async def test_jupyterlab_gets_204_for_delete_and_then_404(app):
    kernel_id = await app.start_kernel()

    response = await app.fetch("DELETE", f"/api/kernels/{kernel_id}")

    assert (response.code, response.body) == (204, b"")
    await refused(app, 404, "DELETE", f"/api/kernels/{kernel_id}")


@pytest.mark.parametrize("kernel_id", [UNKNOWN, "nonsense", "..%2F..", "%00", "a b", "ü"])
@pytest.mark.parametrize(
    ("method", "action"),
    [("GET", ""), ("DELETE", ""), ("POST", "/interrupt"), ("POST", "/restart")],
)
async def test_gateway_client_gets_404_for_an_unknown_kernel(app, method, action, kernel_id):
    """Also on restart, where jupyter_server answers 500; 404 is how a client sees a culled one."""
    path = f"/api/kernels/{kernel_id.replace(' ', '%20').replace('ü', '%C3%BC')}{action}"

    assert "Kernel does not exist" in await refused(app, 404, method, path)


async def test_jupyter_servers_status_counts_the_kernels(app):
    await app.start_kernel()

    status = await app.json("GET", "/api/status")

    assert (status["kernels"], status["connections"]) == (1, 0)
    assert status["last_activity"] >= status["started"]


# -- kernelspecs -----------------------------------------------------------------------------


async def test_jupyterlab_gets_the_specs_of_the_images(app):
    model = await app.json("GET", "/api/kernelspecs")

    python = model["kernelspecs"]["python3"]
    assert model["default"] == "python3"
    assert python["name"] == "python3"
    assert python["resources"] == {"logo-64x64": "/kernelspecs/python3/logo-64x64.png"}
    assert python["spec"] == {**SPEC, "env": {}, "kernel_protocol_version": ""}
    building = model["kernelspecs"]["julia"]
    assert building["resources"] == {}
    assert building["spec"]["metadata"]["sorna"]["state"] == "building"


async def test_a_single_spec_is_found_by_name(app):
    specs = (await app.json("GET", "/api/kernelspecs"))["kernelspecs"]

    assert await app.json("GET", "/api/kernelspecs/python3") == specs["python3"]
    await refused(app, 404, "GET", "/api/kernelspecs/cobol")


async def test_an_image_that_one_agent_cannot_build_is_ready_where_another_has_it(app):
    await app.kernels.hear(beat("agent-2", [image("python3", ImageState.FAILED)]))

    assert app.kernels.kernelspecs()["python3"].state is ImageState.READY


async def test_gateway_client_with_kernel_username_asks_for_one_spec_in_the_wrong_place(app):
    specs = await app.json("GET", "/api/kernelspecs")

    assert await app.json("GET", "/api/kernelspecs?user=carol") == specs
    one = await app.json("GET", "/api/kernelspecs?user=carol/python3")
    assert one == specs["kernelspecs"]["python3"]
    assert await app.json("GET", "/api/kernelspecs?user=a%2Fb%2Fpython3") == one
    await refused(app, 404, "GET", "/api/kernelspecs?user=carol/cobol")


async def test_the_logo_is_bytes_or_404(app):
    response = await app.fetch("GET", "/kernelspecs/python3/logo-64x64.png")

    assert (response.code, response.body) == (200, LOGO)
    assert response.headers["Content-Type"] == "image/png"
    for path in ("python3/logo-32x32.png", "julia/logo-64x64.png", "python3/../../etc/passwd"):
        assert (await app.fetch("GET", f"/kernelspecs/{path}")).code == 404
    assert (await app.fetch("HEAD", "/kernelspecs/python3/logo-64x64.png")).code == 200


async def test_extensions_find_the_specs_through_jupyter_servers_manager(app):
    manager = app.server.kernel_spec_manager

    assert manager.get_kernel_spec("python3").display_name == "Python 3"
    assert set(manager.get_all_specs()) == set(manager.find_kernel_specs()) == {"python3", "julia"}
    with pytest.raises(KeyError):
        manager.get_kernel_spec("cobol")


# -- sessions --------------------------------------------------------------------------------


def session_body(path="folder/a.ipynb", **more):
    return {
        "path": path,
        "type": "notebook",
        "name": "a.ipynb",
        "kernel": {"name": "python3"},
        **more,
    }


async def test_vscode_gets_a_full_session_model(app):
    response = await app.fetch("POST", "/api/sessions", session_body())

    model = json.loads(response.body)
    kernel = await app.json("GET", f"/api/kernels/{model['kernel']['id']}")
    assert response.code == 201
    assert response.headers["Location"] == f"/api/sessions/{model['id']}"
    assert model == {
        "id": model["id"],
        "path": "folder/a.ipynb",
        "name": "a.ipynb",
        "type": "notebook",
        "kernel": kernel,
        "notebook": {"path": "folder/a.ipynb", "name": "a.ipynb"},
    }
    assert await app.json("GET", "/api/sessions") == [model]
    assert await app.json("GET", f"/api/sessions/{model['id']}") == model


async def test_a_sessions_kernel_gets_its_path_and_name_but_not_the_servers_environment(app):
    """The stock session manager hands the server's whole environment to the kernel."""
    (Path(app.server.root_dir) / "folder").mkdir()

    await app.json("POST", "/api/sessions", session_body())

    (request,) = app.agents.created
    assert request.env == {"JPY_SESSION_NAME": "folder/a.ipynb"}
    assert request.path == "folder"


async def test_notebooks_new_page_finds_the_session_whose_kernel_is_still_starting(app):
    """The file list names it after the notebook only when it is answered: at once, therefore."""
    app.agents.let_start.clear()

    model = await asyncio.wait_for(app.json("POST", "/api/sessions", session_body()), 5)

    assert model["kernel"]["execution_state"] == "starting"
    assert await app.json("GET", "/api/sessions") == [model]


async def test_a_session_whose_kernel_does_not_start_is_gone(app):
    app.agents.failure = ImageUnavailable("no image here")

    assert "no image here" in await refused(app, 503, "POST", "/api/sessions", session_body())

    assert await app.json("GET", "/api/sessions") == []


async def test_notebook_gets_the_same_session_for_the_same_path(app):
    first = await app.json("POST", "/api/sessions", session_body())
    again = await app.json("POST", "/api/sessions", session_body())
    other = await app.json("POST", "/api/sessions", session_body("b.ipynb"))

    assert first == again
    assert other["id"] != first["id"]


async def test_two_tabs_that_open_a_notebook_at_once_share_a_session(app):
    models = await asyncio.gather(
        *(app.json("POST", "/api/sessions", session_body()) for _ in range(5))
    )

    assert len({model["id"] for model in models}) == 1
    assert len(app.agents.created) == 1


async def test_jupyterlab_opens_a_console_on_a_running_kernel(app):
    kernel_id = await app.start_kernel()

    body = session_body("console-1", type="console", kernel={"id": kernel_id, "name": "python3"})
    model = await app.json("POST", "/api/sessions", body)

    assert model["kernel"]["id"] == kernel_id
    assert len(app.agents.created) == 1


async def test_a_session_may_choose_its_new_kernels_id(app):
    kernel_id = str(uuid.uuid4())

    model = await app.json("POST", "/api/sessions", session_body(kernel={"id": kernel_id}))

    assert model["kernel"]["id"] == kernel_id


async def test_classic_notebooks_body_is_understood(app):
    model = await app.json("POST", "/api/sessions", {"notebook": {"path": "old.ipynb"}})

    assert (model["path"], model["type"]) == ("old.ipynb", "notebook")


async def test_jupyterlab_makes_its_dialog_from_501(app):
    response = await app.fetch("POST", "/api/sessions", session_body(kernel={"name": "cobol"}))

    assert response.code == 501
    assert json.loads(response.body) == {
        "message": "The 'cobol' kernel is not available. Please pick another suitable kernel "
        "instead, or install that kernel.",
        "short_message": "cobol not found",
    }
    assert await app.json("GET", "/api/sessions") == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "No JSON data provided"),
        ({}, "Missing field in JSON data: path"),
        ({"path": "a"}, "Missing field in JSON data: type"),
        ({"path": "a", "type": "notebook", "kernel": []}, "Invalid request body"),
        ({"path": 1, "type": "notebook"}, "Invalid request body"),
        (b"[1]", "Invalid request body"),
        (b"{", "Invalid JSON"),
        ({"path": "a", "type": "notebook", "kernel": {"id": "x"}}, "must be a UUID"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_wrong_session_is_400(app, body, message):
    assert message in await refused(app, 400, "POST", "/api/sessions", body)


async def test_a_session_on_another_users_kernel_is_a_conflict(app):
    kernel_id = await app.start_kernel(await app.user("alice"))

    await refused(app, 409, "POST", "/api/sessions", session_body(kernel={"id": kernel_id}))


async def test_jupyterlab_renames_a_notebook(app):
    session = await app.json("POST", "/api/sessions", session_body())

    changes = {"path": "b.ipynb", "name": "b.ipynb", "type": "file"}
    model = await app.json("PATCH", f"/api/sessions/{session['id']}", changes)

    assert {key: model[key] for key in changes} == changes
    assert model["kernel"]["id"] == session["kernel"]["id"]


async def test_jupyterlab_changes_a_notebooks_kernel_by_name(app):
    session = await app.json("POST", "/api/sessions", session_body())
    old = session["kernel"]["id"]

    body = {"kernel": {"name": "julia"}}
    model = await app.json("PATCH", f"/api/sessions/{session['id']}", body)

    assert model["kernel"]["name"] == "julia"
    await refused(app, 404, "GET", f"/api/kernels/{old}")
    assert await app.json("GET", "/api/sessions") == [model]


async def test_jupyterlab_changes_a_notebooks_kernel_by_id(app):
    session = await app.json("POST", "/api/sessions", session_body())
    kernel_id = await app.start_kernel()

    body = {"kernel": {"id": kernel_id, "name": "ignored"}}
    model = await app.json("PATCH", f"/api/sessions/{session['id']}", body)

    assert model["kernel"]["id"] == kernel_id
    await refused(app, 404, "GET", f"/api/kernels/{session['kernel']['id']}")


async def test_a_session_can_not_take_a_kernel_that_is_not_there(app):
    session = await app.json("POST", "/api/sessions", session_body())
    path = f"/api/sessions/{session['id']}"
    alices = await app.start_kernel(await app.user("alice"))

    for kernel_id in (UNKNOWN, alices):
        message = await refused(app, 400, "PATCH", path, {"kernel": {"id": kernel_id}})
        assert message == f"No such kernel: {kernel_id}"
    assert (await app.fetch("PATCH", path, {"kernel": {"name": "cobol"}})).code == 501
    assert (await app.json("GET", path))["kernel"]["id"] == session["kernel"]["id"]


async def test_deleting_a_session_stops_its_kernel(app):
    session = await app.json("POST", "/api/sessions", session_body())

    response = await app.fetch("DELETE", f"/api/sessions/{session['id']}")

    assert (response.code, response.body) == (204, b"")
    await refused(app, 404, "GET", f"/api/kernels/{session['kernel']['id']}")
    await refused(app, 404, "DELETE", f"/api/sessions/{session['id']}")


async def test_a_session_goes_with_its_kernel(app):
    session = await app.json("POST", "/api/sessions", session_body())

    await app.fetch("DELETE", f"/api/kernels/{session['kernel']['id']}")

    assert await app.json("GET", "/api/sessions") == []
    await refused(app, 404, "GET", f"/api/sessions/{session['id']}")
    again = await app.json("POST", "/api/sessions", session_body())
    assert again["id"] != session["id"]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_an_unknown_session_is_404(app, method):
    body = {"path": "x"} if method == "PATCH" else None

    assert "not found" in await refused(app, 404, method, f"/api/sessions/{UNKNOWN}", body)
    assert "not found" in await refused(app, 404, method, "/api/sessions/nonsense", body)


async def test_sessions_outlive_the_gateway(tmp_path):
    async with running_app(tmp_path) as app:
        session = await app.json("POST", "/api/sessions", session_body())

    async with running_app(tmp_path) as app:
        await app.kernels.load()
        (found,) = await app.json("GET", "/api/sessions")

    assert found["id"] == session["id"]
    assert found["kernel"]["id"] == session["kernel"]["id"]


async def test_a_lost_kernel_is_still_listed_with_its_reason(app):
    kernel_id = await app.start_kernel()
    kernel = app.kernels.get(kernel_id)
    kernel.status, kernel.reason = KernelStatus.LOST, "its agent is lost; it may come back"

    model = await app.json("GET", f"/api/kernels/{kernel_id}")

    assert model["reason"] == "its agent is lost; it may come back"
    assert model["execution_state"] == "idle"


# -- pages -----------------------------------------------------------------------------------


async def test_vscode_finds_no_hub(app):
    """200 would mean a JupyterHub, with a token or without."""
    await refused(app, 404, "GET", "/hub/api")
    await refused(app, 403, "GET", "/hub/api", token=None)


async def test_vscode_finds_a_tree_page(tmp_path):
    async with running_app(tmp_path, headless=True) as app:
        response = await app.fetch("GET", "/tree?")

        assert response.code == 200
        assert (await app.fetch("GET", "/tree", token=None)).code in (302, 403)


async def test_every_route_is_there_under_a_base_url(tmp_path):
    async with running_app(tmp_path, ServerApp={"base_url": "/some/where/"}) as app:
        response = await app.fetch("POST", "/some/where/api/kernels")
        specs = await app.json("GET", "/some/where/api/kernelspecs")

    kernel_id = json.loads(response.body)["id"]
    assert response.headers["Location"] == f"/some/where/api/kernels/{kernel_id}"
    logo = "/some/where/kernelspecs/python3/logo-64x64.png"
    assert specs["kernelspecs"]["python3"]["resources"] == {"logo-64x64": logo}

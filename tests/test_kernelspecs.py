import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sorna_jupyter.cli import kernelspec
from sorna_jupyter.exceptions import Conflict, NotAllowed, SornaError, UnknownKernelspec
from sorna_jupyter.remote import credentials, kernelspecs
from sorna_jupyter.remote.kernelspecs import RemoteKernelspec
from sorna_jupyter.remote.server import Server
from tests.remote_servers import StockServer, near, stock_server  # noqa: F401  (fixtures)

pytestmark = pytest.mark.usefixtures("near")


@pytest.fixture
def server(stock_server: StockServer, near: Path) -> Server:  # noqa: F811
    credentials.save(stock_server.url, stock_server.token)
    return Server(stock_server.url, stock_server.token)


def read_spec(directory: Path) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((directory / "kernel.json").read_text())
    return spec


def test_an_installed_spec_starts_the_proxy_and_holds_no_token(server: Server, near: Path) -> None:  # noqa: F811
    ours = kernelspecs.install(server, kernelspecs.offered(server)["python3"])

    assert ours.directory == near / "kernels/sorna-python3"
    assert read_spec(ours.directory) == {
        "argv": [
            *(sys.executable, "-P", "-m", "sorna_jupyter.remote.proxy"),
            *("--url", server.url, "--kernel-name", "python3", "-f", "{connection_file}"),
        ],
        "display_name": "Python 3 (Sorna: 127.0.0.1)",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "debugger": True,
            "supported_encryption": ["curve"],
            "sorna": {"url": server.url, "name": "python3"},
        },
    }
    everything = b"".join(path.read_bytes() for path in ours.directory.iterdir())
    assert StockServer.token.encode() not in everything


def test_the_logos_come_along(server: Server) -> None:
    ours = kernelspecs.install(server, kernelspecs.offered(server)["python3"])

    assert (ours.directory / "logo-64x64.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_installed_is_listed_and_can_be_removed(server: Server) -> None:
    ours = kernelspecs.install(server, kernelspecs.offered(server)["python3"])
    assert kernelspecs.installed() == [ours]

    assert kernelspecs.remove("sorna-python3") == ours

    assert kernelspecs.installed() == []
    assert not ours.directory.exists()


def test_installing_again_replaces_ours(server: Server) -> None:
    remote = kernelspecs.offered(server)["python3"]
    first = kernelspecs.install(server, remote)
    (first.directory / "old").touch()

    again = kernelspecs.install(server, remote, pass_env=["MODEL"])

    assert again == first
    assert not (first.directory / "old").exists()
    assert read_spec(again.directory)["argv"][-4:-2] == ["--pass-env", "MODEL"]


def test_two_servers_with_the_same_kernelspec_stand_side_by_side(server: Server) -> None:
    remote = kernelspecs.offered(server)["python3"]
    kernelspecs.install(server, remote)
    other = Server("http://127.0.0.1:9/base", "none")

    second = kernelspecs.install(other, RemoteKernelspec("python3", remote.spec, {}))

    assert second.name == "sorna-python3-127.0.0.1-9-base"
    assert {ours.url for ours in kernelspecs.installed()} == {server.url, other.url}


def test_a_spec_that_is_not_ours_is_left_alone(server: Server, near: Path) -> None:  # noqa: F811
    place = server.url.removeprefix("http://").replace(":", "-")
    for name in ("sorna-python3", f"sorna-python3-{place}"):
        theirs = near / "kernels" / name
        theirs.mkdir(parents=True)
        (theirs / "kernel.json").write_text('{"argv": ["x"], "display_name": "x"}')

    with pytest.raises(Conflict, match="is someone else's"):
        kernelspecs.install(server, kernelspecs.offered(server)["python3"])
    with pytest.raises(Conflict, match="left alone"):
        kernelspecs.remove("sorna-python3")

    assert read_spec(near / "kernels/sorna-python3")["argv"] == ["x"]


def test_a_spec_below_a_prefix(server: Server, tmp_path: Path) -> None:
    ours = kernelspecs.install(
        server, kernelspecs.offered(server)["python3"], prefix=str(tmp_path / "env")
    )

    assert ours.directory == tmp_path / "env/share/jupyter/kernels/sorna-python3"


@pytest.mark.parametrize("name", ["../../etc/logo-64x64.png", "kernel.json", "logo-../x"])
def test_a_server_can_not_write_other_files(server: Server, name: str) -> None:
    remote = kernelspecs.offered(server)["python3"]
    path = f"/kernelspecs/python3/{name}"

    ours = kernelspecs.install(server, RemoteKernelspec("python3", remote.spec, {"logo": path}))

    assert read_spec(ours.directory)["metadata"]["sorna"]
    assert {path.name for path in ours.directory.iterdir()} <= {"kernel.json", "logo-64x64.png"}


# -- servers that are no Jupyter server ------------------------------------------------------


class Misbehaving(BaseHTTPRequestHandler):
    """Answers everything as its class says, and remembers which tokens it was shown."""

    status, body, headers_to_send = 200, b"<html>", {"Content-Type": "text/html"}
    shown: list[str]

    def do_GET(self) -> None:
        type(self).shown.append(self.headers.get("Authorization", ""))
        self.send_response(self.status)
        for name, value in self.headers_to_send.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None: ...


def misbehaving(**attributes: Any) -> tuple[Server, type[Misbehaving], HTTPServer]:
    kind = type("Kind", (Misbehaving,), attributes | {"shown": []})
    http_server = HTTPServer(("127.0.0.1", 0), kind)
    Thread(target=http_server.serve_forever, daemon=True).start()
    return Server(f"http://127.0.0.1:{http_server.server_port}", "secret"), kind, http_server


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"kernelspecs": 1}', b'{"kernelspecs": {"a": 1}}', b"\xff"]
)
def test_what_is_no_jupyter_server_is_called_so(body: bytes) -> None:
    server, _, http_server = misbehaving(body=body)

    with pytest.raises(SornaError, match="is not a Jupyter server"):
        kernelspecs.offered(server)
    http_server.shutdown()


def test_a_redirect_does_not_take_the_token_along() -> None:
    _, thief, thief_server = misbehaving()
    headers = {"Location": f"http://127.0.0.1:{thief_server.server_port}/"}
    server, kind, http_server = misbehaving(status=302, headers_to_send=headers)

    with pytest.raises(NotAllowed, match="another page to log in"):
        kernelspecs.offered(server)

    assert (kind.shown, thief.shown) == (["token secret"], [])
    thief_server.shutdown()
    http_server.shutdown()


def test_logos_are_fetched_from_the_server_alone() -> None:
    server = Server("http://127.0.0.1:9", "secret")

    for path in ("//thief.example.org/logo-64x64.png", "https://thief.example.org/logo-64x64.png"):
        with pytest.raises(SornaError, match="is not a path on"):
            server.fetch(path)


# -- the command line ------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_install_list_remove_from_the_command_line(
    stock_server: StockServer,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert kernelspec.main(["install", "--all"]) == 0
    assert "sorna-python3: Python 3 (Sorna: 127.0.0.1), in " in capsys.readouterr().out

    assert kernelspec.main(["list"]) == 0
    columns = capsys.readouterr().out.splitlines()[1].split("  ")
    assert [column.strip() for column in columns if column] == [
        stock_server.url,
        "python3",
        "Python 3 (ipykernel)",
        "sorna-python3",
    ]

    assert kernelspec.main(["remove", "sorna-python3"]) == 0
    assert kernelspecs.installed() == []


@pytest.mark.usefixtures("server")
def test_an_unknown_name_installs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernelspec.main(["install", "python3", "cobol"]) == 1

    assert capsys.readouterr().err.endswith(
        ": No kernelspec is named 'cobol'; there are: python3\n"
    )
    assert kernelspecs.installed() == []


def test_without_a_login_it_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernelspec.main(["install", "--all"]) == 1

    assert "jupyter sorna login URL" in capsys.readouterr().err


def test_installed_specs_are_listed_while_the_server_is_away(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    kernelspecs.install(server, kernelspecs.offered(server)["python3"])
    credentials.remove(server.url)

    assert kernelspec.main(["list"]) == 0

    printed = capsys.readouterr()
    assert "sorna-python3" in printed.out
    assert "No server is known" in printed.err


@pytest.mark.usefixtures("server")
def test_a_value_for_pass_env_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernelspec.main(["install", "--all", "--pass-env", "KEY=secret"]) == 1

    assert "without its value" in capsys.readouterr().err


def test_picking_is_all_or_nothing() -> None:
    known = {"a": RemoteKernelspec("a", {}, {})}

    assert kernelspecs.pick(known, ["a"]) == [known["a"]]
    with pytest.raises(UnknownKernelspec):
        kernelspecs.pick(known, ["a", "b"])

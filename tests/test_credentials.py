import io
import json
import os
from pathlib import Path

import pytest

from sorna_jupyter.cli import login
from sorna_jupyter.exceptions import InvalidRequest, NotAllowed
from sorna_jupyter.remote import credentials
from tests.remote_servers import StockServer, near, stock_server  # noqa: F401  (fixtures)

URL = "https://gpu.example.org"

pytestmark = pytest.mark.usefixtures("near")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("https://GPU.example.org/", URL),
        ("https://gpu.example.org:443", URL),
        ("https://gpu.example.org/lab", URL),
        ("https://gpu.example.org/tree/a/b.ipynb?x=1#y", URL),
        (" https://gpu.example.org:8443/user/ada/ ", "https://gpu.example.org:8443/user/ada"),
        ("http://[::1]:8888/", "http://[::1]:8888"),
        ("http://localhost:80/base/lab", "http://localhost/base"),
    ],
)
def test_one_server_has_one_address(typed: str, meant: str) -> None:
    assert credentials.normalise(typed) == meant


@pytest.mark.parametrize(
    "typed", ["gpu.example.org", "ftp://gpu.example.org", "https://", "", "http://host:port"]
)
def test_what_is_no_address_is_refused(typed: str) -> None:
    with pytest.raises(InvalidRequest):
        credentials.normalise(typed)


@pytest.mark.parametrize("typed", [f"{URL}/?token=abc", "https://ada:secret@gpu.example.org"])
def test_an_address_with_a_secret_is_refused_with_a_hint(typed: str) -> None:
    with pytest.raises(InvalidRequest, match="paste the token when you are asked"):
        credentials.normalise(typed)


def test_a_saved_token_is_found_again_and_its_server_is_the_default() -> None:
    credentials.save(f"{URL}/", "one")
    credentials.save("http://localhost:8888/lab", "two")

    assert credentials.find(URL) == "one"
    assert credentials.default() == ("http://localhost:8888", "two")
    assert credentials.servers() == ["http://localhost:8888", URL]


def test_removing_the_default_makes_another_one_the_default() -> None:
    credentials.save(URL, "one")
    credentials.save("http://localhost:8888", "two")

    assert credentials.remove("http://localhost:8888/")

    assert credentials.find("http://localhost:8888") is None
    assert credentials.default() == (URL, "one")
    assert not credentials.remove("http://localhost:8888/")


def test_without_a_file_there_is_nothing() -> None:
    assert credentials.find(URL) is None
    assert credentials.default() is None


def test_only_its_owner_can_read_the_file() -> None:
    credentials.save(URL, "one")

    path = credentials.credentials_file()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_could_touch_is_not_used(mode: int) -> None:
    credentials.save(URL, "one")
    credentials.credentials_file().chmod(mode)

    with pytest.raises(NotAllowed, match="chmod 600"):
        credentials.find(URL)


def test_a_damaged_file_says_so() -> None:
    credentials.save(URL, "one")
    credentials.credentials_file().write_text('{"default": ')

    with pytest.raises(NotAllowed, match="is damaged"):
        credentials.find(URL)


# -- this machine's gateway and the environment ----------------------------------------------


def write_gateway_json(data: Path, pid: int, mode: int = 0o600) -> None:
    path = data / "sorna/gateway.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"url": "http://127.0.0.1:8888/", "token": "local", "pid": pid}))
    path.chmod(mode)


def test_the_gateway_that_runs_here_needs_no_login(near: Path) -> None:  # noqa: F811
    write_gateway_json(near, os.getpid())

    assert credentials.running() == ("http://127.0.0.1:8888", "local")
    assert credentials.choose() == ("http://127.0.0.1:8888", "local")
    assert credentials.token_for("http://localhost:8888/tree") == "local"
    assert credentials.token_for("http://localhost:8889") is None


def test_a_gateway_that_is_gone_does_not_count(near: Path) -> None:  # noqa: F811
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    write_gateway_json(near, child)

    assert credentials.running() is None


def test_a_token_in_the_environment_is_for_its_own_server_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SORNA_TOKEN", "given")
    assert credentials.token_for(URL) is None

    monkeypatch.setenv("SORNA_URL", f"{URL}/")
    assert credentials.token_for(URL) == "given"
    assert credentials.token_for("https://other.example.org") is None
    assert credentials.choose() == (URL, "given")


def test_the_last_login_goes_before_this_machines_gateway(near: Path) -> None:  # noqa: F811
    write_gateway_json(near, os.getpid())
    credentials.save(URL, "one")

    assert credentials.choose() == (URL, "one")


def test_who_knows_no_server_is_told_what_to_type() -> None:
    with pytest.raises(NotAllowed, match="jupyter sorna login URL"):
        credentials.choose()
    with pytest.raises(NotAllowed, match=f"jupyter sorna login {URL}"):
        credentials.choose(URL)


# -- login and logout ------------------------------------------------------------------------


def type_token(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_login_keeps_a_token_that_the_server_accepts(
    stock_server: StockServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_token(monkeypatch, stock_server.token + "\n")

    assert login.main([stock_server.url]) == 0

    printed = capsys.readouterr()
    assert f"Logged in to {stock_server.url}" in printed.out
    assert stock_server.token not in printed.out + printed.err
    assert credentials.find(stock_server.url) == stock_server.token


def test_login_reads_a_token_file_and_what_the_server_printed(
    stock_server: StockServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{stock_server.url}/tree?token={stock_server.token}\n")

    assert login.main([stock_server.url, "--token-file", str(file)]) == 0

    assert credentials.find(stock_server.url) == stock_server.token


@pytest.mark.parametrize("typed", ["wrong\n", "\n", "", "two words\n"])
def test_login_keeps_nothing_that_does_not_work(
    stock_server: StockServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: str,
) -> None:
    type_token(monkeypatch, typed)

    assert login.main([stock_server.url]) == 1

    assert credentials.default() is None
    assert capsys.readouterr().err.strip()


def test_login_says_when_nothing_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_token(monkeypatch, "token\n")

    assert login.main(["http://127.0.0.1:9"]) == 1

    assert "http://127.0.0.1:9 does not answer: " in capsys.readouterr().err


def test_a_token_in_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert login.main([f"{URL}/?token=abc"]) == 1

    assert "paste the token when you are asked" in capsys.readouterr().err


def test_logout_forgets_the_last_login(capsys: pytest.CaptureFixture[str]) -> None:
    credentials.save(URL, "one")

    assert login.logout([]) == 0
    assert credentials.default() is None
    assert login.logout([]) == 1
    assert "Not logged in" in capsys.readouterr().err

"""Real notebooks, first to last cell, through every way that leads to Docker kernels.

Each run is compared with one on a plain local ipykernel. Where they come from, and under which
licence, stands in `real_notebooks.py`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import requests
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.acceptance.conftest import RemoteKernels
from tests.acceptance.real_notebooks import NOTEBOOKS, RealNotebook, essence
from tests.gateways import Gateway, Home, command, free_port, wait_until

pytestmark = pytest.mark.timeout(600)
each_notebook = pytest.mark.parametrize("real", NOTEBOOKS, ids=lambda real: real.name)


def with_parameters(real: RealNotebook, notebook: NotebookNode) -> NotebookNode:
    """What papermill would have made of it, so that a plain run can be compared."""
    assignments = "\n".join(f"{name} = {value!r}" for name, value in real.parameters.items())
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if cells and assignments:
        place = notebook.cells.index(cells[0]) + 1
        cell = nbformat.v4.new_code_cell(f"# Parameters\n{assignments}\n")
        notebook.cells.insert(place, cell)
    return notebook


@pytest.fixture(scope="session")
def expected() -> Callable[..., list[dict[str, object]]]:
    """How a plain local ipykernel runs it; each run once a session."""
    known: dict[tuple[str, bool], list[dict[str, object]]] = {}

    def run(real: RealNotebook, parametrised: bool = False) -> list[dict[str, object]]:
        key = (real.name, parametrised)
        if key not in known:
            notebook = real.read()
            if parametrised:
                notebook = with_parameters(real, notebook)
            NotebookClient(
                notebook, kernel_name="python3", allow_errors=real.allow_errors, timeout=120
            ).execute()
            known[key] = essence(notebook)
        return known[key]

    return run


@pytest.fixture(scope="module")
def converted(
    remote_kernels: RemoteKernels, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[RealNotebook], NotebookNode]:
    """What one `jupyter nbconvert --execute` makes of all of them."""
    folder = tmp_path_factory.mktemp("nbconvert")
    for real in NOTEBOOKS:
        nbformat.write(real.read(), folder / f"{real.name}.ipynb")

    done = remote_kernels.home.run(
        *("jupyter", "nbconvert", "--execute", "--to=notebook", "--allow-errors"),
        f"--ExecutePreprocessor.kernel_name={remote_kernels.kernel_name}",
        f"--output-dir={folder / 'out'}",
        *(str(folder / f"{real.name}.ipynb") for real in NOTEBOOKS),
        timeout=500,
    )

    assert done.returncode == 0, done.stderr
    return lambda real: nbformat.read(folder / "out" / f"{real.name}.ipynb", as_version=4)


@pytest.mark.parametrize("real", NOTEBOOKS, ids=lambda real: real.name)
def test_nbconvert_executes_it_on_the_installed_kernelspec(
    converted: Callable[[RealNotebook], NotebookNode],
    real: RealNotebook,
    expected: Callable[..., list[dict[str, object]]],
) -> None:
    assert essence(converted(real)) == expected(real)


PAPERMILL = [real for real in NOTEBOOKS if not real.allow_errors]


@pytest.mark.parametrize("real", PAPERMILL, ids=lambda real: real.name)
def test_papermill_executes_it_on_the_installed_kernelspec(
    remote_kernels: RemoteKernels,
    real: RealNotebook,
    expected: Callable[..., list[dict[str, object]]],
    tmp_path: Path,
) -> None:
    nbformat.write(real.read(), tmp_path / "in.ipynb")
    parameters = [arg for item in real.parameters.items() for arg in ("-p", item[0], str(item[1]))]

    done = remote_kernels.home.run(
        *("papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")),
        *("-k", remote_kernels.kernel_name, "--no-progress-bar", *parameters),
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    got = essence(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert _without_quotes(got) == _without_quotes(expected(real, parametrised=True))


def _without_quotes(cells: list[dict[str, object]]) -> list[dict[str, object]]:
    """papermill writes strings with double quotes where Python writes single ones."""
    return [cell | {"source": str(cell["source"]).replace('"', "'")} for cell in cells]


@pytest.fixture(scope="session")
def open_gateway(docker_gateway: Gateway) -> Iterator[Gateway]:
    """A gateway without token: jupyter_server's GatewayKernelClient sends none with websockets."""
    gateway = Gateway.start(
        "--runtime=docker", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"
    )
    gateway.wait_for_image("python3")
    yield gateway
    gateway.dispose()


def execute_over(url: str, real: RealNotebook) -> list[dict[str, object]]:
    """What nbclient makes of it with jupyter_server's own GatewayKernelManager."""
    GatewayClient.clear_instance()
    GatewayClient.instance().url = url
    notebook = real.read()
    try:
        NotebookClient(
            notebook,
            kernel_manager_class=GatewayKernelManager,
            kernel_name="python3",
            allow_errors=real.allow_errors,
            timeout=120,
        ).execute()
    finally:
        GatewayClient.clear_instance()
    return essence(notebook)


@each_notebook
def test_nbclient_executes_it_with_jupyter_servers_gateway_manager(
    open_gateway: Gateway, real: RealNotebook, expected: Callable[..., list[dict[str, object]]]
) -> None:
    assert execute_over(open_gateway.url, real) == expected(real)


@pytest.fixture(scope="session")
def front_server(docker_gateway: Gateway) -> Iterator[Gateway]:
    """A stock `jupyter server --gateway-url=OURS`, as a laptop would run it."""
    home = Home()
    port = free_port()
    log = home.root / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(command("jupyter"), "server", "--no-browser", "--allow-root"),
                # Open, since the client in front of it can't show a token to its websocket
                *(f"--port={port}", "--IdentityProvider.token="),
                "--ServerApp.disable_check_xsrf=True",
                f"--gateway-url={docker_gateway.url}",
            ],
            env=home.env | {"JUPYTER_GATEWAY_AUTH_TOKEN": docker_gateway.token},
            cwd=home.work,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    front = Gateway(process, home, log)
    front.url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, front.output
        try:
            return front.get("/api/kernelspecs", timeout=10).ok
        except requests.ConnectionError:
            return False

    wait_until(answers, "the front server answers", 60)
    yield front
    front.dispose()


@each_notebook
def test_a_stock_server_in_gateway_mode_executes_it(
    front_server: Gateway, real: RealNotebook, expected: Callable[..., list[dict[str, object]]]
) -> None:
    """Through two servers: nbclient, the stock server on a laptop, ours."""
    assert execute_over(front_server.url, real) == expected(real)

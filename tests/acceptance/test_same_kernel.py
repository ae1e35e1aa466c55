"""A program, websocket clients and a notebook in the browser share one live Docker kernel."""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.gateways import Gateway
from tests.kernel_socket import FRAMINGS, KernelSocket

PNG = b"\x89PNG\r\n"
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, x, 20])\nplt.show()"


@pytest.fixture
def kernel_with_x(docker_gateway: Gateway, docker_kernel: str) -> str:
    result = docker_gateway.execute(docker_kernel, "x = 6 * 7\n" + PLOT)

    assert result["status"] == "ok", result
    [plot] = [o["data"]["image/png"] for o in result["outputs"] if "image/png" in o.get("data", {})]
    assert base64.b64decode(plot).startswith(PNG)
    return docker_kernel


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_websocket_client_sees_what_rest_set_and_rest_what_it_sets(
    docker_gateway: Gateway, kernel_with_x: str, framing: str
) -> None:
    with KernelSocket(docker_gateway, kernel_with_x, framing) as client:
        printed = client.execute("print(x)")
        plotted = client.execute(PLOT)
        client.execute("y = x + 1")

    assert printed.text == "42\n"
    assert "image/png" in plotted.mime_types
    assert docker_gateway.text(kernel_with_x, "print(y)") == "43\n"


def test_both_framings_and_rest_on_one_kernel_at_once(
    docker_gateway: Gateway, kernel_with_x: str
) -> None:
    with (
        KernelSocket(docker_gateway, kernel_with_x, "legacy") as old,
        KernelSocket(docker_gateway, kernel_with_x, "v1") as new,
    ):
        old.execute("seen = [x]")
        new.execute("seen.append(x + 1)")
        docker_gateway.execute(kernel_with_x, "seen.append(x + 2)")

        assert old.execute("seen").text == new.execute("seen").text == "[42, 43, 44]"


def test_a_notebook_in_the_browser_shares_the_programs_kernel(
    docker_gateway: Gateway, kernel_with_x: str, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    path = "shared.ipynb"
    cells = ["print('x is', x)", PLOT, "from_notebook = x + 1"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    saved = docker_gateway.put(
        f"/api/contents/{path}", {"type": "notebook", "format": "json", "content": notebook}
    )
    assert saved.status_code == 201, saved.text
    session = docker_gateway.post(
        "/api/sessions",
        {"path": path, "name": path, "type": "notebook", "kernel": {"id": kernel_with_x}},
    )
    assert session.status_code == 201, session.text
    assert session.json()["kernel"]["id"] == kernel_with_x

    browser.get(f"{docker_gateway.url}/notebooks/{path}?token={docker_gateway.token}")
    wait = WebDriverWait(browser, 90)
    idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, idle))
    # The page draws its cells anew while it loads, and a key that comes meanwhile reaches none: as
    # a person would, press until the cell shows that it was heard. What it then prints is ours.
    wait.until(_runs_the_first_cell)
    for _ in cells[1:]:
        _press_shift_enter(browser)

    def outputs() -> str:
        found = browser.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output")
        return "\n".join(output.text for output in found)

    wait.until(lambda _: "x is 42" in outputs())
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output img"))
    # The last cell has a number when it is done
    wait.until(lambda b: "[ ]:" not in _prompts(b)[:3] and "[*]:" not in _prompts(b)[:3])
    image = browser.find_element(By.CSS_SELECTOR, ".jp-OutputArea-output img")
    assert int(image.get_property("naturalWidth")) > 100
    screenshot = tmp_path / "notebook.png"
    assert browser.save_screenshot(str(screenshot))
    print(f"screenshot: {screenshot}")

    assert docker_gateway.text(kernel_with_x, "print(from_notebook)") == "43\n"


def _runs_the_first_cell(browser: webdriver.Chrome) -> bool:
    if _prompts(browser)[:1] not in ([], ["[ ]:"]):
        return True
    browser.find_element(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell .cm-content").click()
    _press_shift_enter(browser)
    return False


def _press_shift_enter(browser: webdriver.Chrome) -> None:
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()


def _prompts(browser: webdriver.Chrome) -> list[str]:
    return [p.text for p in browser.find_elements(By.CSS_SELECTOR, ".jp-Cell .jp-InputPrompt")]

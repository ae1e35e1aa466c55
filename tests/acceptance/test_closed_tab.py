"""A tab is closed in the middle of a long cell; who opens the notebook later finds the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.gateways import Gateway, text_of
from tests.waiting import wait_until

LINES = 50
BEFORE = "print('before')"
COUNTER = f"""\
import sys, time
import matplotlib.pyplot as plt
for number in range({LINES}):
    print('line', number)
    time.sleep(0.2)
plt.plot(range(10))
plt.show()"""
AFTER = "'after', number"
TEXT = "".join(f"line {number}\n" for number in range(LINES))

PAGES = {"notebook": "/notebooks/{}", "lab": "/lab/tree/{}"}


@pytest.fixture
def notebook(docker_gateway: Gateway, docker_kernel: str) -> Iterator[str]:
    """The path of a notebook that uses the kernel, and whose cells were never executed."""
    path = f"closed-{docker_kernel[:8]}.ipynb"
    content = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in (BEFORE, COUNTER, AFTER)]
    )
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    save(docker_gateway, path, content)
    body = {"path": path, "name": path, "type": "notebook", "kernel": {"id": docker_kernel}}
    session = docker_gateway.post("/api/sessions", body)
    assert session.status_code == 201, session.text
    yield path
    docker_gateway.delete(f"/api/contents/{path}")


@pytest.mark.parametrize("page", PAGES)
def test_outputs_of_a_closed_tab_stand_in_the_notebook(
    docker_gateway: Gateway,
    docker_kernel: str,
    notebook: str,
    new_browser: Callable[[], webdriver.Chrome],
    page: str,
    tmp_path: Path,
) -> None:
    url = docker_gateway.url + PAGES[page].format(notebook) + f"?token={docker_gateway.token}"
    first = new_browser()
    first.get(url)
    run_all_cells(first)
    WebDriverWait(first, 60).until(lambda b: "line 3" in shown_text(b))
    first.quit()

    def cells() -> list[Any]:
        return code_cells(docker_gateway, notebook)

    wait_until(lambda: text_of(cells()[1]["outputs"]), "the first lines are in the file", 20)
    assert text_of(cells()[1]["outputs"]) != TEXT, "too late: it was to be seen growing"
    wait_until(lambda: is_idle(docker_gateway, docker_kernel), "the kernel is idle", 60)
    wait_until(lambda: cells()[2]["outputs"], "the last cell's result is in the file", 20)

    second = new_browser()
    second.get(url)
    WebDriverWait(second, 90).until(lambda b: "after" in shown_text(b))
    second.execute_script("document.querySelector('.jp-OutputArea-output img').scrollIntoView()")
    screenshot = tmp_path / f"{page}.png"
    assert second.save_screenshot(str(screenshot))
    print(f"screenshot: {screenshot}")

    assert [line for line in shown_text(second).splitlines() if line] == [
        "before",
        *TEXT.splitlines(),
        f"('after', {LINES - 1})",
    ]
    image = second.find_element(By.CSS_SELECTOR, ".jp-OutputArea-output img")
    assert int(image.get_property("naturalWidth")) > 100
    assert prompts(second)[:3] == ["[1]:", "[2]:", "[3]:"]
    nbformat.validate(docker_gateway.get(f"/api/contents/{notebook}").json()["content"])


def test_a_cell_that_was_edited_meanwhile_stays_as_it_is(
    docker_gateway: Gateway, notebook: str, new_browser: Callable[[], webdriver.Chrome]
) -> None:
    browser = new_browser()
    browser.get(f"{docker_gateway.url}/notebooks/{notebook}?token={docker_gateway.token}")
    run_all_cells(browser)
    WebDriverWait(browser, 60).until(lambda b: "line 3" in shown_text(b))
    browser.quit()

    content = docker_gateway.get(f"/api/contents/{notebook}").json()["content"]
    content["cells"][1]["source"] = "print('a newer edit')"
    save(docker_gateway, notebook, content)
    wait_until(
        lambda: code_cells(docker_gateway, notebook)[2]["outputs"],
        "the last cell's result is in the file",
        60,
    )

    edited = code_cells(docker_gateway, notebook)[1]
    assert (edited["source"], edited["outputs"]) == ("print('a newer edit')", [])


# -- helpers ---------------------------------------------------------------------------------


def save(gateway: Gateway, path: str, content: Any) -> None:
    body = {"type": "notebook", "format": "json", "content": content}
    saved = gateway.put(f"/api/contents/{path}", body)
    assert saved.status_code in (200, 201), saved.text


def is_idle(gateway: Gateway, kernel_id: str) -> bool:
    answer = gateway.get(f"/api/kernels/{kernel_id}")
    return bool(answer.json()["execution_state"] == "idle")


def code_cells(gateway: Gateway, path: str) -> list[Any]:
    answer = gateway.get(f"/api/contents/{path}")
    assert answer.status_code == 200, answer.text
    cells: list[Any] = answer.json()["content"]["cells"]
    return cells


def run_all_cells(browser: webdriver.Chrome) -> None:
    wait = WebDriverWait(browser, 90)
    idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, idle))
    wait.until(runs_the_first_cell)
    for _ in range(2):
        press_shift_enter(browser)


def runs_the_first_cell(browser: webdriver.Chrome) -> bool:
    """The page draws its cells anew while it loads: press until a cell shows that it was heard."""
    if prompts(browser)[:1] not in ([], ["[ ]:"]):
        return True
    browser.find_element(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell .cm-content").click()
    press_shift_enter(browser)
    return False


def press_shift_enter(browser: webdriver.Chrome) -> None:
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()


def prompts(browser: webdriver.Chrome) -> list[str]:
    return [p.text for p in browser.find_elements(By.CSS_SELECTOR, ".jp-Cell .jp-InputPrompt")]


def shown_text(browser: webdriver.Chrome) -> str:
    found = browser.find_elements(By.CSS_SELECTOR, ".jp-Cell .jp-OutputArea-output")
    return "\n".join(output.text for output in found)

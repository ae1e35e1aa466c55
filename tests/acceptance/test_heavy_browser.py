"""What is heavy or rare in a page: widgets' binary buffers, a picture of 50 MB, `input()`.

In Notebook of our own server, and in JupyterLab of a stock server with `--gateway-url`, with the
websocket client that jupyter_server brings and with ours in its place.
"""

from __future__ import annotations

import hashlib
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

from tests.gateways import Gateway, start_front

WIDGETS = """\
import hashlib, io
import ipywidgets, numpy, PIL.Image
def png(width, height):
    written = io.BytesIO()
    PIL.Image.new('RGB', (width, height), 'teal').save(written, 'png')
    return written.getvalue()
image = ipywidgets.Image(value=png(30, 20))
upload = ipywidgets.FileUpload()
display(image, upload)"""
REDRAWN = "image.value = png(70, 40)\n'redrawn'"
UPLOADED = "hashlib.sha256(upload.value[0].content).hexdigest()"
PICTURE = """\
noise = numpy.random.default_rng(3).integers(0, 256, (1070, 12000, 3), dtype=numpy.uint8)
PIL.Image.fromarray(noise)"""
ASKED = "name = input('Your name? ')"
LAST = "'asked', name"
CELLS = [WIDGETS, REDRAWN, UPLOADED, PICTURE, ASKED, LAST]

WIDTH = 12_000
"""pixels of the picture, which is noise: 38.5 MB of PNG, more than 50 MB in its message"""
UPLOAD = bytes(range(256)) * 4096

OUR_CLIENT = "sorna_jupyter.remote.gateway_url.GatewayConnection"


def test_notebook_of_our_own_server(
    docker_gateway: Gateway, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    page = Page(browser, docker_gateway, "/notebooks/{}", tmp_path)
    try:
        see_it_all(page)
    finally:
        page.close()


@pytest.fixture
def stock_lab(docker_gateway: Gateway) -> Iterator[Callable[..., Gateway]]:
    """Starts a stock `jupyter lab --gateway-url=OURS`, as a laptop would run it."""
    started: list[Gateway] = []

    def start(*args: str) -> Gateway:
        lab = start_front(docker_gateway.url, docker_gateway.token, *args, program="lab")
        started.append(lab)
        return lab

    yield start
    for lab in started:
        lab.dispose()


def test_lab_of_a_stock_server_with_our_websocket_client(
    stock_lab: Callable[..., Gateway], browser: webdriver.Chrome, tmp_path: Path
) -> None:
    lab = stock_lab(f"--ServerApp.kernel_websocket_connection_class={OUR_CLIENT}")
    page = Page(browser, lab, "/lab/tree/{}", tmp_path)
    try:
        see_it_all(page)
    finally:
        page.close()


def test_lab_of_a_stock_server_as_it_comes(
    stock_lab: Callable[..., Gateway], browser: webdriver.Chrome, tmp_path: Path
) -> None:
    """What its websocket client can't carry is named where it is missing; all else works."""
    page = Page(browser, stock_lab(), "/lab/tree/{}", tmp_path)
    try:
        page.run(WIDGETS)
        page.wait(lambda: "Binary buffers were left out" in page.text(WIDGETS))
        page.wait(lambda: "Upload (0)" in page.text(WIDGETS))
        page.run(REDRAWN)
        assert "Binary buffers were left out" in page.text(REDRAWN)
        assert "'redrawn'" in page.text(REDRAWN)

        page.upload(UPLOAD)
        page.run(UPLOADED)
        assert page.text(UPLOADED) == repr(hashlib.sha256(UPLOAD).hexdigest())

        page.run(PICTURE)
        page.wait(lambda: "MiB was left out" in page.text(PICTURE))
        answer_and_go_on(page)
    finally:
        page.close()


def see_it_all(page: Page) -> None:
    """A widget's picture, one that replaces it, an upload, 50 MB, an answer."""
    page.run(WIDGETS)
    page.wait(lambda: page.picture_width(WIDGETS) == 30)
    page.run(REDRAWN)
    page.wait(lambda: page.picture_width(WIDGETS) == 70)

    page.upload(UPLOAD)
    page.run(UPLOADED)
    assert page.text(UPLOADED) == repr(hashlib.sha256(UPLOAD).hexdigest())

    page.run(PICTURE)
    page.wait(lambda: page.picture_width(PICTURE) == WIDTH)
    answer_and_go_on(page)


def answer_and_go_on(page: Page) -> None:
    page.run(ASKED, "Ada")
    page.run(LAST)
    assert page.text(LAST) == "('asked', 'Ada')"


# -- helpers ---------------------------------------------------------------------------------


class Page:
    """A notebook of `CELLS` in a browser, with a kernel of its own."""

    def __init__(self, browser: webdriver.Chrome, server: Gateway, page: str, folder: Path) -> None:
        self._browser, self._server, self._folder = browser, server, folder
        self._path = f"{folder.name}.ipynb"
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in CELLS]
        )
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        body = {"type": "notebook", "format": "json", "content": notebook}
        saved = server.put(f"/api/contents/{self._path}", body)
        assert saved.status_code == 201, saved.text
        kernel = {"name": "python3"}
        body = {"path": self._path, "name": self._path, "type": "notebook", "kernel": kernel}
        session = server.post("/api/sessions", body)
        assert session.status_code == 201, session.text
        self._session = session.json()["id"]
        browser.get(f"{server.url}{page.format(self._path)}?token={server.token}")
        idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
        self.wait(lambda: browser.find_elements(By.CSS_SELECTOR, idle))

    def close(self) -> None:
        """Whatever came of it, show how it ended, and stop the kernel."""
        self._browser.save_screenshot(str(self._folder / "page.png"))
        print(f"screenshot: {self._folder / 'page.png'}")
        self._server.delete(f"/api/sessions/{self._session}")

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self._browser, 60).until(lambda _: condition())

    def run(self, source: str, answer: str = "") -> None:
        """Until the cell has its number; what it asks for is typed in."""
        self.wait(lambda: self._is_heard(source))
        if answer:
            box = ".jp-Stdin-input"
            self.wait(lambda: self._cell(source).find_elements(By.CSS_SELECTOR, box))
            self._cell(source).find_element(By.CSS_SELECTOR, box).send_keys(answer, Keys.ENTER)
        self.wait(lambda: self._prompt(source) not in ("[ ]:", "[*]:"))

    def _is_heard(self, source: str) -> bool:
        """The page draws its cells anew while it loads: press until it shows that it was heard."""
        if self._prompt(source) != "[ ]:":
            return True
        self._cell(source).find_element(By.CSS_SELECTOR, ".cm-content").click()
        keys = ActionChains(self._browser)
        keys.key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        return False

    def _cell(self, source: str) -> Any:
        cells = self._browser.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell")
        return cells[CELLS.index(source)]

    def _prompt(self, source: str) -> str:
        text: str = self._cell(source).find_element(By.CSS_SELECTOR, ".jp-InputPrompt").text
        return text

    def text(self, source: str) -> str:
        """What stands below the cell, without numbers."""
        outputs = self._cell(source).find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output")
        return "\n".join(output.text for output in outputs).strip()

    def picture_width(self, source: str) -> int:
        """In its own pixels; 0 while there is none."""
        pictures = self._cell(source).find_elements(By.CSS_SELECTOR, ".jp-OutputArea img")
        return int(pictures[0].get_property("naturalWidth")) if pictures else 0

    def upload(self, data: bytes) -> None:
        """Through the widget's button, whose file input stands in no document by itself."""
        file = self._folder / "upload.bin"
        file.write_bytes(data)
        self._browser.execute_script(
            "HTMLInputElement.prototype.click = function() { document.body.append(this) }"
        )
        self._cell(WIDGETS).find_element(By.CSS_SELECTOR, "button.jupyter-button").click()
        self._browser.find_element(By.CSS_SELECTOR, "body > input[type=file]").send_keys(str(file))
        self.wait(lambda: "(1)" in self.text(WIDGETS))

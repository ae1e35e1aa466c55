"""`jupyter sorna images [list | build]`: the kernel images of a server."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sorna_jupyter.cli.server import add_url, reporting, server_of
from sorna_jupyter.exceptions import ImageUnavailable
from sorna_jupyter.remote.server import Server

POLL_INTERVAL = 0.5  # seconds; the agent tells its progress about as often


@reporting
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jupyter sorna images", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["list", "build"], default="list")
    add_url(parser)
    arguments = parser.parse_args(argv)
    server = server_of(arguments)
    if arguments.action == "build":
        _build(server)
    _list(server)
    return 0


def _list(server: Server) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "TITLE", "STATE", "IMAGE"):
        table.add_column(column)
    for image in server.get("/sorna/images"):
        state = image["state"]
        if state in ("building", "failed") and image["message"]:
            state = f"{state}: {image['message']}"
        table.add_row(image["name"], image["display_name"], state, image["reference"])
    Console(highlight=False).print(table)


def _build(server: Server) -> None:
    """Returns when nothing is being built any more. Raises `ImageUnavailable` if a build failed."""
    server.post("/sorna/images", {})
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}"),
    )
    bars = {}
    with progress:
        while True:
            images = server.get("/sorna/images")
            waiting = [i for i in images if i["state"] in ("building", "missing")]
            for image in images:
                if image["state"] == "building" and image["name"] not in bars:
                    bars[image["name"]] = progress.add_task(image["name"], total=1, message="")
                if image["name"] in bars:
                    done = 1.0 if image["state"] == "ready" else image["progress"]
                    progress.update(
                        bars[image["name"]], completed=done, message=image["message"][:60]
                    )
            if not waiting:
                break
            time.sleep(POLL_INTERVAL)
    failed = [image for image in images if image["state"] == "failed"]
    if failed:
        raise ImageUnavailable(
            "; ".join(f"{image['name']} could not be built: {image['message']}" for image in failed)
        )

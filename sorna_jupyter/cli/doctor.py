"""`jupyter sorna doctor`: what is found, what is missing, and what to type."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from sorna_jupyter import __version__, places
from sorna_jupyter.exceptions import SornaError
from sorna_jupyter.protocol import ImageState

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}

NOT_RUNNING = "not running"


@dataclass(frozen=True)
class Finding:
    what: str
    state: str
    """ok; note: works, but less well; missing: must be mended"""
    found: str
    advice: str = ""
    """what to type"""


def main(argv: list[str]) -> int:
    """Exit status 1 if something that kernels need is missing."""
    parser = argparse.ArgumentParser(prog="jupyter sorna doctor", description=__doc__)
    parser.parse_args(argv)
    findings = list(_findings())
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(MARKS[finding.state], finding.what, finding.found)
        if finding.advice:
            table.add_row("", "", f"[bold]→ {finding.advice}[/]")
    Console(highlight=False).print(table)
    if any(finding.state == "missing" for finding in findings):
        return 1
    if not any(finding.what == "server" and finding.found != NOT_RUNNING for finding in findings):
        print("\nReady: start it with `jupyter sorna`")
    return 0


def _findings() -> Iterator[Finding]:
    yield Finding("sorna", "ok", f"{__version__} on Python {platform.python_version()}")
    yield from _packages()
    yield from asyncio.run(_engine())
    yield _data_dir()
    yield _runtime_dir()
    yield _gateway()


def _packages() -> Iterator[Finding]:
    for name in ("jupyter_server", "notebook", "jupyter_client", "pyzmq"):
        yield Finding(name, "ok", importlib.metadata.version(name))
    if importlib.util.find_spec("jupyterlab"):
        yield Finding("jupyterlab", "ok", importlib.metadata.version("jupyterlab"))
    else:
        yield Finding(
            "jupyterlab",
            "note",
            "not installed; Notebook at /tree works without",
            f"{sys.executable} -m pip install jupyterlab",
        )


async def _engine() -> list[Finding]:
    from sorna_agent.runtimes import choose_runtime

    try:
        runtime = await choose_runtime(
            "docker", agent_id="doctor", base_image=os.environ.get("SORNA_BASE_IMAGE")
        )
        try:
            await runtime.ping()  # type: ignore[attr-defined]  # only Docker's has it
            await runtime.start_up()
            found = [Finding("docker", "ok", runtime.isolation)]
            found += [_image(image.name, image.state) for image in runtime.images()]
            return found
        finally:
            await runtime.close()
    except SornaError as error:
        return [
            Finding("docker", "note", error.message, _docker_advice()),
            await _local_runtime(),
        ]


def _docker_advice() -> str:
    """Why there is no engine decides what helps."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        return f"check DOCKER_HOST={host}, or unset it"
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(host.removeprefix("unix://"))
    except PermissionError:
        return "sudo usermod -aG docker $USER   (then log in again)"
    except (FileNotFoundError, ConnectionRefusedError):
        if shutil.which("dockerd"):
            return "sudo systemctl start docker   (or, without systemd: sudo dockerd &)"
        return "sudo apt-get install docker.io   (or see https://docs.docker.com/engine/install)"
    except OSError as error:
        return f"{host}: {error.strerror}"
    return "docker version   (the socket is there, the engine does not answer)"


async def _local_runtime() -> Finding:
    from sorna_agent.runtimes import choose_runtime

    runtime = await choose_runtime("local", agent_id="doctor")
    try:
        await runtime.start_up()
        if shutil.which("bwrap"):
            return Finding("local runtime", "ok", runtime.isolation)
        return Finding(
            "local runtime", "note", runtime.isolation, "sudo apt-get install bubblewrap"
        )
    finally:
        await runtime.close()


def _image(name: str, state: ImageState) -> Finding:
    if state is ImageState.READY:
        return Finding(f"image {name}", "ok", "built")
    return Finding(f"image {name}", "note", "will be built by the first start of `jupyter sorna`")


def _data_dir() -> Finding:
    path = places.data_dir()
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return Finding("data", "missing", f"{existing} is in the way: it is no directory")
    if not os.access(existing, os.W_OK):
        return Finding(
            "data", "missing", f"{path} can't be written", f"sudo chown -R $USER {existing}"
        )
    free = shutil.disk_usage(existing).free
    if free < 1 << 30:
        return Finding(
            "data",
            "note",
            f"{path}: only {free >> 20} MiB free",
            "make room: images and journals lie on disk",
        )
    return Finding("data", "ok", f"{path} ({free >> 30} GiB free)")


def _runtime_dir() -> Finding:
    path = places.runtime_dir(places.data_dir())
    # The longest name in it: k/<13 characters>/k-5
    if len(str(path)) + 22 > 107:
        return Finding(
            "sockets",
            "missing",
            f"{path}: too long for a socket's address",
            "export SORNA_RUNTIME_DIR=/tmp/sorna-$USER",
        )
    return Finding("sockets", "ok", str(path))


def _gateway() -> Finding:
    from sorna_jupyter.remote import credentials

    running = credentials.running()
    if running:
        return Finding("server", "ok", f"runs at {running[0]}")
    return Finding("server", "ok", NOT_RUNNING)

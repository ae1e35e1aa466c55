"""The Docker engine as threads see it: one client, its builds, its events, its errors in our words.

The SDK blocks, so everything here runs in threads; `docker` calls it from the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors
import requests
import urllib3.exceptions

from sorna_agent.runtimes.container import KERNEL_LABEL, Identity, choose_identity
from sorna_agent.runtimes.images import BuildProgress, ImageFolder
from sorna_jupyter.exceptions import ImageUnavailable, RuntimeUnavailable

T = TypeVar("T")


class Engine:
    """One client for all threads, made when the engine first answers."""

    def __init__(self, base_url: str | None) -> None:
        self._base_url = base_url
        self._client: docker.DockerClient | None = None
        self._info: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        with self._translated():
            return function(self._connected(), *arguments)

    def info(self, client: docker.DockerClient) -> dict[str, Any]:
        if self._info is None:
            self._info = client.info()
        return self._info

    def identity(self, client: docker.DockerClient) -> Identity:
        return choose_identity(self.info(client), os.geteuid(), os.getegid())

    def build(
        self, folder: ImageFolder, progress: BuildProgress, tell: Callable[[float, str], None]
    ) -> None:
        """Raises ImageUnavailable with the last lines if that fails. `tell` at most 5 a second."""
        with self._translated():
            stream = self._connected().api.build(
                path=str(folder.path),
                tag=folder.reference,
                buildargs=folder.build_args,
                labels=folder.labels,
                rm=True,
                forcerm=True,
                decode=True,
                timeout=3600,
            )
            last = 0.0
            try:
                for entry in stream:
                    progress.feed(entry)
                    if time.monotonic() - last > 0.2:
                        tell(progress.progress, progress.message)
                        last = time.monotonic()
            except docker.errors.APIError as error:
                progress.error = str(error.explanation)
        if progress.error:
            raise ImageUnavailable(progress.failure)

    def events(self) -> Any:
        with self._translated():
            filters = {
                "type": ["container", "image"],
                "event": ["die", "tag", "untag", "delete", "load", "pull"],
            }
            return self._connected().api.events(filters=filters, decode=True)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connected(self) -> docker.DockerClient:
        with self._lock:
            if self._client is None:
                if self._base_url is None:
                    self._client = docker.from_env(timeout=60)
                else:
                    self._client = docker.DockerClient(base_url=self._base_url, timeout=60)
            return self._client

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        away = (
            requests.exceptions.ConnectionError,
            requests.exceptions.Timeout,
            requests.exceptions.ChunkedEncodingError,
            urllib3.exceptions.HTTPError,
        )
        try:
            yield
        except docker.errors.APIError:
            raise  # it answers; the caller knows what its answer means
        except docker.errors.BuildError as error:
            raise ImageUnavailable(str(error)) from error
        except (docker.errors.DockerException, *away) as error:
            self._info = None  # it may come back as another
            raise RuntimeUnavailable(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        where = self._base_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if "PermissionError" in str(error):
            return (
                f"The Docker engine at {where} refuses this user; "
                "`sudo usermod -aG docker $USER` and a new login let it in"
            )
        return f"The Docker engine at {where} does not answer"


class Watcher:
    """Reads the engine's events in a thread of its own, and connects again whenever they end."""

    def __init__(
        self,
        engine: Engine,
        on_connect: Callable[[], object],
        on_death: Callable[[str], object],
        on_image: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._on_connect = on_connect
        self._on_death = on_death
        self._on_image = on_image
        self._stopping = threading.Event()
        self._events: Any = None
        self._thread = threading.Thread(target=self._run, name="docker events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        events = self._events
        if events is not None:
            events.close()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(RuntimeUnavailable, docker.errors.APIError):
                self._events = self._engine.events()
                if self._stopping.is_set():  # meanwhile: `stop` closed none, or an older one
                    self._events.close()
                    return
                # Only now: what happens from here on comes as an event, what was before by list.
                self._on_connect()
                for event in self._events:
                    if self._stopping.is_set():
                        return
                    self._dispatch(event)
            self._stopping.wait(1)

    def _dispatch(self, event: dict[str, Any]) -> None:
        if event.get("Type") == "image":
            self._on_image()
        elif kernel_id := event.get("Actor", {}).get("Attributes", {}).get(KERNEL_LABEL):
            self._on_death(kernel_id)


def engine_address() -> str | None:
    """None: what the SDK takes, DOCKER_HOST or the usual socket. Else a user's own engine."""
    if os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists():
        return None
    for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), str(Path.home() / ".docker/run")):
        if folder and (socket := Path(folder) / "docker.sock").exists():
            return f"unix://{socket}"
    return None


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """For work that may block long and must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # raised again where it is awaited
            answer: tuple[Callable[[Any], None], Any] = (future.set_exception, error)
        else:
            answer = (future.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *answer)

    threading.Thread(target=run, name="docker build", daemon=True).start()
    return await future

"""The notebooks of kernels' sessions: files that jupyter_server's contents manager keeps.

Which document uses which kernel stands in the registry. The contents manager's errors become
`NotebookNotWritten` here. Used by `unattended`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyter_server.utils import ensure_async
from tornado.web import HTTPError

from sorna_jupyter.exceptions import NotebookNotWritten
from sorna_jupyter.registry import Registry

_held: ContextVar[frozenset[str]] = ContextVar("paths that this task holds", default=frozenset())


class SornaContentsManager(AsyncLargeFileManager):
    """The stock manager of files, but one at a time reads or writes a file.

    The stock one writes in a thread, into the file itself; who reads meanwhile finds half a
    notebook, takes it for broken, and puts the older one in its place.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def holding(self, path: str) -> AsyncIterator[None]:
        """Nobody else reads or writes this file meanwhile. May be nested."""
        path = path.strip("/")
        if path in _held.get():
            yield
            return
        async with self._locks.setdefault(path, asyncio.Lock()):
            token = _held.set(_held.get() | {path})
            try:
                yield
            finally:
                _held.reset(token)

    async def get(
        self,
        path: str,
        content: bool = True,
        type: str | None = None,
        format: str | None = None,
        require_hash: bool = False,
    ) -> dict[str, Any]:
        async with self.holding(path) if content or require_hash else nullcontext():
            model: dict[str, Any] = await super().get(  # type: ignore[no-untyped-call]
                path, content=content, type=type, format=format, require_hash=require_hash
            )
        return model

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        async with self.holding(path):
            saved: dict[str, Any] = await super().save(  # type: ignore[no-untyped-call]
                model, path
            )
        return saved


ATTEMPTS = 5
"""how often an edit is begun anew when someone else saves meanwhile"""


class Notebooks:
    """What may be written to for a kernel's owner, and how."""

    def __init__(self, contents: Any, registry: Registry) -> None:
        """`contents`: jupyter_server's contents manager; its methods may be coroutines or not."""
        self._contents = contents
        self._registry = registry

    async def paths(self, kernel_id: str, owner: str) -> list[str]:
        """The notebooks that use this kernel, for all that its owner may write."""
        user = await self._registry.find_user(owner)
        if user is None or not user.is_admin:
            return []  # as `SornaAuthorizer` has it: contents are for admins
        return [
            session.path
            for session in await self._registry.list_sessions(owner)
            if session.kernel_id == kernel_id and session.type == "notebook"
        ]

    async def edit(self, path: str, change: Callable[[dict[str, Any], float], bool]) -> None:
        """Let `change` change the notebook's content (nbformat 4), and save it.

        `change` is also given when the notebook was last saved (Unix time), and returns whether
        it changed anything; if someone else saves meanwhile, it is called anew with what they
        saved. Raises `NotebookNotWritten`.
        """
        try:
            async with self._holding(path):
                await self._edit(path, change)
        except HTTPError as error:
            reason = error.log_message or error.reason or f"error {error.status_code}"
            raise NotebookNotWritten(f"{path}: {reason}") from error

    def _holding(self, path: str) -> AbstractAsyncContextManager[None]:
        if isinstance(self._contents, SornaContentsManager):
            return self._contents.holding(path)
        return nullcontext()

    async def _edit(self, path: str, change: Callable[[dict[str, Any], float], bool]) -> None:
        for _ in range(ATTEMPTS):
            model = await self._get(path, content=True)
            if not change(model["content"], model["last_modified"].timestamp()):
                return
            # Another process may write the file, and other contents managers let others between.
            now = await self._get(path, content=False)
            if now["last_modified"] == model["last_modified"]:
                saved = {"type": "notebook", "format": "json", "content": model["content"]}
                await ensure_async(self._contents.save(saved, path))
                return
        raise NotebookNotWritten(f"{path}: someone else saves it all the time")

    async def _get(self, path: str, *, content: bool) -> dict[str, Any]:
        model: dict[str, Any] = await ensure_async(
            self._contents.get(path, content=content, type="notebook")
        )
        return model

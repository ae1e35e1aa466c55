"""What tests of runtimes need: short directories, launches, a client straight on the sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import secrets
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous import AsyncKernelClient

from sorna_agent.runtimes import PORTS, Launch, Runtime, Started


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Where sockets' paths stay below 107 characters, as in an agent's runtime directory."""
    path = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def new_launch(parent: Path, **fields: Any) -> Launch:
    kernel_id = str(uuid.uuid4())
    directory = parent / kernel_id[:13]
    directory.mkdir(mode=0o700)
    options = {"image": "python3", "owner": "ann", "key": secrets.token_hex(16)}
    return Launch(kernel_id=kernel_id, directory=directory, **(options | fields))


class Deaths:
    """Collects what a runtime reports."""

    def __init__(self, runtime: Runtime) -> None:
        self.seen: list[tuple[str, str]] = []
        self._arrived = asyncio.Event()
        runtime.on_death(self._note)

    def _note(self, kernel_id: str, reason: str) -> None:
        self.seen.append((kernel_id, reason))
        self._arrived.set()

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(30):
            while not self.seen:
                self._arrived.clear()
                await self._arrived.wait()
        return self.seen.pop(0)


class Attached:
    """A client of one kernel."""

    def __init__(self, client: AsyncKernelClient) -> None:
        self.client = client

    async def run(self, code: str) -> str:
        """What the code printed, or the name and text of its error."""
        printed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = await self.client.execute_interactive(
            code, output_hook=hear, allow_stdin=False, timeout=60
        )
        content = reply["content"]
        if content["status"] == "error":
            return f"{content['ename']}: {content['evalue']}"
        return "".join(printed).strip()

    def send(self, code: str) -> None:
        """Without waiting, for code that does not come back."""
        self.client.execute(code)

    async def run_until_output(self, code: str) -> None:
        """Returns at the first output, while the code goes on."""
        self.client.execute(code)
        while (await self.client.get_iopub_msg(timeout=60))["msg_type"] != "stream":
            pass

    async def next_reply(self) -> dict[str, Any]:
        while True:
            reply = await self.client.get_shell_msg(timeout=60)
            if reply["msg_type"] == "execute_reply":
                return dict(reply["content"])


@contextlib.asynccontextmanager
async def attached(started: Started, launch: Launch) -> AsyncIterator[Attached]:
    client = AsyncKernelClient()
    client.load_connection_info(
        {
            "transport": started.transport,
            "ip": started.address,
            **PORTS,
            "key": launch.key,
            "signature_scheme": "hmac-sha256",
        }
    )
    client.start_channels(hb=False)
    try:
        # Shell may be connected before iopub is: go on until both have answered.
        while True:
            await client.kernel_info(reply=True, timeout=60)
            with contextlib.suppress(queue.Empty):
                await client.get_iopub_msg(timeout=0.5)
                break
        yield Attached(client)
    finally:
        client.stop_channels()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def wait_until_gone(pid: int) -> None:
    """By a pidfd: no polling."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), 30)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)

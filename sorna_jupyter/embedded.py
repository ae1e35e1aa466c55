"""The agent of a gateway that stands alone: a child process, started, watched and stopped here.

The child outlives a gateway that is killed, so that the next one on the same data directory finds
its kernels again: it keeps a lock there, and no second child is started while it does.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentSettings:
    """What the child is started with; nothing secret, as anyone may read a command line."""

    data_dir: Path
    runtime_dir: Path
    manager_address: str
    manager_key: str
    """Z85 public key of the gateway, for both directions"""
    join_token_file: Path
    runtime: str
    orphan_timeout: float
    more: tuple[str, ...] = ()
    """further arguments, as they are"""

    def argv(self) -> list[str]:
        return [
            *(sys.executable, "-m", "sorna_agent.app"),
            *("--manager-addr", self.manager_address),
            *("--manager-key", self.manager_key),
            *("--gateway-key", self.manager_key),
            *("--join-token-file", str(self.join_token_file)),
            *("--data-dir", str(self.data_dir)),
            *("--runtime-dir", str(self.runtime_dir)),
            *("--runtime", self.runtime),
            *("--orphan-timeout", f"{self.orphan_timeout:g}"),
            *self.more,
        ]


class EmbeddedAgent:
    """Keeps one agent process running until `stop`."""

    RESTART_DELAY = 1.0
    STOP_TIMEOUT = 30.0

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._keep_running(), name="embedded agent")

    async def _keep_running(self) -> None:
        quick_ends = 0
        while True:
            if other := self._other_pid():
                log.info("the agent of an earlier start still runs: its kernels are adopted")
                await _ends(other, timeout=None)
                continue
            started = asyncio.get_running_loop().time()
            # A session of its own: Ctrl-C in the terminal is for the gateway, which then stops
            # the agent in its turn.
            self._process = await asyncio.create_subprocess_exec(
                *self._settings.argv(), stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            status = await self._process.wait()
            quick = asyncio.get_running_loop().time() - started < 10
            quick_ends = quick_ends + 1 if quick else 0
            log.error("the agent ended with status %s; starting it again", status)
            await asyncio.sleep(self.RESTART_DELAY * 2 ** min(quick_ends, 5))

    def _other_pid(self) -> int | None:
        """The agent of an earlier start, if it runs: it holds the lock, and wrote its id there.

        Without the lock the number in the file is history, and may be any process by now.
        """
        try:
            with (self._settings.data_dir / "lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read())
        except (FileNotFoundError, ValueError):
            return None
        return None

    def leave(self) -> None:
        """Stop watching, and let the agent run on."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def stop(self) -> None:
        """It and its kernels are gone when this returns."""
        self.leave()
        pid = self._pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            if not await _ends(pid, self.STOP_TIMEOUT):
                log.warning("the agent did not stop within %g s; it is killed", self.STOP_TIMEOUT)
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()

    def _pid(self) -> int | None:
        if self._process is not None and self._process.returncode is None:
            return self._process.pid
        return self._other_pid()


async def _ends(pid: int, timeout: float | None) -> bool:
    """Whether the process, which need not be a child of ours, is gone within that time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(timeout):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return True

"""Deletes the remote kernel when the local proxy kernel is gone, however it went.

A process of its own, because nothing inside the proxy survives a `kill -9`. It does nothing but
read a pipe: each line is the kernel to guard now (an empty one: none), and the end of the pipe is
the end of the proxy. This is the only place that deletes a proxy's kernel; a proxy that
stops in an orderly way closes the pipe and waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from sorna_jupyter.exceptions import NotAllowed, NotFound, SornaError
from sorna_jupyter.remote import credentials
from sorna_jupyter.remote.server import Server

PATIENCE = 600.0
"""Seconds to try again if the server can't be reached; then its own idle timeout must do."""

CREATION_TIME = 60.0
"""Seconds until a kernel that was asked for when the proxy died must have come into being."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """The kernel to delete at the end; `exists` as soon as the server has said so."""

    kernel_id: str = ""
    exists: bool = True

    def to_line(self) -> bytes:
        return f"{self.kernel_id} {'exists' if self.exists else 'asked-for'}\n".encode()

    @classmethod
    def from_line(cls, line: str) -> Guarded:
        kernel_id, _, word = line.strip().rpartition(" ")
        return cls(kernel_id, word == "exists")


class Guardian:
    """The proxy's side: starts the process, tells it what to guard, waits for it at the end."""

    def __init__(self, url: str) -> None:
        # Nothing of ours stays open in it: clients read a kernel's stderr until it ends. A
        # session of its own, so that what kills the proxy's process group does not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sorna_jupyter.remote.guardian", "--url", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._url = url
        self._guarded = Guarded()

    def guard(self, kernel_id: str, *, exists: bool = True) -> None:
        """From now on, `kernel_id` goes when this process goes. Empty: there is no kernel.

        Call it before the kernel is asked for, too: killed in between, we would leave it behind.
        """
        self._guarded = Guarded(kernel_id, exists)
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(self._guarded.to_line())
            pipe.flush()
        except OSError:
            pass  # It was killed; `finish` then does its work.

    async def finish(self, timeout: float) -> None:
        """Let the kernel be deleted now, and wait for it; after `timeout` it goes on alone."""
        await asyncio.to_thread(self._finish, timeout)

    def _finish(self, timeout: float) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass
        try:
            if self._process.wait(timeout) < 0:
                delete_kernel(self._url, self._guarded, patience=timeout)
        except subprocess.TimeoutExpired:
            pass


def delete_kernel(url: str, guarded: Guarded, patience: float, token: str | None = None) -> bool:
    """Delete the kernel, trying again while the server can't be reached.

    The token is looked up each time, because a gateway that was restarted has another; `token`
    is the one to use where there is none any more.
    """
    if not guarded.kernel_id:
        return True
    started, pause = time.monotonic(), 0.25
    while True:
        try:
            server = Server(url, credentials.token_for(url) or token or "")
            server.delete(f"/api/kernels/{guarded.kernel_id}")
            return True
        except NotFound:
            # One that is still being made may be unknown yet, and there a moment later.
            if guarded.exists or time.monotonic() > started + min(patience, CREATION_TIME):
                return True
        except NotAllowed:
            return False
        except SornaError:
            if time.monotonic() > started + patience:
                return False
        time.sleep(pause)
        pause = min(pause * 2, 2.0 if not guarded.exists else 30.0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sorna_jupyter.remote.guardian", description=__doc__)
    parser.add_argument("--url", required=True)
    url = parser.parse_args(argv).url
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # It ends when the proxy ends and its kernel is gone, and not before.
        signal.signal(number, signal.SIG_IGN)
    token = credentials.token_for(url)
    guarded = Guarded()
    for line in sys.stdin:
        guarded = Guarded.from_line(line)
    return 0 if delete_kernel(url, guarded, PATIENCE, token) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

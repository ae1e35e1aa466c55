"""A second Docker engine that a test may stop, beside the one that everyone uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

START_DOCKER = Path(__file__).parents[2] / "scripts/start-docker"


class SecondEngine:
    """In a network namespace of its own: it would take docker0 away from the first otherwise."""

    def __init__(self, *options: str) -> None:
        """`options`: more of dockerd's."""
        self.root = Path(tempfile.mkdtemp(prefix="sorna-engine-", dir="/var/tmp"))
        self.socket = self.root / "docker.sock"
        self.namespace = self.root.name
        self.env = os.environ | {
            "DOCKER_SOCK": str(self.socket),
            "DOCKER_DATA": str(self.root / "data"),
            "DOCKER_RUN": str(self.root / "run"),
            "DOCKER_LOG": str(self.root / "log"),
            "DOCKER_NETNS": self.namespace,
            "DOCKER_OPTIONS": " ".join(options),
        }
        self.env.pop("DOCKER_HOST", None)

    @property
    def host(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        subprocess.run([START_DOCKER], env=self.env, check=True, timeout=90)

    def stop(self) -> None:
        subprocess.run([START_DOCKER, "--stop"], env=self.env, check=True, timeout=90)

    def take_image(self, reference: str) -> None:
        """Copy an image of the engine that everyone uses."""
        with subprocess.Popen(["docker", "save", reference], stdout=subprocess.PIPE) as save:
            subprocess.run(
                ["docker", "-H", self.host, "load", "-q"],
                stdin=save.stdout,
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=240,
            )

    def containers(self) -> list[str]:
        asked = subprocess.run(
            ["docker", "-H", self.host, "ps", "-aq"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return asked.stdout.split()

    def remove(self) -> None:
        for container in self.containers():
            subprocess.run(["docker", "-H", self.host, "rm", "-f", container], timeout=60)
        self.stop()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((m for m in mounts if m.startswith(f"{self.root}/")), reverse=True):
            subprocess.run(["umount", "-l", mount])
        subprocess.run(["ip", "netns", "del", self.namespace])
        shutil.rmtree(self.root, ignore_errors=True)

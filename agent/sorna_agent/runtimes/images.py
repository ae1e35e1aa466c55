"""Kernel images as folders and as lines of a build log. No engine here; used by `docker`.

An image folder holds a Dockerfile and a kernel.json, perhaps a logo. Its tag carries a hash of its
content and of the base image, so a changed folder is a missing image, and an unchanged one is never
built twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorna_agent.runtimes import LOGO

SPEC_LABEL = "org.sorna.kernelspec"
NAME_LABEL = "org.sorna.name"
FOLDER_LABEL = "org.sorna.folder"


@dataclass(frozen=True)
class ImageFolder:
    path: Path
    spec: dict[str, Any]
    base_image: str | None
    """instead of the Dockerfile's own default"""

    @property
    def name(self) -> str:
        return spec_name(self.spec) or self.path.name

    @property
    def reference(self) -> str:
        return f"sorna-kernel-{self.path.name.lower()}:{self._hash()}"

    @property
    def logo(self) -> bytes:
        path = self.path / LOGO
        return path.read_bytes() if path.is_file() else b""

    @property
    def labels(self) -> dict[str, str]:
        return {
            SPEC_LABEL: json.dumps(self.spec),
            NAME_LABEL: self.name,
            FOLDER_LABEL: self.path.name,
        }

    @property
    def build_args(self) -> dict[str, str]:
        return {"BASE_IMAGE": self.base_image} if self.base_image else {}

    def _hash(self) -> str:
        digest = hashlib.sha256((self.base_image or "").encode())
        for file in sorted(self.path.rglob("*")):
            # Bytecode and its folder appear when someone imports from here; they change nothing.
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(b"\0" + str(file.relative_to(self.path)).encode() + b"\0")
                digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


def find_folders(parents: Iterable[Path], base_image: str | None) -> list[ImageFolder]:
    """Every folder with a Dockerfile and a readable kernel.json in `parents`; for one name, the
    first."""
    found: dict[str, ImageFolder] = {}
    for parent in parents:
        for dockerfile in sorted(parent.glob("*/Dockerfile")):
            try:
                spec = json.loads((dockerfile.parent / "kernel.json").read_text())
            except (OSError, ValueError):
                continue
            if isinstance(spec, dict) and spec.get("argv"):
                folder = ImageFolder(dockerfile.parent, spec, base_image)
                found.setdefault(folder.name, folder)
    return list(found.values())


def spec_name(spec: Mapping[str, Any]) -> str:
    """The kernelspec's name where the spec says it itself: `metadata.sorna.name`."""
    sorna = spec.get("metadata", {}).get("sorna", {})
    return str(sorna.get("name", ""))


def label_spec(labels: Mapping[str, str]) -> dict[str, Any] | None:
    """The kernelspec in an image's label; None where it is no kernelspec."""
    try:
        spec = json.loads(labels.get(SPEC_LABEL, ""))
    except ValueError:
        return None
    return spec if isinstance(spec, dict) and isinstance(spec.get("argv"), list) else None


class BuildProgress:
    """Folds an engine's build stream into a fraction, a sentence, and the last lines of a failure.

    A step counts as much as any other; within one, each line of output takes a thirtieth of what
    is left, since nobody knows how many will come.
    """

    KEEP = 12

    def __init__(self) -> None:
        self.progress = 0.0
        self.message = "starting"
        self.error = ""
        self._lines: list[str] = []
        self._step, self._steps = 0, 1
        self._within = 0.0
        self._layers: dict[str, tuple[int, int]] = {}

    @property
    def failure(self) -> str:
        """Why it failed: the last lines of output, then the engine's error."""
        return "\n".join([*self._lines[-self.KEEP :], self.error]).strip()

    def feed(self, entry: Mapping[str, Any]) -> None:
        if "error" in entry:
            self.error = str(entry["error"])
        elif "stream" in entry:
            for line in str(entry["stream"]).splitlines():
                self._feed_line(_without_colours(line).strip())
        elif "status" in entry:
            self._feed_pull(entry)
        self.progress = min(0.99, max(self.progress, self._fraction()))

    def _fraction(self) -> float:
        return (max(self._step - 1, 0) + self._within) / self._steps

    def _feed_line(self, line: str) -> None:
        if match := re.match(r"Step (\d+)/(\d+) : (.*)", line):
            self._step, self._steps = int(match[1]), int(match[2])
            self._within = 0.0
            self._layers.clear()
            self.message = f"step {self._step} of {self._steps}: {_plain_instruction(match[3])}"
            return
        if not line or line.startswith(("---> ", "Removing intermediate", "Successfully ")):
            return
        self._lines = [*self._lines[-self.KEEP :], line]
        self._within += (1 - self._within) / 30
        if what := _plain_output(line):
            self.message = f"step {self._step} of {self._steps}: {what}"

    def _feed_pull(self, entry: Mapping[str, Any]) -> None:
        detail = entry.get("progressDetail") or {}
        if not detail.get("total"):
            return
        self._layers[str(entry.get("id"))] = (int(detail.get("current", 0)), int(detail["total"]))
        current = sum(done for done, _ in self._layers.values())
        total = sum(size for _, size in self._layers.values())
        self._within = max(self._within, min(0.99, current / total))
        self.message = f"downloading the base image: {current >> 20} of {total >> 20} MiB"


def _plain_instruction(instruction: str) -> str:
    verb, _, rest = instruction.partition(" ")
    rest = " ".join(rest.split())
    match verb.upper():
        case "FROM":
            return f"getting the base image {rest}"
        case "RUN" if "pip install" in rest:
            return "installing Python packages"
        case "RUN" if "apt-get" in rest:
            return "installing Debian packages"
        case "RUN":
            return f"running {_shorten(rest)}"
        case "COPY" | "ADD":
            return "copying files"
        case _:
            return f"setting {verb.lower()}"


def _plain_output(line: str) -> str:
    """What a line of pip's or apt's output tells of the work; empty where it tells nothing."""
    verb, _, rest = line.partition(" ")
    name = re.split(r"[<>=!~;\[ (]", rest, maxsplit=1)[0]
    match verb:
        case "Collecting":
            return f"looking for {name}"
        case "Downloading":
            return f"downloading {_shorten(rest.rsplit('/', 1)[-1])}"
        case "Installing" if rest.startswith("collected packages"):
            return f"installing {rest.count(',') + 1} packages"
        case "Unpacking" | "Setting":
            return _shorten(line.removesuffix(" ..."))
    return ""


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _without_colours(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)

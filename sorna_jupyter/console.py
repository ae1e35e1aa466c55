"""What `jupyter sorna` shows in the terminal it was started in: one URL, and images being built."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sorna_jupyter.protocol import Beat, ImageState


class ServerConsole:
    """Prints to stderr, as the log does, so that stdout stays free."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._said: set[str] = set()

    def welcome(self, url: str) -> None:
        self._console.print(f"\n  [bold]Sorna Jupyter[/bold] is running at\n\n    {url}\n")
        if sys.stdin and sys.stdin.isatty():
            self._console.print("  Ctrl-C stops it and all its kernels.\n")

    def say(self, sentence: str) -> None:
        """Once, however often it comes."""
        if sentence not in self._said:
            self._said.add(sentence)
            self._console.print(f"  {sentence}")

    def show(self, beat: Beat) -> None:
        """How far the kernels are isolated, and a bar for every image that is being built."""
        self.say(beat.isolation)
        building = {i.name: i for i in beat.images if i.state is ImageState.BUILDING}
        for image in building.values():
            if image.name not in self._bars:
                self.say(f"Kernels of {image.name!r} start once its image is built (once only).")
                self._bars[image.name] = self._bar().add_task(
                    f"image {image.name}", total=1.0, message=""
                )
            self._bar().update(
                self._bars[image.name], completed=image.progress, message=image.message[:60]
            )
        for image in beat.images:
            if image.name in self._bars and image.name not in building:
                self._bar().update(
                    self._bars.pop(image.name), completed=1.0, message=image.state.value
                )
                if image.state is ImageState.READY:
                    self.say(f"Image {image.name!r} is ready.")
                else:
                    self.say(
                        f"Image {image.name!r} could not be built: {image.message}\n"
                        "  `jupyter sorna images build` tries again; --base-image=NAME builds on "
                        "another base."
                    )
        if not self._bars and self._progress is not None:
            self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _bar(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[message]}"),
                console=self._console,
            )
            self._progress.start()
        return self._progress

"""What people see in the terminal while the server starts and images are built."""

from __future__ import annotations

import io

from rich.console import Console

from sorna_jupyter.console import ServerConsole
from sorna_jupyter.protocol import Beat, ImageState, ImageStatus, Slots


def a_beat(state: ImageState, progress: float = 0.0, message: str = "") -> Beat:
    image = ImageStatus(
        name="python3", reference="r:1", state=state, spec={}, progress=progress, message=message
    )
    return Beat(
        agent_id="a",
        join_token="t",
        public_key="k",
        addresses=[],
        host="h",
        runtime="docker",
        isolation="Kernels are boxed in.",
        slots=Slots(cpus=1, memory=1, kernels=1),
        images=[image],
        kernels=[],
        relay_started=0.0,
    )


def shown(*beats: Beat, terminal: bool = False) -> str:
    out = io.StringIO()
    console = ServerConsole(
        Console(file=out, force_terminal=terminal, width=100, color_system=None, highlight=False)
    )
    console.welcome("http://localhost:8888/tree?token=t")
    for beat in beats:
        console.show(beat)
    console.close()
    return out.getvalue()


def test_one_url_and_one_sentence_on_isolation() -> None:
    text = shown(a_beat(ImageState.READY), a_beat(ImageState.READY))

    assert text.count("http://localhost:8888/tree?token=t") == 1
    assert text.count("Kernels are boxed in.") == 1
    assert "image" not in text.lower()


def test_an_image_that_is_built_has_a_bar_until_it_is_ready() -> None:
    text = shown(
        a_beat(ImageState.MISSING),
        a_beat(ImageState.BUILDING, 0.25, "installing numpy"),
        a_beat(ImageState.BUILDING, 0.75, "compiling"),
        a_beat(ImageState.READY),
        terminal=True,
    )

    assert "image python3" in text
    assert "100 %" in text
    assert "Image 'python3' is ready." in text


def test_a_failed_build_says_why_and_what_to_type() -> None:
    text = shown(
        a_beat(ImageState.BUILDING, 0.5, "pip install"),
        a_beat(ImageState.FAILED, message="no such host"),
    )

    assert "could not be built: no such host" in text
    assert "jupyter sorna images build" in text

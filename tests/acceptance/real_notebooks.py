"""Notebooks that nobody here wrote: fetched from public packages, compared after normalisation.

Nothing of them is kept in this repository. They are taken from PyPI's source distributions at the
pinned versions, once, into `.cache/notebooks`.

| notebook | source distribution | licence | what it exercises |
| --- | --- | --- | --- |
| Factorials, Clear Output | nbclient 0.11.0 | BSD-3-Clause | streams, clear_output, display ids |
| Output | nbclient 0.11.0 | BSD-3-Clause | output widgets that capture by message id |
| JupyterWidgets | nbclient 0.11.0 | BSD-3-Clause | comms, custom messages |
| update-display-id | nbclient 0.11.0 | BSD-3-Clause | update_display_data across cells |
| Widget_List | nbconvert 7.17.2 | BSD-3-Clause | 44 cells of widgets, one with a failing one |
| pngmetadata | nbconvert 7.17.2 | BSD-3-Clause | retina plots with their metadata |
| text_outputs_and_images | jupytext 1.19.6 | MIT | pandas, matplotlib, logging, a NameError |
| nteract_with_parameter | jupytext 1.19.6 | MIT | pandas plot, papermill's parameters |
| simple_execute | papermill 2.7.0 | BSD-3-Clause | papermill's own |
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

CACHE = Path(__file__).parents[2] / ".cache/notebooks"
INPUTS = "tests/data/notebooks/inputs/ipynb_py"


@dataclass(frozen=True)
class RealNotebook:
    package: str
    version: str
    member: str
    parameters: dict[str, Any] = field(default_factory=dict)
    """what papermill passes on"""
    allow_errors: bool = False
    """a cell of it is meant to fail"""

    @property
    def name(self) -> str:
        return Path(self.member).stem

    def path(self) -> Path:
        """Fetched the first time."""
        archive = fetch(self.package, self.version)
        kept = archive.parent / f"{self.package}-{self.name}.ipynb"
        if not kept.exists():
            with tarfile.open(archive) as tar:
                member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{self.member}")
                assert member
                kept.write_bytes(member.read())
        return kept

    def read(self) -> NotebookNode:
        """As format 4.5 wants it, without all that an earlier run has left."""
        notebook = nbformat.read(self.path(), as_version=4)
        notebook.nbformat_minor = 5
        notebook.metadata.pop("widgets", None)
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        return notebook


NOTEBOOKS = [
    RealNotebook("nbclient", "0.11.0", "tests/files/Factorials.ipynb"),
    RealNotebook("nbclient", "0.11.0", "tests/files/Clear Output.ipynb"),
    RealNotebook("nbclient", "0.11.0", "tests/files/Output.ipynb", allow_errors=True),
    RealNotebook("nbclient", "0.11.0", "tests/files/JupyterWidgets.ipynb"),
    RealNotebook("nbclient", "0.11.0", "tests/files/update-display-id.ipynb"),
    RealNotebook("nbconvert", "7.17.2", "tests/files/Widget_List.ipynb", allow_errors=True),
    RealNotebook("nbconvert", "7.17.2", "tests/exporters/files/pngmetadata.ipynb"),
    RealNotebook(
        "jupytext", "1.19.6", f"{INPUTS}/text_outputs_and_images.ipynb", allow_errors=True
    ),
    RealNotebook("jupytext", "1.19.6", f"{INPUTS}/nteract_with_parameter.ipynb", {"param": 7}),
    RealNotebook(
        "papermill",
        "2.7.0",
        "papermill/tests/notebooks/simple_execute.ipynb",
        {"msg": "Hello from papermill"},
    ),
]


def fetch(package: str, version: str) -> Path:
    """The source distribution, through pip as this machine has it set up."""
    archive = CACHE / f"{package}-{version}.tar.gz"
    if not archive.exists():
        argv = ["download", "--quiet", "--no-deps", "--no-binary", package, "-d", str(CACHE)]
        subprocess.run(
            [sys.executable, "-m", "pip", *argv, f"{package}=={version}"],
            check=True,
            capture_output=True,
            timeout=240,
        )
    return archive


def essence(notebook: NotebookNode) -> list[dict[str, Any]]:
    """What two runs of a notebook must agree on, cell by cell."""
    return [
        {"source": cell.source, "count": cell.execution_count, "outputs": _outputs(cell.outputs)}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _outputs(outputs: list[NotebookNode]) -> list[Any]:
    # stdout and stderr are two streams; how they interleave is chance
    streams: dict[str, str] = {}
    rest = []
    for output in outputs:
        if output.output_type == "stream":
            streams[output.name] = streams.get(output.name, "") + output.text
        elif output.output_type == "error":
            rest.append(("error", output.ename, _stable(output.evalue)))
        else:
            data = {mime: _content(mime, value) for mime, value in sorted(output.data.items())}
            rest.append((output.output_type, output.get("execution_count"), data))
    return [{name: _stable(text) for name, text in streams.items()}, *rest]


def _content(mime: str, value: Any) -> Any:
    if mime == "image/png":
        return "png" if base64.b64decode(value).startswith(b"\x89PNG") else "broken"
    if mime == "application/vnd.jupyter.widget-view+json":
        return {**value, "model_id": "…"}
    return _stable(value) if isinstance(value, str) else value


def _stable(text: str) -> str:
    """Without what differs from process to process: addresses, process numbers, temp files."""
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    return re.sub(r"ipykernel_\d+[/_]\d+(\.py)?", "ipykernel_…", text)

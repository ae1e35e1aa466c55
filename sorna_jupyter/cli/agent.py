"""`jupyter sorna agent`: an agent on this machine, for a gateway elsewhere."""

from __future__ import annotations

from sorna_jupyter import places
from sorna_jupyter.cli.server import reporting


@reporting
def main(argv: list[str]) -> int:
    """Where an agent keeps things has a default here; options given later win."""
    from sorna_agent import app

    data = places.data_dir() / "agent"
    runtime = places.runtime_dir(data)
    arguments = ["--data-dir", str(data), "--runtime-dir", str(runtime), *argv]
    options = app.parse_options(arguments)
    places.make_private(options.data_dir)
    places.make_private(options.runtime_dir)
    app.main(arguments)
    return 0

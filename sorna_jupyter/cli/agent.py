"""`jupyter sorna agent`: an agent on this machine, for a gateway elsewhere."""

from __future__ import annotations

from sorna_jupyter import places


def main(argv: list[str]) -> int:
    """Where an agent keeps things has a default here; options given later win."""
    from sorna_agent.app import main as run_agent

    data = places.data_dir() / "agent"
    run_agent(["--data-dir", str(data), "--runtime-dir", str(places.runtime_dir(data)), *argv])
    return 0

"""`jupyter sorna agent`: an agent on this machine, for a gateway elsewhere."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from sorna_agent.app import main as run_agent

    run_agent(argv)
    return 0

"""`jupyter sorna …`: one file a subcommand; without one, the server starts."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "agent": "run an agent on this machine, for a gateway elsewhere",
    "doctor": "say what is found, what is missing and what to type",
    "images": "list or build kernel images",
    "kernelspec": "install remote kernels beside the local ones",
    "login": "remember the credential of a server",
    "logout": "forget it",
    "logs": "show what a kernel's process wrote",
    "ps": "list kernels",
    "run": "run code and stream its output",
    "stop": "stop kernels",
    "token": "make, list and revoke users' tokens",
}
MODULES = {"logs": "ps", "stop": "ps", "logout": "login"}
"""commands that share a file with another"""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        module = importlib.import_module(f"sorna_jupyter.cli.{MODULES.get(name, name)}")
        function = getattr(module, name if name in MODULES else "main")
        try:
            return int(function(arguments[1:]) or 0)
        except BrokenPipeError:
            return 1
    if arguments and not arguments[0].startswith("-"):
        known = ", ".join(COMMANDS)
        print(f"jupyter sorna: no command {arguments[0]!r}; there are: {known}", file=sys.stderr)
        return 2
    if "-h" in arguments or "--help" in arguments:
        print("Usage: jupyter sorna [COMMAND] [OPTIONS]\n\nWithout a command, start the server.\n")
        print("Commands (each with --help):")
        for name, what in COMMANDS.items():
            print(f"  {name:<12} {what}")
        print()
    from sorna_jupyter.app import SornaApp

    SornaApp.launch_instance(arguments)
    return 0

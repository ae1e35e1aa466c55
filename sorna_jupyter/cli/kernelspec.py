"""`jupyter sorna kernelspec install | list | remove`: remote kernels beside the local ones."""

from __future__ import annotations

import argparse
import re
import sys

from rich.console import Console
from rich.table import Table

from sorna_jupyter.cli.server import add_url, reporting, server_of
from sorna_jupyter.exceptions import InvalidRequest, SornaError
from sorna_jupyter.remote import kernelspecs


@reporting
def main(argv: list[str]) -> int:
    args = parse(argv)
    code: int = args.command(args)
    return code


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jupyter sorna kernelspec",
        description="Remote kernels beside the local ones, in everything that can start a kernel: "
        "JupyterLab, VS Code, Spyder, `jupyter console`, nbconvert, papermill.",
    )
    commands = parser.add_subparsers(required=True, metavar="install | list | remove")

    install = commands.add_parser("install", help="install a server's kernelspecs here")
    install.set_defaults(command=install_kernelspecs)
    install.add_argument("names", nargs="*", metavar="NAME", help="what the server calls them")
    install.add_argument("--all", action="store_true", help="all that the server offers")
    where = install.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="for you alone (the default)")
    where.add_argument("--sys-prefix", action="store_true", help="into this Python environment")
    where.add_argument("--prefix", metavar="P", help="below P/share/jupyter/kernels")
    install.add_argument(
        "--pass-env",
        action="append",
        default=[],
        metavar="VARIABLE",
        help="an environment variable that these kernels get from here; repeatable",
    )
    add_url(install)

    listing = commands.add_parser("list", help="what the server offers, and what is installed")
    listing.set_defaults(command=list_kernelspecs)
    add_url(listing)

    remove = commands.add_parser("remove", help="remove installed kernelspecs")
    remove.set_defaults(command=remove_kernelspecs)
    remove.add_argument("names", nargs="+", metavar="NAME", help="as they are called here")
    return parser.parse_args(argv)


def install_kernelspecs(args: argparse.Namespace) -> int:
    for name in args.pass_env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InvalidRequest(
                f"--pass-env takes a variable's name without its value, not {name!r}"
            )
    server = server_of(args)
    known = kernelspecs.offered(server)
    if not args.names and not args.all and len(known) != 1:
        raise InvalidRequest(
            f"{server.url} offers {', '.join(known) or 'nothing'}; name what you want, or say --all"
        )
    prefix = sys.prefix if args.sys_prefix else args.prefix
    for remote in kernelspecs.pick(known, args.names or list(known)):
        ours = kernelspecs.install(server, remote, prefix=prefix, pass_env=args.pass_env)
        print(f"{ours.name}: {ours.display_name}, in {ours.directory}")
    return 0


def list_kernelspecs(args: argparse.Namespace) -> int:
    ours = kernelspecs.installed()
    try:
        server = server_of(args)
        known, here = kernelspecs.offered(server), server.url
    except SornaError as error:
        if not ours or args.url:
            raise
        # What is installed can be told without the server.
        print(error, file=sys.stderr)
        known, here = {}, ""
    table = Table("server", "kernelspec", "name", "installed as", box=None, pad_edge=False)
    for remote in known.values():
        names = [o.name for o in ours if (o.url, o.remote_name) == (here, remote.name)]
        table.add_row(here, remote.name, remote.display_name, ", ".join(names) or "-")
    for other in ours:
        if other.url != here or other.remote_name not in known:
            table.add_row(other.url, other.remote_name, other.display_name, other.name)
    # A pipe has no width; there, nothing may be cut off.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
    return 0


def remove_kernelspecs(args: argparse.Namespace) -> int:
    for name in args.names:
        ours = kernelspecs.remove(name)
        print(f"{ours.name} is removed from {ours.directory.parent}")
    return 0

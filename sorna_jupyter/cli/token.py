"""`jupyter sorna token create USER | list | revoke ID`: who else may use a server."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from sorna_jupyter.cli.server import add_url, reporting, server_of


@reporting
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jupyter sorna token", description=__doc__)
    add_url(parser)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="a new token for a user; it is shown this once")
    create.add_argument("user")
    create.add_argument("--label", default="", help="what it is for")
    actions.add_parser("list", help="all tokens, without their secrets")
    revoke = actions.add_parser("revoke", help="no one gets in with it any more")
    revoke.add_argument("id")
    arguments = parser.parse_args(argv)
    server = server_of(arguments)
    match arguments.action:
        case "create":
            made = server.post("/sorna/tokens", {"user": arguments.user, "label": arguments.label})
            print(made["token"])
        case "list":
            table = Table(box=None, pad_edge=False, header_style="bold")
            for column in ("ID", "USER", "LABEL", "MADE"):
                table.add_column(column)
            for token in server.get("/sorna/tokens"):
                made_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(token["created_at"]))
                table.add_row(token["id"], token["user_name"], token["label"], made_at)
            Console(highlight=False).print(table)
        case "revoke":
            server.delete(f"/sorna/tokens/{arguments.id}")
            print(f"revoked {arguments.id}")
    return 0

"""Prints, as JSON, every route of the app that `jupyter sorna` makes: pattern, handler, methods.

Run as `python -m tests.acceptance.routes [OPTIONS]` in a home of its own; nothing is started.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from jupyter_server.serverapp import ServerApp
from tornado.routing import PathMatches, Router, RuleRouter
from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler

from sorna_jupyter.app import SornaApp

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def routes(router: Router) -> Iterator[dict[str, Any]]:
    assert isinstance(router, RuleRouter)
    for rule in router.rules:
        if isinstance(rule.target, RuleRouter):
            yield from routes(rule.target)
        elif isinstance(rule.matcher, PathMatches):
            handler = rule.target
            assert isinstance(handler, type) and issubclass(handler, RequestHandler), rule
            yield {
                "pattern": rule.matcher.regex.pattern,
                "handler": f"{handler.__module__}.{handler.__qualname__}",
                "bases": [base.__qualname__ for base in handler.__mro__],
                "websocket": issubclass(handler, WebSocketHandler),
                "methods": [m for m in METHODS if _implements(handler, m.lower())],
            }
        else:
            raise AssertionError(f"what is {rule}?")


def _implements(handler: type[RequestHandler], method: str) -> bool:
    unimplemented = RequestHandler._unimplemented_method
    return getattr(handler, method, unimplemented) is not unimplemented


def a_path_for(pattern: str) -> str:
    """The simplest path that the pattern matches."""
    path = _sample(re._parser.parse(pattern.rstrip("$").removesuffix("/?")))  # type: ignore[attr-defined]
    assert re.fullmatch(pattern.rstrip("$"), path), (pattern, path)
    return path


def _sample(parsed: Any) -> str:
    text = ""
    for operator, argument in parsed:
        match str(operator):
            case "LITERAL":
                text += chr(argument)
            case "NOT_LITERAL" | "ANY":
                text += "x"
            case "IN":
                text += _one_of(argument)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, _, inner = argument
                text += _sample(inner) * max(least, 1)
            case "SUBPATTERN":
                text += _sample(argument[3])
            case "BRANCH":
                text += _sample(argument[1][0])
            case "AT" | "ASSERT" | "ASSERT_NOT":
                pass
            case other:
                raise AssertionError(f"unknown in a pattern: {other}")
    return text


def _one_of(choices: Any) -> str:
    for operator, argument in choices:
        match str(operator):
            case "LITERAL":
                return chr(argument)
            case "RANGE":
                return chr(argument[0])
            case "CATEGORY":
                return "1"
            case "NEGATE":
                return "x"
    raise AssertionError(choices)


def print_routes(serverapp: ServerApp, *_: object, **__: object) -> None:
    web_app = serverapp.web_app
    found = [*routes(web_app.wildcard_router), *routes(web_app.default_router)]
    unique = {(route["pattern"], route["handler"]): route for route in found}
    print(json.dumps(list(unique.values())))


def main() -> None:
    # The whole way of `jupyter sorna`, up to where it would begin to serve
    ServerApp.start = print_routes
    SornaApp.launch_instance(sys.argv[1:])


if __name__ == "__main__":
    main()

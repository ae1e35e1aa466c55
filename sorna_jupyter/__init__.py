"""Sorna Jupyter: a program's sandbox and a person's notebook are the same live kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sorna_jupyter.remote.client import Client as Client

__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the agent, which imports only `protocol` and `exceptions`, stays small.
    if name == "Client":
        from sorna_jupyter.remote.client import Client

        return Client
    raise AttributeError(name)


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from sorna_jupyter.app import SornaApp

    return [{"module": "sorna_jupyter.app", "app": SornaApp}]

"""What the websocket's tests share: both framings, and messages in a few words."""

import pytest

from sorna_jupyter.wire import V1_PROTOCOL

PROXY = {"User-Agent": "Tornado/6.6.1"}
FRAMINGS = [pytest.param((V1_PROTOCOL,), id="v1"), pytest.param((), id="legacy")]


def stderr(text):
    return ("iopub", "stream", {"name": "stderr", "text": text}, [])


def status(state):
    return ("iopub", "status", {"execution_state": state}, [])

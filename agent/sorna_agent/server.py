"""Answers the requests of gateways, which the relay passes on: one task a request.

What can be done and how is `agent`'s; here an error becomes a reply, whatever it is.
"""

from __future__ import annotations

import asyncio
import logging

from sorna_agent.agent import Agent
from sorna_agent.relay_link import RelayLink
from sorna_jupyter.exceptions import InvalidRequest, SornaError
from sorna_jupyter.protocol import Message, decode_request, encode_reply

log = logging.getLogger(__name__)


class RequestServer:
    def __init__(self, agent: Agent, link: RelayLink) -> None:
        self._agent = agent
        self._link = link
        self._tasks: set[asyncio.Task[None]] = set()
        link.on_request = self._take

    async def close(self) -> None:
        """Requests still under way are undone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, route: bytes, request_id: bytes, request: bytes) -> None:
        task = asyncio.create_task(self._answer(route, request_id, request), name="request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, route: bytes, request_id: bytes, request: bytes) -> None:
        reply = await self._reply_to(request)
        self._link.reply(route, request_id, encode_reply(reply))

    async def _reply_to(self, data: bytes) -> Message | SornaError:
        try:
            request = decode_request(data)
        except ValueError as error:
            return InvalidRequest(f"not a request that this agent knows: {error}")
        try:
            return await self._agent.handle(request)
        except SornaError as error:
            log.info("%s refused: %s", type(request).__name__, error)
            return error
        except Exception:  # a fault of ours; the gateway needs an answer all the same
            log.exception("%s failed", type(request).__name__)
            return SornaError("the agent failed; its log says how")

"""What is true right now: what each kernel does, when each agent was heard.

`MemoryLive` serves one gateway by itself, `RedisLive` many that share it; both behave alike. It
may all be lost without harm: the next message and the next beat tell it again. Used by `kernels`.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import redis.asyncio
from redis.exceptions import RedisError

from sorna_jupyter.exceptions import Unavailable


@dataclass(frozen=True, slots=True)
class Activity:
    """What a kernel was last seen doing."""

    execution_state: str
    """Jupyter's word: starting, idle, busy"""
    last_activity: float
    """Unix time"""


class LiveState(Protocol):
    """Times are Unix seconds. News that come late never replace newer ones."""

    async def touch_kernel(self, kernel_id: str, execution_state: str, at: float) -> None:
        """The kernel was in this state at this time."""

    async def forget_kernel(self, kernel_id: str) -> None:
        """It is over. Safe to repeat."""

    async def activity(self, kernel_ids: Collection[str]) -> dict[str, Activity]:
        """Of those that are known."""

    async def heard(self, agent_id: str, at: float) -> None:
        """A beat of this agent came."""

    async def silent(self, since: float) -> list[str]:
        """The agents that were heard once, but not at or after this time; longest silence first."""

    async def forget_agent(self, agent_id: str) -> None:
        """It is gone, and no longer silent. Safe to repeat."""

    async def close(self) -> None: ...


class MemoryLive:
    """In this process, for a gateway that is the only one."""

    def __init__(self) -> None:
        self._kernels: dict[str, Activity] = {}
        self._agents: dict[str, float] = {}

    async def touch_kernel(self, kernel_id: str, execution_state: str, at: float) -> None:
        known = self._kernels.get(kernel_id)
        if known is None or known.last_activity <= at:
            self._kernels[kernel_id] = Activity(execution_state, at)

    async def forget_kernel(self, kernel_id: str) -> None:
        self._kernels.pop(kernel_id, None)

    async def activity(self, kernel_ids: Collection[str]) -> dict[str, Activity]:
        return {id_: self._kernels[id_] for id_ in kernel_ids if id_ in self._kernels}

    async def heard(self, agent_id: str, at: float) -> None:
        self._agents[agent_id] = max(at, self._agents.get(agent_id, at))

    async def silent(self, since: float) -> list[str]:
        silent = sorted((at, agent_id) for agent_id, at in self._agents.items() if at < since)
        return [agent_id for _, agent_id in silent]

    async def forget_agent(self, agent_id: str) -> None:
        self._agents.pop(agent_id, None)

    async def close(self) -> None:
        pass


class _Database(enum.IntEnum):
    """Redis databases by number, and their keys."""

    KERNELS = 1
    """`kernel:{id}`: hash of execution_state and last_activity; expires after `_KEPT_FOR`"""
    AGENTS = 2
    """`heard`: sorted set of agent ids by the time of their last beat"""


_KEPT_FOR = 30 * 24 * 3600
"""Seconds after which a kernel is forgotten that nobody touched or forgot."""

_HEARD = "heard"

_TOUCH = """
local known = redis.call('HGET', KEYS[1], 'last_activity')
if not known or tonumber(known) <= tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[1], 'execution_state', ARGV[1], 'last_activity', ARGV[2])
    redis.call('EXPIRE', KEYS[1], ARGV[3])
end
"""


class RedisLive:
    """In Redis, for gateways that share it. Raises `Unavailable` while Redis is away."""

    def __init__(self, url: str, timeout: float = 5.0) -> None:
        """`redis://…`, `rediss://…` or `unix://…`; a database number in it is ignored."""
        self._kernels = _connect(url, _Database.KERNELS, timeout)
        self._agents = _connect(url, _Database.AGENTS, timeout)
        self._touch = self._kernels.register_script(_TOUCH)

    async def touch_kernel(self, kernel_id: str, execution_state: str, at: float) -> None:
        async with _translated():
            await self._touch([f"kernel:{kernel_id}"], [execution_state, repr(at), _KEPT_FOR])

    async def forget_kernel(self, kernel_id: str) -> None:
        async with _translated():
            await self._kernels.delete(f"kernel:{kernel_id}")

    async def activity(self, kernel_ids: Collection[str]) -> dict[str, Activity]:
        ids = list(kernel_ids)
        async with _translated(), self._kernels.pipeline(transaction=False) as pipeline:
            for kernel_id in ids:
                pipeline.hgetall(f"kernel:{kernel_id}")
            found = await pipeline.execute()
        return {
            kernel_id: Activity(fields["execution_state"], float(fields["last_activity"]))
            for kernel_id, fields in zip(ids, found, strict=True)
            if fields
        }

    async def heard(self, agent_id: str, at: float) -> None:
        async with _translated():
            await self._agents.zadd(_HEARD, {agent_id: at}, gt=True)

    async def silent(self, since: float) -> list[str]:
        async with _translated():
            found = await self._agents.zrangebyscore(_HEARD, "-inf", f"({since!r}")
        return [str(agent_id) for agent_id in found]

    async def forget_agent(self, agent_id: str) -> None:
        async with _translated():
            await self._agents.zrem(_HEARD, agent_id)

    async def close(self) -> None:
        await self._kernels.aclose()
        await self._agents.aclose()


def _connect(url: str, database: _Database, timeout: float) -> redis.asyncio.Redis:
    pool = redis.asyncio.ConnectionPool.from_url(
        url, decode_responses=True, socket_timeout=timeout, socket_connect_timeout=timeout
    )
    pool.connection_kwargs["db"] = int(database)  # a number in the URL would win over an argument
    return redis.asyncio.Redis.from_pool(pool)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise Unavailable("The live state's Redis does not answer") from error

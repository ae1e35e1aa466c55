"""Live state: the same promises in memory and in Redis."""

from urllib.parse import urlsplit

import pytest

from sorna_jupyter.exceptions import Unavailable
from sorna_jupyter.live import Activity, MemoryLive, RedisLive


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def live(request):
    if request.param == "memory":
        live = MemoryLive()
    else:
        live = RedisLive(request.getfixturevalue("redis_url"))
    yield live
    # So that a server can be used by several tests.
    await live.forget_kernel("k1")
    for agent_id in await live.silent(since=float("inf")):
        await live.forget_agent(agent_id)
    await live.close()


async def test_what_a_kernel_was_last_seen_doing_is_known(live):
    await live.touch_kernel("k1", "busy", at=1700000000.25)

    assert await live.activity(["k1", "k2"]) == {"k1": Activity("busy", 1700000000.25)}


async def test_of_no_kernels_nothing_is_known(live):
    assert await live.activity([]) == {}


async def test_newer_news_replace_older_ones(live):
    await live.touch_kernel("k1", "busy", at=10.0)
    await live.touch_kernel("k1", "idle", at=10.0)

    assert await live.activity(["k1"]) == {"k1": Activity("idle", 10.0)}


async def test_late_news_from_another_gateway_do_not_replace_newer_ones(live):
    await live.touch_kernel("k1", "idle", at=11.5)
    await live.touch_kernel("k1", "busy", at=10.25)

    assert await live.activity(["k1"]) == {"k1": Activity("idle", 11.5)}


async def test_a_forgotten_kernel_is_unknown_and_may_be_forgotten_again(live):
    await live.touch_kernel("k1", "idle", at=1.0)

    await live.forget_kernel("k1")
    await live.forget_kernel("k1")

    assert await live.activity(["k1"]) == {}


async def test_agents_not_heard_since_then_are_silent_longest_first(live):
    await live.heard("late", at=20.0)
    await live.heard("quiet", at=10.5)
    await live.heard("quietest", at=10.0)

    assert await live.silent(since=20.0) == ["quietest", "quiet"]


async def test_a_beat_that_comes_late_does_not_make_an_agent_silent(live):
    await live.heard("a", at=20.0)
    await live.heard("a", at=10.0)

    assert await live.silent(since=20.0) == []


async def test_a_forgotten_agent_is_not_silent(live):
    await live.heard("a", at=1.0)

    await live.forget_agent("a")
    await live.forget_agent("a")

    assert await live.silent(since=100.0) == []


async def test_gateways_share_what_is_in_redis_whatever_database_their_url_names(redis_url):
    one, two = RedisLive(redis_url), RedisLive(urlsplit(redis_url)._replace(path="/7").geturl())
    await one.touch_kernel("k1", "idle", at=1.0)

    seen = await two.activity(["k1"])

    await one.forget_kernel("k1")
    await one.close()
    await two.close()
    assert seen == {"k1": Activity("idle", 1.0)}


async def test_without_redis_the_caller_is_told_to_come_again():
    live = RedisLive("redis://127.0.0.1:1", timeout=1.0)

    with pytest.raises(Unavailable):
        await live.heard("a", at=1.0)
    with pytest.raises(Unavailable):
        await live.activity(["k1"])

    await live.close()

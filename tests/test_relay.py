"""A real relay process between real ipykernels and the ends that `agent_parts` plays."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from sorna_agent.relay_kernel import Signer, as_routing_id
from sorna_agent.relay_link import RelayLink, RelaySettings
from sorna_agent.runtimes import Launch, Started
from sorna_jupyter import protocol
from sorna_jupyter.agents import AgentPool, KeyPair
from sorna_jupyter.exceptions import AgentUnreachable
from sorna_jupyter.protocol import (
    Batch,
    Gap,
    InterruptKernel,
    KernelMessage,
    ReadKernelLog,
    Slots,
)
from sorna_jupyter.registry import AgentRow
from tests.agent_parts import (
    PATIENCE,
    IpykernelRuntime,
    Keys,
    Line,
    is_idle,
    parent_id,
    stdout_of,
    until,
)
from tests.chaos import ChaosProxy, Cut


@dataclass
class House:
    """One relay, a runtime for its kernels, and gateways' lines to it."""

    directory: Path
    link: RelayLink
    agent_keys: Keys
    gateway_keys: Keys
    runtime: IpykernelRuntime = field(default_factory=IpykernelRuntime)
    lines: list[Line] = field(default_factory=list)
    activity: list[tuple[str, str]] = field(default_factory=list)

    def line(self, keys: Keys | None = None, tcp: bool = False, **options: int) -> Line:
        address = self.link.addresses[1 if tcp else 0]
        line = Line(address, self.agent_keys.public, keys or self.gateway_keys, **options)
        self.lines.append(line)
        return line

    async def start_kernel(self, kernel_id: str = "k1") -> Started:
        directory = self.directory / kernel_id
        directory.mkdir()
        launch = Launch(kernel_id, "python3", "me", directory, key="a-key")
        started = await self.runtime.launch(launch)
        async with asyncio.timeout(PATIENCE):
            await self.link.open_kernel(kernel_id, started.address, launch.key)
        return started

    async def end(self) -> None:
        for line in self.lines:
            await line.close()
        await self.link.close()
        for kernel_id in list(self.runtime._pids):
            await self.runtime.destroy(kernel_id)


def settings(directory: Path, agent: Keys, gateway: Keys, **options: object) -> RelaySettings:
    keys_file = directory / "agent.json"
    keys_file.write_text(json.dumps({"public_key": agent.public, "secret_key": agent.secret}))
    token_file = directory / "join_token"
    token_file.write_text(gateway.token)
    return RelaySettings(
        **{
            "listen": "tcp://127.0.0.1:0",
            "directory": directory,
            "keys_file": keys_file,
            "public_key": agent.public,
            "gateway_keys": (gateway.public,),
            "join_token_file": token_file,
            "orphan_timeout": 60.0,
            "journals": directory / "journals",
            **options,
        }
    )


@pytest.fixture
def short_path() -> Iterator[Path]:
    """For sockets: pytest's own paths are too long."""
    path = Path(tempfile.mkdtemp(prefix="sorna-"))
    yield path
    shutil.rmtree(path)


MakeHouse = Callable[..., Awaitable[House]]


@pytest.fixture
async def make_house(short_path: Path) -> AsyncIterator[MakeHouse]:
    """With other settings, or keys, than usual."""
    houses: list[House] = []

    async def make(agent: Keys | None = None, gateway: Keys | None = None, **options: object):
        agent, gateway = agent or Keys.make(), gateway or Keys.make()
        link = RelayLink(settings(short_path, agent, gateway, **options))
        house = House(short_path, link, agent, gateway)
        link.on_activity = lambda told: house.activity.append(
            (told.kernel_id, told.execution_state)
        )
        houses.append(house)
        await link.start()
        return house

    yield make
    for house in houses:
        await house.end()


@pytest.fixture
async def house(make_house: MakeHouse) -> House:
    return await make_house()


async def test_code_runs_and_its_output_and_reply_come_back_in_unbroken_numbers(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1", 1)

    assert await line.client("k1").result("print(6 * 7)") == "42\n"

    assert [m.seq for m in line.messages] == list(range(1, len(line.messages) + 1))
    assert {m.channel for m in line.messages} == {"shell", "iopub"}


async def test_quick_executions_and_floods_of_prints_come_in_few_deliveries(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1", 1)
    client = line.client("k1")
    await client.result("1")

    async def fewest(code: str) -> float:
        """Deliveries a message, of the best of some tries: a busy machine parts what belongs
        together."""
        found = []
        for _ in range(20):
            messages, deliveries = len(line.messages), line.deliveries
            await client.result(code)
            found.append((line.deliveries - deliveries) / (len(line.messages) - messages))
        return min(found)

    assert await fewest("pass") == 1 / 4  # busy, execute_input, reply, idle
    assert await fewest("for i in range(200): print(i, flush=True)") <= 2 / 3


async def test_the_tcp_port_serves_as_the_ipc_socket_does(house: House):
    await house.start_kernel()
    line = house.line(tcp=True)
    line.subscribe("k1")

    assert await line.client("k1").result("print(1)") == "1\n"


async def test_everyone_gets_iopub_and_replies_carry_the_session_that_asked(house: House):
    await house.start_kernel()
    one, two = house.line(), house.line()
    for line in (one, two):
        line.subscribe("k1")
    client_one, client_two = one.client("k1"), two.client("k1")

    await client_one.result("x = 5")
    assert await client_two.result("print(x)") == "5\n"

    last = two.messages[-1].seq
    for line in (one, two):
        await line.wait_for(lambda m: m.seq == last)
    sessions = {m.session for m in one.messages if m.channel == "shell"}
    assert sessions == {client_one.session, client_two.session}
    first = two.messages[0].seq  # its subscription may have come later
    heard = [[m.parts for m in line.messages if first <= m.seq <= last] for line in (one, two)]
    assert heard[0] == heard[1]


async def test_the_relays_own_questions_are_not_seen_by_clients(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1", 1)
    await line.client("k1").result("1")

    assert not any(b"sorna-relay-" in part for m in line.messages for part in m.parts)
    assert not any(m.msg_type == "iopub_welcome" for m in line.messages)


async def test_input_returns_what_the_session_that_runs_the_cell_answers(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client, onlooker = line.client("k1"), line.client("k1")

    msg_id = client.execute("print('got', input('name? '))", allow_stdin=True)
    question = await line.wait_for(lambda m: m.msg_type == "input_request")
    assert (question.channel, question.session) == ("stdin", client.session)
    client.send("stdin", "input_reply", {"value": "Ada"})
    await client.reply_to(msg_id)

    await line.wait_for(lambda m: is_idle(m) and parent_id(m) == msg_id)
    assert stdout_of(line.messages, msg_id) == "got Ada\n"
    assert not any(m.session == onlooker.session for m in line.messages)


async def test_output_goes_on_behind_an_answer_on_another_channel(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")
    client.execute("for i in range(100_000_000): print(i, flush=True)")
    await line.wait_for(lambda m: m.msg_type == "stream")

    for _ in range(20):
        msg_id = client.send("control", "kernel_info_request", {})
        await client.reply_to(msg_id)
        seen = line.messages[-1].seq
        await line.wait_for(lambda m, seen=seen: m.msg_type == "stream" and m.seq > seen + 20)


async def test_buffers_and_unusual_session_ids_travel_unharmed(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    for session in ("x" * 300, "\0nul", "Ünïcode/☃"):
        assert await line.client("k1", session).result("print(1)") == "1\n"

    msg_id = line.client("k1").execute(
        "from comm import create_comm\n"
        "create_comm(target_name='t', data={}, buffers=[b'\\x00\\xff' * 1000, b''])"
    )

    opened = await line.wait_for(lambda m: m.msg_type == "comm_open" and parent_id(m) == msg_id)
    assert opened.parts[4:] == [b"\x00\xff" * 1000, b""]


async def test_a_busy_kernel_is_interrupted_by_message(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")
    msg_id = client.execute("import time\nprint('on', flush=True)\ntime.sleep(600)")
    await line.wait_for(lambda m: m.msg_type == "stream")

    house.link.interrupt_kernel("k1")

    assert (await client.reply_to(msg_id))["ename"] == "KeyboardInterrupt"


async def test_busy_and_idle_reach_the_agent(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")

    line.client("k1").execute("import time; time.sleep(0.5)")

    await until(lambda: ("k1", "busy") in house.activity)
    await until(lambda: house.activity[-1] == ("k1", "idle"))


@pytest.mark.parametrize("tcp", [True, False])
async def test_a_gateway_with_another_key_or_token_gets_nothing(house: House, tcp: bool):
    await house.start_kernel()
    stranger = house.line(Keys.make(), tcp=tcp)
    known = house.line()
    stranger.subscribe("k1", 1)
    known.subscribe("k1", 1)

    client = stranger.client("k1")
    client.execute("print('in')")
    await known.client("k1").result("print('mine')")

    assert stranger.messages == []
    assert not any(m.session == client.session for m in known.messages)


async def test_a_gateways_key_may_begin_with_a_dash(make_house: MakeHouse):
    gateway = Keys.make()
    while not gateway.public.startswith("-"):
        gateway = Keys.make()
    house = await make_house(gateway=gateway)

    await house.start_kernel()
    line = house.line(tcp=True)
    line.subscribe("k1")
    assert await line.client("k1").result("print(1)") == "1\n"


async def test_what_makes_no_sense_from_a_gateway_harms_nobody(house: House):
    await house.start_kernel()
    line = house.line()
    k = b"k1"
    for frames in (
        [b""],
        [b"?"],
        [b"M"],
        [protocol.OPEN, b"unknown", b"s"],
        [protocol.OPEN, k],
        [protocol.OPEN, k, b""],
        [protocol.OPEN, k, b"\0" * 500],
        [protocol.CLOSE, k, b"never opened"],
        [protocol.SUBSCRIBE, k, b"short"],
        [protocol.SUBSCRIBE, k, b"\xff" * 8],
        [protocol.SUBSCRIBE, k, b"\xff" * 8, b"\xff" * 8, b"\xff" * 8],
        [protocol.UNSUBSCRIBE, k, b"\xff" * 8],
        [protocol.CREDIT, k, b"\xff" * 8, b"short"],
        [protocol.ACKNOWLEDGE, k, b"nobody", b"\xff" * 8],
        [protocol.UNSUBSCRIBE, b"\xff\xfe"],
        [protocol.UNSUBSCRIBE, k, b"more"],
        [protocol.MESSAGE, k, b"s", b"shell", b"{}"],
        [protocol.MESSAGE, k, b"s", b"nochannel" * 100, b"{}", b"{}", b"{}", b"{}"],
        [protocol.MESSAGE, k, b"s", b"iopub", b"{}", b"{}", b"{}", b"{}"],
        [protocol.MESSAGE, k, b"s", b"shell", b"no json", b"\xff", b"", b""],
        [protocol.RPC],
        [protocol.RPC, b"1", b"2", b"3", b"4"],
    ):
        line.send(*frames)

    line.subscribe("k1")
    assert await line.client("k1").result("print('alive')") == "alive\n"


async def test_messages_that_the_kernels_key_did_not_sign_are_dropped(house: House):
    started = await house.start_kernel()
    await house.runtime.destroy("k1")
    os.unlink(f"{started.address}-2")
    context = zmq.Context()
    forger = context.socket(zmq.PUB)
    forger.linger = 0
    forger.bind(f"ipc://{started.address}-2")
    line = house.line()
    line.subscribe("k1", 1)
    house.link.reopen_kernel("k1", started.address, "a-key", "idle")
    header = b'{"msg_type": "stream", "msg_id": "forged"}'
    good = [b'{"msg_type": "stream", "msg_id": "good"}', b"{}", b"{}", b"{}"]
    signature = Signer("a-key").sign(good)

    async def heard_good() -> None:
        while not any(b'"good"' in m.parts[0] for m in line.messages):
            forger.send_multipart([b"t", b"<IDS|MSG>", b"0" * 64, header, b"{}", b"{}", b"{}"])
            forger.send_multipart([b"t", b"no delimiter"])
            forger.send_multipart([b"t", b"<IDS|MSG>", signature])
            forger.send_multipart([b"t", b"<IDS|MSG>", signature, *good])
            await asyncio.sleep(0.02)

    await asyncio.wait_for(heard_good(), PATIENCE)
    context.destroy(linger=0)
    assert not any(b'"forged"' in m.parts[0] for m in line.messages)


HOSTILE = """
import hashlib, hmac
from IPython import get_ipython
kernel = get_ipython().kernel
def send(*parts):
    signature = hmac.new(kernel.session.key, b"".join(parts), hashlib.sha256).hexdigest().encode()
    kernel.iopub_socket.send_multipart([b"t", b"<IDS|MSG>", signature, *parts])
status = b'{"msg_type": "status", "msg_id": "x"}'
deep = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
"""


@pytest.mark.parametrize(
    "message",
    [
        """deep[:-1] + b', "y": "status"}', b"{}", b"{}", b"{}" """,
        """status, deep, b"{}", b"{}" """,
        """status, b"{}", b"{}", deep""",
        """b"\\xff", b"\\xff", b"\\xff", b"\\xff" """,
        """b"", b"", b"", b"" """,
        """b"" """,
    ],
)
async def test_whatever_a_kernel_sends_the_relay_goes_on(house: House, message: str):
    await house.start_kernel()
    hostile, line = house.line(), house.line()
    hostile.subscribe("k1")
    started = house.link.started

    client = hostile.client("k1")
    await client.reply_to(client.execute(f"{HOSTILE}\nsend({message})"))

    line.subscribe("k1")
    assert await line.client("k1").result("print('alive')") == "alive\n"
    assert house.link.started == started


async def test_a_kernel_cannot_make_up_execution_states(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")

    await line.client("k1").result(
        f"""{HOSTILE}\nsend(status, b"{{}}", b"{{}}", b'{{"execution_state": "of my own"}}')"""
    )

    await until(lambda: house.activity[-1:] == [("k1", "idle")])
    assert {state for _, state in house.activity} <= {"starting", "idle", "busy"}


async def test_a_kernel_that_has_answered_is_never_starting_again(house: House):
    """Its `starting` on iopub may come after its first reply on shell: it would never be idle."""
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    await line.client("k1").result(
        f"""{HOSTILE}
import threading
starting = status, b"{{}}", b"{{}}", b'{{"execution_state": "starting"}}'
threading.Timer(0.3, send, starting).start()
threading.Timer(0.9, print, ["lat" + "er"]).start()
"""
    )

    await until(lambda: any(b"later" in message.parts[3] for message in line.messages))

    assert any(message.parts[3] == b'{"execution_state": "starting"}' for message in line.messages)
    assert ("k1", "starting") not in house.activity[house.activity.index(("k1", "idle")) :]


async def test_who_talks_on_the_agents_socket_is_not_the_agent_for_that(house: House):
    await house.start_kernel()
    house.link.on_request = lambda route, request_id, request: house.link.reply(
        route, request_id, protocol.encode_reply(protocol.Done())
    )
    line = house.line()
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(f"ipc://{house.directory}/rpc.sock")
        await stranger.send_multipart([b"<IDS|MSG>", b"signature", b"{}", b"{}", b"{}", b"{}"])
        await asyncio.sleep(0.2)

        reply = await line.ask(InterruptKernel(kernel_id="k1"), timeout=3)

    assert reply == protocol.Done()


async def test_a_gateway_that_reads_slowly_loses_nothing_and_delays_nobody(house: House):
    await house.start_kernel()
    slow, quick = house.line(rcvhwm=10), house.line()
    for line in (slow, quick):
        line.subscribe("k1", 1)
    await slow.wait_for(lambda m: True)
    slow.stop_reading()
    client = quick.client("k1")

    await client.result("for i in range(3000): print('x' * 2000, flush=True)")

    assert len(slow.messages) < 3000
    slow.read_on()
    await slow.wait_for(lambda m: m.seq == quick.messages[-1].seq)
    assert [m.parts for m in slow.messages] == [m.parts for m in quick.messages]
    assert slow.gaps == []


async def test_a_late_gateway_reads_from_the_number_it_names(house: House):
    await house.start_kernel()
    first = house.line()
    first.subscribe("k1", 1)
    await first.client("k1").result("print('before')")
    last = first.messages[-1].seq

    late = house.line()
    late.subscribe("k1", last - 1)

    await late.wait_for(lambda m: m.seq == last)
    assert [m.seq for m in late.messages] == [last - 1, last]


async def test_what_fell_out_of_the_journal_is_announced_as_a_gap(make_house: MakeHouse):
    house = await make_house(retention=20_000)
    await house.start_kernel()
    watcher = house.line()
    watcher.subscribe("k1")
    msg_id = watcher.client("k1").execute("for i in range(300): print('x' * 500, flush=True)")
    idle = await watcher.wait_for(lambda m: is_idle(m) and parent_id(m) == msg_id)
    end = idle.seq  # the watcher, too, may have missed what came before

    late = house.line()
    late.subscribe("k1", 3)

    await late.wait_for(lambda m: m.seq == end)
    (gap,) = late.gaps
    assert (gap.first, gap.last) == (3, late.messages[0].seq - 1)
    # The reply may come behind the idle.
    assert [m.seq for m in late.messages if m.seq <= end] == list(range(gap.last + 1, end + 1))


async def test_a_subscription_gets_no_more_than_its_credit_and_then_the_rest(house: House):
    await house.start_kernel()
    watcher, frugal = house.line(), house.line()
    watcher.subscribe("k1", 1)
    name = frugal.subscribe("k1", 1, credit=5000)
    await watcher.client("k1").result("for i in range(100): print('x' * 500, flush=True)")
    end = watcher.messages[-1].seq

    await frugal.wait_for(lambda m: m.seq > 1)
    await watcher.client("k1").result("1")  # by then all that may come is here
    got = [m.seq for m in frugal.messages]
    assert 1 < len(got) < 20

    frugal.send(protocol.CREDIT, b"k1", name, protocol.pack_number(1 << 20))
    await frugal.wait_for(lambda m: m.seq == end)
    assert [m.seq for m in frugal.messages][:end] == list(range(1, end + 1))


async def test_a_session_begins_where_its_client_acknowledged_through_whichever_gateway(
    house: House,
):
    await house.start_kernel()
    one, two = house.line(), house.line()
    one.subscribe("k1")
    client = one.client("k1", "laptop")
    await client.result("print(1)")
    begin, read = one.begins["laptop"], one.messages[2].seq

    two.client("k1", "laptop")
    await until(lambda: "laptop" in two.begins)
    assert two.begins["laptop"] == begin  # nothing was acknowledged yet

    one.send(protocol.ACKNOWLEDGE, b"k1", b"laptop", protocol.pack_number(read))
    await client.result("print(2)")
    three = house.line()
    three.client("k1", "laptop")
    await until(lambda: "laptop" in three.begins)
    assert three.begins["laptop"] == read + 1


async def test_a_message_above_the_limit_is_replaced_by_a_word_about_it(make_house: MakeHouse):
    house = await make_house(max_message=1 << 20)
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")

    msg_id = client.execute("print('x' * 2_000_000); print('after')")
    await client.reply_to(msg_id)
    await line.wait_for(lambda m: is_idle(m) and parent_id(m) == msg_id)

    (note,) = [m for m in line.messages if b"stderr" in m.parts[3]]
    assert parent_id(note) == msg_id
    assert b"no more than 1 MiB" in note.parts[3]


async def test_a_killed_relay_finds_its_journal_again_and_says_where_it_was_away(house: House):
    started = await house.start_kernel()
    restarted = asyncio.Event()

    def reopen() -> None:
        house.link.reopen_kernel("k1", started.address, "a-key", "idle")
        restarted.set()

    house.link.on_restart = reopen
    line = house.line()
    line.subscribe("k1", 1)
    await line.client("k1").result("x = 6 * 7; print('before')")
    before = [m.parts for m in line.messages]

    assert house.link._process is not None
    os.kill(house.link._process.pid, signal.SIGKILL)
    await asyncio.wait_for(restarted.wait(), PATIENCE)
    later = house.line()
    client = later.client("k1", "later")

    def is_open() -> bool:  # the agent's word may come after the gateway's
        later.client("k1", "later")
        return "later" in later.begins

    await until(is_open)
    later.subscribe("k1", 1)

    assert await client.result("print(x)") == "42\n"
    assert [m.parts for m in later.messages[: len(before)]] == before
    (gap,) = later.gaps
    assert gap.messages is None
    assert "restarted" in gap.reason
    numbers = sorted([*(m.seq for m in later.messages), gap.first])
    assert numbers == list(range(1, len(numbers) + 1))


async def test_journals_of_kernels_that_nobody_has_any_more_go(house: House):
    await house.start_kernel()
    (house.directory / "journals" / "gone").mkdir()

    house.link.keep_kernels(["k1"])

    await until(lambda: not (house.directory / "journals" / "gone").exists())
    assert (house.directory / "journals" / "k1").is_dir()
    house.link.forget_kernel("k1")
    await until(lambda: not (house.directory / "journals" / "k1").exists())


async def test_a_reply_that_comes_after_its_client_left_is_still_in_the_journal(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")
    await client.result("1")
    msg_id = client.execute("import time; time.sleep(1); print('late')")
    client.close()

    assert (await client.reply_to(msg_id))["status"] == "ok"


async def test_a_kernel_started_anew_keeps_its_clients_and_its_numbers(house: House):
    started = await house.start_kernel()
    line = house.line()
    line.subscribe("k1", 1)
    client = line.client("k1")
    await client.result("x = 1")

    house.link.detach_kernel("k1")
    again = await house.runtime.relaunch("k1")
    assert again.address == started.address
    async with asyncio.timeout(PATIENCE):
        await house.link.open_kernel("k1", again.address, "a-key")

    assert await client.result("print('x' in globals())") == "False\n"
    assert [m.seq for m in line.messages] == list(range(1, len(line.messages) + 1))


async def test_a_dead_kernels_last_words_can_still_be_read(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    await line.client("k1").result("print('famous last words')")
    await house.runtime.destroy("k1")
    house.link.detach_kernel("k1")

    late = house.line()
    late.subscribe("k1", 1)

    await late.wait_for(lambda m: b"famous last words" in m.parts[3])


@dataclass
class Reader:
    """Gets a kernel's messages from `AgentPool`."""

    messages: list[KernelMessage] = field(default_factory=list)

    def on_batch(self, batch: Batch) -> None:
        self.messages.extend(batch.messages)

    def on_gap(self, gap: Gap) -> None:
        raise AssertionError(gap)

    @property
    def printed(self) -> str:
        texts = [json.loads(m.parts[3])["text"] for m in self.messages if m.msg_type == "stream"]
        return "".join(texts)


@pytest.mark.parametrize("how", list(Cut))
async def test_a_gateway_whose_connection_was_cut_gets_what_came_meanwhile(house: House, how: Cut):
    await house.start_kernel()
    proxy = ChaosProxy(int(house.link.addresses[1].rpartition(":")[2]))
    keys = house.gateway_keys
    pool = AgentPool(KeyPair(keys.public, keys.secret), keys.token)
    slots = Slots(cpus=1, memory=1, kernels=1)
    addresses = [proxy.url.replace("http", "tcp")]
    agent = AgentRow(
        "a1", "alive", house.agent_keys.public, addresses, "here", "local", "", slots, 0
    )
    reader = Reader()
    attachment = pool.attach(agent, "k1", "s1", reader, resumes=True)
    await asyncio.wait_for(attachment.caught_up.wait(), PATIENCE)
    client = house.line().client("k1")
    client.execute("print('before')")
    await until(lambda: reader.printed == "before\n")

    await asyncio.to_thread(proxy.cut, how)
    for number in range(5):
        client.execute(f"print({number})")
    await until(lambda: reader.printed.endswith("4\n"))

    assert reader.printed == "before\n0\n1\n2\n3\n4\n"
    attachment.close()
    pool.close()
    await asyncio.to_thread(proxy.close)


async def test_requests_pass_to_the_agent_and_its_replies_back(house: House):
    def answer(route: bytes, request_id: bytes, data: bytes) -> None:
        request = protocol.decode_request(data)
        assert isinstance(request, ReadKernelLog)
        log = protocol.KernelLog(text=f"log of {request.kernel_id}")
        house.link.reply(route, request_id, protocol.encode_reply(log))

    house.link.on_request = answer

    reply = await house.line().ask(ReadKernelLog(kernel_id="k1"))

    assert reply == protocol.KernelLog(text="log of k1")


async def test_while_the_agent_is_away_output_flows_and_requests_fail_at_once(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")
    await client.result("1")
    house.link._disconnect()

    assert await client.result("print('on')") == "on\n"

    async def ask_until_away() -> None:
        # What was sent before the relay noticed gets no answer at all.
        while True:
            try:
                await line.ask(InterruptKernel(kernel_id="k1"), timeout=0.5)
            except TimeoutError:
                continue

    with pytest.raises(AgentUnreachable, match="away"):
        await asyncio.wait_for(ask_until_away(), PATIENCE)
    house.link._connect()


async def test_the_next_agent_adopts_the_relay_that_runs(house: House):
    await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")
    await client.result("x = 1")
    started = house.link.started
    await house.link.close(keep_relay=True)

    house.link = RelayLink(settings(house.directory, house.agent_keys, house.gateway_keys))
    await house.link.start()

    assert (house.link.started, house.link.adopted_kernels) == (started, ["k1"])
    assert await client.result("print(x)") == "1\n"


async def test_a_relay_with_other_settings_is_replaced(house: House):
    started = house.link.started
    await house.link.close(keep_relay=True)

    house.link = RelayLink(settings(house.directory, house.agent_keys, Keys.make()))
    await house.link.start()

    assert house.link.started > started
    assert house.link.adopted_kernels == []


async def test_a_relay_that_dies_is_started_again_and_the_kernel_goes_on(house: House):
    started = await house.start_kernel()
    line = house.line()
    line.subscribe("k1")
    client = line.client("k1")
    await client.result("x = 1")
    restarted = asyncio.Event()
    house.link.on_restart = restarted.set
    former = house.link.started

    assert house.link._process is not None
    os.kill(house.link._process.pid, signal.SIGKILL)
    await asyncio.wait_for(restarted.wait(), PATIENCE)
    house.link.reopen_kernel("k1", started.address, "a-key", "idle")

    assert house.link.started > former
    again = house.line()

    async def subscribed() -> None:  # the agent's word may come after the gateway's
        while not again.messages:
            again.subscribe("k1")
            again.client("k1").execute("1")
            await asyncio.sleep(0.1)

    await asyncio.wait_for(subscribed(), PATIENCE)
    assert await again.client("k1").result("print(x)") == "1\n"


async def test_a_relay_whose_agent_stays_away_ends_and_leaves_nothing(short_path: Path):
    agent, gateway = Keys.make(), Keys.make()
    link = RelayLink(settings(short_path, agent, gateway, orphan_timeout=1.0))
    await link.start()
    process = link._process
    assert process is not None
    await link.close(keep_relay=True)

    await until(lambda: process.poll() is not None)

    assert process.returncode == 0
    assert not list(short_path.glob("*.sock"))


def test_session_ids_that_cannot_be_routing_ids_are_hashed():
    assert as_routing_id(b"abc") == b"abc"
    for bad in (b"", b"\0abc", b"x" * 256):
        assert 0 < len(as_routing_id(bad)) <= 255
        assert not as_routing_id(bad).startswith(b"\0")

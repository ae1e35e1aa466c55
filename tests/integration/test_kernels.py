"""`Kernels` with a real registry, a real agent and relay, and kernels of the `local` runtime."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from sorna_agent.relay_link import _listening_pid as listening_pid
from sorna_jupyter.agents import AgentPool, HeartbeatListener, KeyPair
from sorna_jupyter.embedded import AgentSettings, EmbeddedAgent
from sorna_jupyter.exceptions import (
    AgentUnreachable,
    IllegalTransition,
    InvalidRequest,
    KernelExists,
    KernelNotFound,
    LimitExceeded,
    Unavailable,
    UnknownKernelspec,
)
from sorna_jupyter.kernels import Kernel, Kernels
from sorna_jupyter.live import MemoryLive
from sorna_jupyter.protocol import (
    RECORDS,
    Batch,
    Beat,
    BeatReply,
    Gap,
    KernelMessage,
    KernelReport,
    KernelStatus,
    Limits,
)
from sorna_jupyter.registry import Policy, Registry
from tests.waiting import until

OWNER = "ada"


class Client:
    """One client session, which remembers what it was told."""

    def __init__(
        self, kernels: Kernels, kernel_id: str, session_id: str = "", *, resumes: bool = False
    ) -> None:
        self.session_id = session_id or uuid.uuid4().hex
        self.messages: list[KernelMessage] = []
        self.gaps: list[Gap] = []
        self.events: list[tuple[KernelStatus, str]] = []
        self._news = asyncio.Event()
        self.attachment = kernels.attach(
            kernel_id, self.session_id, self, counts=True, resumes=resumes
        )

    def on_kernel_gap(self, gap: Gap) -> None:
        self.gaps.append(gap)
        self._news.set()

    def on_kernel_messages(self, batch: Batch) -> None:
        self.messages.extend(batch.messages)
        self._news.set()

    def on_kernel_event(self, kernel: Kernel) -> None:
        self.events.append((kernel.status, kernel.reason))
        self._news.set()

    def send(self, msg_type: str, content: dict[str, Any], channel: str = "shell") -> str:
        msg_id = uuid.uuid4().hex
        header = {
            "msg_id": msg_id,
            "session": self.session_id,
            "username": OWNER,
            "date": "2026-01-01T00:00:00.000000Z",
            "msg_type": msg_type,
            "version": "5.3",
        }
        parts = [header, {}, {}, content]
        self.attachment.send(channel, [json.dumps(part).encode() for part in parts])
        return msg_id

    def execute(self, code: str) -> str:
        return self.send(
            "execute_request",
            {"code": code, "silent": False, "store_history": True, "allow_stdin": False},
        )

    async def until(self, done: Callable[[], bool], timeout: float = 30) -> None:
        async with asyncio.timeout(timeout):
            while not done():
                self._news.clear()
                await self._news.wait()

    def replies(self, msg_id: str) -> list[KernelMessage]:
        return [m for m in self.messages if m.session and _parent(m) == msg_id]

    async def reply(self, msg_id: str) -> dict[str, Any]:
        await self.until(lambda: bool(self.replies(msg_id)))
        return dict(json.loads(self.replies(msg_id)[0].parts[3]))

    async def output(self, msg_id: str) -> str:
        """What this request printed, once it is over."""

        def is_over() -> bool:
            return any(
                m.msg_type == "status" and b'"idle"' in m.parts[3]
                for m in self.messages
                if _parent(m) == msg_id
            )

        await self.until(is_over)
        return "".join(
            json.loads(m.parts[3])["text"]
            for m in self.messages
            if m.msg_type == "stream" and _parent(m) == msg_id
        )

    def close(self) -> None:
        self.attachment.close()


def _parent(message: KernelMessage) -> str:
    return str(json.loads(message.parts[1]).get("msg_id", ""))


class House:
    """The parts of a gateway that stand below its faces, built as `app` does."""

    def __init__(self, directory: Path, policy: Policy, **times: float) -> None:
        self.directory = directory
        self.policy = policy
        self.times = times
        public, secret = (key.decode() for key in zmq.curve_keypair())
        self.keys = KeyPair(public, secret)
        (directory / "token").write_text("t0ken")

    async def open(self) -> None:
        self.registry = Registry(f"sqlite:///{self.directory}/registry.sqlite")
        await self.registry.upgrade()
        await self.registry.ensure_user(OWNER)
        self.agents = AgentPool(self.keys, "t0ken")
        self.kernels = Kernels(
            registry=self.registry,
            live=MemoryLive(),
            agents=self.agents,
            policy=self.policy,
            start_wait=30,
            **self.times,
        )
        self.beats: list[Beat] = []
        self.kernels.on_beat = self.beats.append
        await self.kernels.load()
        self.listener = HeartbeatListener(
            self.keys, "t0ken", [f"ipc://{self.directory}/manager.sock"], self.kernels.hear
        )
        await self.listener.start()
        self.sweep = asyncio.create_task(self.kernels.sweep(0.1))

    async def close(self) -> None:
        self.sweep.cancel()
        await self.kernels.close()
        await self.listener.stop()
        self.agents.close()
        await self.registry.close()

    def start_agent(self) -> None:
        (self.directory / "agent").mkdir(exist_ok=True)
        settings = AgentSettings(
            data_dir=self.directory / "agent",
            runtime_dir=self.directory,
            manager_address=f"ipc://{self.directory}/manager.sock",
            manager_key=self.keys.public,
            join_token_file=self.directory / "token",
            runtime="local",
            orphan_timeout=20,
        )
        self.agent = EmbeddedAgent(settings)
        self.agent.start()

    async def stop_agent(self) -> None:
        for agent in list(self.kernels.agents()):
            await self.agents.stop_agent(agent, keep_kernels=False)
        await self.agent.stop()

    async def messages(self, kernel_id: str, since: int = 1) -> list[KernelMessage]:
        """All that the kernel's journal has now, which must be without a gap."""
        found: list[KernelMessage] = []
        async for items in self.kernels.messages(kernel_id, since):
            for item in items:
                assert isinstance(item, KernelMessage), item
                found.append(item)
        return found

    def kill_relay(self) -> None:
        os.kill(listening_pid(self.directory / "relay.sock"), signal.SIGKILL)

    @property
    def agent_pid(self) -> int:
        # Empty for a moment, while a new agent takes it over.
        return int((self.directory / "agent" / "lock").read_text() or 0)


@contextlib.asynccontextmanager
async def a_house(policy: Policy, **times: float) -> AsyncIterator[House]:
    with tempfile.TemporaryDirectory(prefix="sorna-", dir="/tmp") as directory:
        house = House(Path(directory), policy, **times)
        await house.open()
        house.start_agent()
        try:
            yield house
        finally:
            await house.stop_agent()
            await house.close()


ANY = Policy(max_kernels=None, default_limits=Limits(memory=4 << 30), max_limits=Limits())


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with a_house(ANY) as house:
        yield house


async def test_two_clients_see_one_kernel_and_each_gets_its_own_replies(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    one, other = Client(house.kernels, kernel.id), Client(house.kernels, kernel.id)

    first = one.execute("x = 40")
    assert (await one.reply(first))["status"] == "ok"
    second = other.execute("print(x + 2)")
    printed = await one.output(second)

    assert printed == "42\n"
    assert (await other.reply(second))["execution_count"] == 2
    assert one.replies(second) == []
    assert kernel.connections == 2
    one.close()
    one.close()
    assert kernel.connections == 1


async def test_word_of_a_kernel_that_comes_after_its_end_changes_nothing(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    running = await house.registry.get_kernel(kernel.id)
    preparing = replace(running, status=KernelStatus.PREPARING, revision=running.revision - 1)

    # Transactions that were done before are heard of afterwards.
    house.kernels._apply(preparing)
    assert kernel.status is KernelStatus.RUNNING

    await house.kernels.stop(kernel.id)
    house.kernels._apply(running)
    assert house.kernels.list() == []


async def test_a_client_that_pauses_lags_and_misses_nothing_and_others_go_on(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    quick, slow = Client(house.kernels, kernel.id), Client(house.kernels, kernel.id)
    await quick.output(quick.execute("1"))
    slow.attachment.pause()
    before = len(slow.messages)

    run = quick.execute("for i in range(2000): print(i, flush=True)")
    assert await quick.output(run) == "".join(f"{i}\n" for i in range(2000))
    assert len(slow.messages) == before

    slow.attachment.resume()
    assert await slow.output(run) == "".join(f"{i}\n" for i in range(2000))
    later = quick.execute("print('together again')")
    for client in (quick, slow):
        assert await client.output(later) == "together again\n"
        iopub = [m.seq for m in client.messages if m.channel == "iopub"]
        assert iopub == sorted(set(iopub))
    assert not slow.attachment.is_behind


async def test_a_session_that_comes_back_begins_behind_what_it_acknowledged(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    laptop = Client(house.kernels, kernel.id, "laptop", resumes=True)
    await laptop.output(laptop.execute("print('one')"))
    read = laptop.messages[-1].seq
    laptop.attachment.acknowledge(read)
    unfinished = laptop.execute("import time; time.sleep(0.5); print('two')")
    await laptop.until(lambda: laptop.messages[-1].seq > read)  # busy: it has begun
    laptop.close()
    other = Client(house.kernels, kernel.id)
    await other.output(other.execute("print('three')"))

    back = Client(house.kernels, kernel.id, "laptop", resumes=True)

    assert await back.output(unfinished) == "two\n"
    assert (await back.reply(unfinished))["status"] == "ok"
    last = max(m.seq for m in other.messages if not m.session)
    await back.until(lambda: any(m.seq == last for m in back.messages))
    assert back.messages[0].seq == read + 1
    assert [m.seq for m in back.messages] == sorted({m.seq for m in back.messages})


async def test_the_journal_is_read_by_number_to_its_end_or_as_it_grows(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    await client.output(client.execute("print('one')"))

    found = await house.messages(kernel.id)

    assert [m.seq for m in found] == list(range(1, len(found) + 1))
    assert [m.parts for m in found if m.seq >= client.messages[0].seq] == [
        m.parts for m in client.messages
    ]
    assert (await house.messages(kernel.id, since=3))[0].seq == 3
    assert await house.messages(kernel.id, since=10_000) == []

    following = house.kernels.messages(kernel.id, since=len(found) + 1, follow=True)
    assert await anext(following) == []  # at once: what comes is not missed
    run = client.execute("print('two')")
    came: list[Any] = []
    async with asyncio.timeout(30):
        while not any(m.msg_type == "stream" for m in came):
            came += await anext(following)
    await client.output(run)
    await house.kernels.stop(kernel.id)
    async with asyncio.timeout(30):
        came += [m async for items in following for m in items]  # …and ends with the kernel
    first = len(found) + 1
    assert [m.seq for m in came] == list(range(first, first + len(came)))


async def test_a_follower_that_leaves_leaves_no_cursor_at_the_relay(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    await client.output(client.execute("1"))
    (link,) = house.agents._links.values()
    sent_to: list[bytes] = []  # whatever cursor the relay sends to, known here or not
    take = link._take

    def watch(frames: list[bytes]) -> None:
        if frames[0] == RECORDS:
            sent_to.append(bytes(frames[1]))
        take(frames)

    monkeypatch.setattr(link, "_take", watch)
    following = house.kernels.messages(kernel.id, follow=True)
    assert await anext(following) == []
    (reading,) = kernel.readings
    await anext(following)
    assert reading.id in sent_to

    await following.aclose()

    sent_to.clear()
    assert await client.output(client.execute("print('later')")) == "later\n"
    assert sent_to
    assert reading.id not in sent_to
    assert kernel.readings == []


async def test_a_kernel_has_the_environment_and_the_directory_of_its_request(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER, env={"COLOUR": "blue"}, path="course/week1")
    client = Client(house.kernels, kernel.id)

    asked = client.execute("import os; print(os.environ['COLOUR'], os.getcwd())")
    printed = await client.output(asked)

    assert printed.startswith("blue ")
    assert printed.strip().endswith("course/week1")


async def test_execution_state_follows_the_kernel(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    before = kernel.last_activity

    asked = client.execute("import time\nwhile True: time.sleep(0.05)")
    await client.until(lambda: kernel.execution_state == "busy")
    await house.kernels.interrupt(kernel.id)

    assert (await client.reply(asked))["ename"] == "KeyboardInterrupt"
    await client.until(lambda: kernel.execution_state == "idle")
    assert kernel.last_activity > before


async def test_clients_stay_attached_over_a_restart(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    await client.reply(client.execute("x = 1"))

    await house.kernels.restart(kernel.id)
    asked = client.execute("print('x' in globals())")

    assert await client.output(asked) == "False\n"
    assert [status for status, _ in client.events] == [
        KernelStatus.RESTARTING,
        KernelStatus.RUNNING,
    ]
    assert house.kernels.get(kernel.id) is kernel


async def test_what_is_sent_during_a_restart_waits_for_it(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)

    restart = asyncio.create_task(house.kernels.restart(kernel.id))
    await client.until(lambda: kernel.status is KernelStatus.RESTARTING)
    asked = client.execute("print('patience')")
    await restart

    assert await client.output(asked) == "patience\n"


async def test_a_kernel_that_dies_says_why(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)

    client.execute("import os; os._exit(7)")
    await client.until(lambda: kernel.is_over)

    assert client.events[-1][0] is KernelStatus.DEAD
    assert "exit code 7" in client.events[-1][1]
    with pytest.raises(KernelNotFound, match="exit code 7"):
        house.kernels.get(kernel.id)
    assert house.kernels.owner_of(kernel.id) == OWNER


async def test_a_stopped_kernel_is_gone_and_its_clients_know(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)

    await house.kernels.stop(kernel.id, "enough")

    assert client.events[-1] == (KernelStatus.TERMINATED, "enough")
    assert house.kernels.list() == []
    await until(lambda: not any((house.directory / "k").iterdir()))
    with pytest.raises(KernelNotFound):
        client.execute("1")


async def test_a_repeated_request_gives_the_same_kernel(house: House) -> None:
    one, other = await asyncio.gather(
        house.kernels.start(owner=OWNER, idempotency_key="k"),
        house.kernels.start(owner=OWNER, idempotency_key="k"),
    )

    assert one is other
    assert house.kernels.list(OWNER) == [one]
    with pytest.raises(KernelExists):
        await house.kernels.start(owner=OWNER, kernel_id=one.id)


async def test_an_unknown_kernelspec_names_those_that_there_are(house: House) -> None:
    with pytest.raises(UnknownKernelspec, match="python3"):
        await house.kernels.start(owner=OWNER, name="cobol")
    assert house.kernels.list() == []


async def test_a_start_that_fails_leaves_nothing(house: House) -> None:
    with pytest.raises(InvalidRequest):
        await house.kernels.start(owner=OWNER, env={"A": "nul\0byte"})

    assert house.kernels.list() == []
    assert await house.registry.list_kernels() == []


async def test_an_idle_kernel_without_clients_is_stopped_and_a_busy_one_is_not(
    house: House,
) -> None:
    idle = await house.kernels.start(owner=OWNER, idle_timeout=1.0)
    busy = await house.kernels.start(owner=OWNER, idle_timeout=1.0)
    client = Client(house.kernels, busy.id)
    client.execute("while True: pass")
    await client.until(lambda: busy.execution_state == "busy")
    client.close()

    await until(lambda: idle.is_over)

    assert idle.reason == "idle for 1 s"
    assert not busy.is_over


async def test_a_killed_agent_comes_back_and_its_kernels_never_stopped(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    await client.reply(client.execute("x = 5"))
    killed = house.agent_pid

    os.kill(killed, signal.SIGKILL)
    # The relay is another process: messages go on while there is no agent.
    assert await client.output(client.execute("print(x)")) == "5\n"
    await until(lambda: house.agent_pid not in (0, killed))
    beats = len(house.beats)
    await until(lambda: len(house.beats) > beats)

    assert await client.output(client.execute("print(x + 1)")) == "6\n"
    await house.kernels.interrupt(kernel.id)
    assert kernel.status is KernelStatus.RUNNING


async def test_a_relay_that_finds_its_journal_damaged_gives_no_number_twice(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    await client.output(client.execute("print('a' * 1000)"))
    last = client.messages[-1].seq
    [journal] = (house.directory / "agent/journals" / kernel.id).glob("*.journal")
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)

    house.kill_relay()
    await client.until(lambda: len(client.gaps) == 2)
    output = await client.output(client.execute("print('after')"))

    assert output == "after\n"
    lost, note = client.gaps
    assert (lost.first, lost.last, lost.messages) == (last + 1, note.first - 1, None)
    assert (lost.reason, note.reason) == (
        "the agent has lost it",
        "the agent's relay was restarted",
    )
    [late, *_] = [item async for items in house.kernels.messages(kernel.id, last) for item in items]
    assert isinstance(late, Gap)
    assert (late.first, late.last) == (last, lost.last)


async def test_a_gateway_that_was_killed_is_replaced_and_adopts_the_kernels(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)
    await client.reply(client.execute("x = 'kept'"))

    await house.close()
    await house.open()
    adopted = house.kernels.get(kernel.id)
    again = Client(house.kernels, kernel.id)

    assert await again.output(again.execute("print(x)")) == "kept\n"
    assert adopted.status is KernelStatus.RUNNING
    assert adopted.owner == OWNER


async def test_kernels_of_a_silent_agent_are_lost_and_come_back_with_it() -> None:
    async with a_house(ANY, lost_agent_timeout=4.0) as house:
        kernel = await house.kernels.start(owner=OWNER)
        client = Client(house.kernels, kernel.id)

        os.kill(house.agent_pid, signal.SIGSTOP)
        await client.until(lambda: kernel.status is KernelStatus.LOST)
        os.kill(house.agent_pid, signal.SIGCONT)
        await client.until(lambda: kernel.status is KernelStatus.RUNNING)

        assert await client.output(client.execute("print('back')")) == "back\n"


async def test_an_agent_is_no_orphan_while_the_database_is_away(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: bool(house.beats))
    beat = house.beats[-1]

    async def away(*_: Any) -> None:
        raise Unavailable("The registry's database does not answer")

    monkeypatch.setattr(house.registry, "record_beat", away)

    assert await house.kernels.hear(beat) == BeatReply(accepted=True)
    for stranger in (
        msgspec.structs.replace(beat, agent_id="another"),
        msgspec.structs.replace(beat, public_key="another"),
    ):
        with pytest.raises(Unavailable):
            await house.kernels.hear(stranger)


async def test_an_agent_is_not_believed_about_another_agents_kernel(house: House) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    await until(lambda: any(beat.kernels for beat in house.beats))
    report = KernelReport(
        kernel_id=kernel.id,
        status=KernelStatus.RUNNING,
        execution_state="busy",
        last_activity=1e12,
        seq=1 << 40,
    )
    beat = msgspec.structs.replace(
        house.beats[-1], agent_id="another", public_key="another", kernels=[report]
    )

    reply = await house.kernels.hear(beat)
    del house.kernels._agent_rows["another"]  # nobody to be stopped with the house

    assert reply == BeatReply(accepted=True, destroy=[kernel.id])
    assert (kernel.execution_state, kernel.last_activity < 1e12) == ("idle", True)


async def test_who_could_not_be_attached_is_no_connection(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = await house.kernels.start(owner=OWNER)

    def full(*_: Any, **__: Any) -> None:
        raise AgentUnreachable("it does not take messages")

    with monkeypatch.context() as context:
        context.setattr(house.agents, "attach", full)
        with pytest.raises(AgentUnreachable):
            Client(house.kernels, kernel.id)

    assert (kernel.connections, kernel.attached) == (0, [])


async def test_limits_above_the_policy_are_refused_not_cut() -> None:
    policy = Policy(
        max_kernels=1,
        default_limits=Limits(memory=1 << 30, pids=200),
        max_limits=Limits(memory=2 << 30, pids=200),
    )
    async with a_house(policy) as house:
        with pytest.raises(LimitExceeded, match="memory"):
            await house.kernels.start(owner=OWNER, limits=Limits(memory=3 << 30))
        kernel = await house.kernels.start(owner=OWNER, limits=Limits(memory=2 << 30))
        with pytest.raises(LimitExceeded):
            await house.kernels.start(owner=OWNER)

        assert kernel.limits == Limits(memory=2 << 30, pids=200)


async def test_restarting_a_kernel_that_is_being_restarted_waits_or_is_refused(
    house: House,
) -> None:
    kernel = await house.kernels.start(owner=OWNER)
    client = Client(house.kernels, kernel.id)

    results = await asyncio.gather(
        house.kernels.restart(kernel.id), house.kernels.restart(kernel.id), return_exceptions=True
    )

    assert all(result is None or isinstance(result, IllegalTransition) for result in results)
    assert await client.output(client.execute("print('fine')")) == "fine\n"


async def test_an_agent_with_a_wrong_join_token_is_refused(house: House) -> None:
    await until(lambda: bool(house.beats))
    (house.directory / "wrong").write_text("guess")
    (house.directory / "other").mkdir()
    settings = AgentSettings(
        data_dir=house.directory / "other",
        runtime_dir=house.directory / "other",
        manager_address=f"ipc://{house.directory}/manager.sock",
        manager_key=house.keys.public,
        join_token_file=house.directory / "wrong",
        runtime="local",
        orphan_timeout=20,
    )
    process = await asyncio.create_subprocess_exec(
        *settings.argv(), stderr=asyncio.subprocess.PIPE, start_new_session=True
    )

    async with asyncio.timeout(30):
        _, said = await process.communicate()

    assert process.returncode not in (0, None)
    assert b"wrong join token" in said
    assert len(list(house.kernels.agents())) == 1

"""A real agent process with its relay: kernels are plain ipykernels, the test is the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

import sorna_jupyter.cli.agent
from sorna_agent.agent import Agent
from sorna_agent.app import FAILED, Identity, parse_options
from sorna_agent.kernel_store import KernelStore
from sorna_agent.relay_link import RelayLink
from sorna_agent.resources import find_slots, usable_cpus, usable_memory
from sorna_jupyter.exceptions import (
    AgentDiskFull,
    ImageUnavailable,
    InvalidRequest,
    KernelExists,
    KernelNotFound,
    KernelStartFailed,
    SornaError,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import (
    Beat,
    BeatReply,
    CreateKernel,
    DestroyKernel,
    Done,
    ImageState,
    InterruptKernel,
    KernelReport,
    KernelStarted,
    KernelStatus,
    ReadKernelLog,
    RestartKernel,
    StopAgent,
)
from tests.agent_parts import PATIENCE, IpykernelRuntime, Line, Manager, agent_options, until
from tests.disks import fill


def create(kernel_id: str = "k1", **fields: object) -> CreateKernel:
    return CreateKernel(kernel_id=kernel_id, image="python3", owner="ada", **fields)


def statuses(beat: Beat) -> dict[str, KernelStatus]:
    return {report.kernel_id: report.status for report in beat.kernels}


@dataclass
class Host:
    """A directory with agents that were started in it, and the gateway's two ends."""

    directory: Path
    manager: Manager
    agents: list[subprocess.Popen[str]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def start_agent(self, *options: str) -> subprocess.Popen[str]:
        argv = agent_options(self.manager, self.directory, *options)
        agent = subprocess.Popen(
            [sys.executable, "-m", "tests.agent_parts", *argv],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.agents.append(agent)
        return agent

    async def line(self) -> Line:
        await self.manager.first_beat()
        line = self.manager.line()
        self.lines.append(line)
        return line

    async def ended(self, agent: subprocess.Popen[str]) -> str:
        """What it wrote, once it has ended. Reading to the end also waits for its relay."""
        _, text = await asyncio.to_thread(agent.communicate, timeout=PATIENCE)
        return text

    def processes(self) -> list[str]:
        """Command lines of all that was started below this directory."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.directory) in command and command:
                found.append(command)
        return found

    async def end(self) -> None:
        for line in self.lines:
            await line.close()
        for agent in self.agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
        for agent in reversed(self.agents):  # what a former one left was ended by the next
            await self.ended(agent)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    directory = Path(tempfile.mkdtemp(prefix="sorna-"))
    async with Manager(directory) as manager:
        host = Host(directory, manager)
        yield host
        await host.end()
    left = host.processes()
    shutil.rmtree(directory)
    assert left == []


# -- one agent -------------------------------------------------------------------------------


async def test_the_first_beat_says_who_and_where_it_is_and_what_it_has(host: Host):
    host.start_agent()

    beat = await host.manager.first_beat()

    identity = json.loads((host.directory / "data/agent.json").read_text())
    assert (beat.agent_id, beat.public_key) == (identity["agent_id"], identity["public_key"])
    assert host.manager.proven_keys == {beat.public_key}
    assert beat.join_token == "a-secret-to-join-with"
    assert beat.addresses[0] == f"ipc://{host.directory}/run/relay.sock"
    assert beat.addresses[1].startswith("tcp://127.0.0.1:")
    assert (beat.runtime, beat.isolation) == ("plain", "Kernels are not isolated.")
    assert [image.name for image in beat.images] == ["python3"]
    assert beat.relay_started > 0
    for secret in ("data/agent.json", "data/lock"):
        assert (host.directory / secret).stat().st_mode & 0o077 == 0


async def test_a_kernel_is_created_used_and_destroyed(host: Host):
    host.start_agent()
    line = await host.line()

    started = await line.ask(create(env={"COLOUR": "red"}))

    assert isinstance(started, KernelStarted)
    assert started.kernel_info["language_info"]["name"] == "python"
    await host.manager.beat_with(lambda b: statuses(b) == {"k1": KernelStatus.RUNNING})
    assert host.manager.last.kernels[0].owner == "ada"
    line.subscribe("k1")
    code = "import os; print(os.environ['COLOUR'])"
    assert await line.client("k1").result(code) == "red\n"
    assert await line.ask(DestroyKernel(kernel_id="k1")) == Done()
    assert await line.ask(DestroyKernel(kernel_id="k1")) == Done()
    await host.manager.beat_with(lambda b: b.kernels == [])
    assert list((host.directory / "run/k").iterdir()) == []


async def test_creating_the_same_kernel_twice_makes_one(host: Host):
    host.start_agent()
    line = await host.line()

    one, two = await asyncio.gather(line.ask(create()), line.ask(create()))
    three = await line.ask(create())

    assert one == two == three
    assert len([p for p in host.processes() if "ipykernel_launcher" in p]) == 1
    with pytest.raises(KernelExists):
        await line.ask(CreateKernel(kernel_id="k1", image="python3", owner="eve"))


async def test_bad_requests_are_answered_and_leave_nothing(host: Host):
    host.start_agent()
    line = await host.line()

    with pytest.raises(UnknownKernelspec, match="'cobol'; there are: python3"):
        await line.ask(CreateKernel(kernel_id="k1", image="cobol", owner="ada"))
    for kernel_id in ("", "../../etc", "a" * 200, "a/b"):
        with pytest.raises(InvalidRequest):
            await line.ask(create(kernel_id))
    for request in (
        RestartKernel(kernel_id="no"),
        InterruptKernel(kernel_id="no"),
        ReadKernelLog(kernel_id="no"),
    ):
        with pytest.raises(KernelNotFound):
            await line.ask(request)

    await line.ask(create())
    await host.manager.beat_with(lambda b: statuses(b) == {"k1": KernelStatus.RUNNING})


async def test_what_is_no_request_is_answered_with_an_error(host: Host):
    host.start_agent()
    line = await host.line()

    class Nonsense(CreateKernel, tag="Nonsense"):
        pass

    with pytest.raises(InvalidRequest, match="not a request"):
        await line.ask(Nonsense(kernel_id="k1", image="python3", owner="ada"))


async def test_a_kernel_that_does_not_answer_in_time_is_removed_and_explained(host: Host):
    host.start_agent()
    line = await host.line()

    with pytest.raises(KernelStartFailed, match="did not answer within 0.05 s"):
        await line.ask(create(start_timeout=0.05))

    await host.manager.beat_with(lambda b: b.kernels == [])
    assert not any("ipykernel_launcher" in p for p in host.processes())


async def test_a_kernel_that_dies_while_it_starts_fails_at_once_with_what_it_said(host: Host):
    host.start_agent()
    line = await host.line()

    with pytest.raises(KernelStartFailed, match="(?s)the process ended.*no_such_thing"):
        await line.ask(create(env={"PYTHONWARNINGS": "", "PYTHONPLATLIBDIR": "no_such_thing"}))


async def test_a_restart_keeps_the_clients_and_loses_the_variables(host: Host):
    host.start_agent()
    line = await host.line()
    await line.ask(create(env={"COLOUR": "red"}))
    line.subscribe("k1", 1)
    client = line.client("k1")
    await client.result("x = 1")

    assert isinstance(await line.ask(RestartKernel(kernel_id="k1")), KernelStarted)

    code = "import os; print('x' in globals(), os.environ['COLOUR'])"
    assert await client.result(code) == "False red\n"
    seen = [statuses(beat).get("k1") for beat in host.manager.beats]
    assert KernelStatus.RESTARTING in seen


async def test_an_interrupt_reaches_the_running_cell(host: Host):
    host.start_agent()
    line = await host.line()
    await line.ask(create())
    line.subscribe("k1")
    client = line.client("k1")
    msg_id = client.execute("import time\nprint(1, flush=True)\ntime.sleep(600)")
    await line.wait_for(lambda m: m.msg_type == "stream")

    await line.ask(InterruptKernel(kernel_id="k1"))

    assert (await client.reply_to(msg_id))["ename"] == "KeyboardInterrupt"


async def test_a_kernel_that_dies_is_reported_with_its_reason_until_it_is_destroyed(host: Host):
    host.start_agent()
    line = await host.line()
    await line.ask(create())
    line.subscribe("k1")

    line.client("k1").execute("import os; os._exit(3)")

    beat = await host.manager.beat_with(lambda b: statuses(b) == {"k1": KernelStatus.DEAD})
    assert beat.kernels[0].reason == "the process ended"
    with pytest.raises(KernelStartFailed, match="the process ended"):
        await line.ask(create())
    with pytest.raises(KernelNotFound, match="the process ended"):
        await line.ask(RestartKernel(kernel_id="k1"))
    host.manager.reply = BeatReply(accepted=True, destroy=["k1"])
    await host.manager.beat_with(lambda b: b.kernels == [])


async def test_a_beat_tells_busy_and_idle(host: Host):
    host.start_agent()
    line = await host.line()
    await line.ask(create())

    line.client("k1").execute("import time; time.sleep(1)")

    busy = await host.manager.beat_with(lambda b: b.kernels[0].execution_state == "busy")
    idle = await host.manager.beat_with(lambda b: b.kernels[0].execution_state == "idle")
    assert idle.kernels[0].last_activity > busy.kernels[0].last_activity


async def test_destroying_a_kernel_that_starts_ends_the_start(host: Host):
    host.start_agent()
    line = await host.line()
    creating = asyncio.create_task(line.ask(create()))
    await host.manager.beat_with(lambda b: statuses(b) == {"k1": KernelStatus.PREPARING})

    await line.ask(DestroyKernel(kernel_id="k1"))

    with pytest.raises(KernelStartFailed, match="stopped while it was starting"):
        await creating
    await host.manager.beat_with(lambda b: b.kernels == [])


# -- its end, and the next one ---------------------------------------------------------------


async def test_a_signal_ends_the_agent_with_all_it_started(host: Host):
    agent = host.start_agent()
    line = await host.line()
    await line.ask(create())

    agent.send_signal(signal.SIGTERM)
    await host.ended(agent)

    assert agent.returncode == 0
    assert host.processes() == []
    assert not (host.directory / "run").exists()
    assert json.loads((host.directory / "data/kernels.json").read_text()) == []


async def test_a_gateway_stops_the_agent_and_hears_when_the_kernels_are_gone(host: Host):
    agent = host.start_agent()
    line = await host.line()
    await line.ask(create())

    assert await line.ask(StopAgent()) == Done()

    assert not any("ipykernel_launcher" in p for p in host.processes())
    await host.ended(agent)
    assert agent.returncode == 0


async def test_a_second_agent_on_the_same_data_ends_with_a_clear_message(host: Host):
    host.start_agent()
    await host.manager.first_beat()

    second = host.start_agent()

    assert "an agent already runs on" in await host.ended(second)
    assert second.returncode == 3


async def test_an_agent_that_no_gateway_wants_says_so_and_ends(host: Host):
    host.manager.reply = BeatReply(accepted=False, reason="wrong join token")
    agent = host.start_agent()

    assert "wrong join token" in await host.ended(agent)
    assert agent.returncode == FAILED


async def test_without_any_gateway_the_agent_ends_after_the_orphan_timeout(host: Host):
    agent = host.start_agent("--orphan-timeout", "2")
    line = await host.line()
    await line.ask(create())

    host.manager.reply = None

    assert "no gateway has answered" in await host.ended(agent)
    assert agent.returncode == 0
    assert host.processes() == []


async def test_told_to_keep_everything_the_agent_does_not_count_silence(host: Host):
    agent = host.start_agent("--orphan-timeout", "1")
    line = await host.line()
    await line.ask(create())

    host.manager.reply = None
    await line.ask(StopAgent(keep_kernels=True))
    beats = len(host.manager.beats)
    await until(lambda: len(host.manager.beats) > beats + 5)  # 0.5 s each
    assert agent.poll() is None
    line.subscribe("k1")
    assert await line.client("k1").result("print(1)") == "1\n"

    host.manager.reply = BeatReply(accepted=True)
    await until(lambda: len(host.manager.beats) > beats + 7)
    host.manager.reply = None
    assert "no gateway has answered" in await host.ended(agent)


async def test_a_killed_agents_kernels_and_their_clients_go_on_and_the_next_adopts_them(
    host: Host,
):
    agent = host.start_agent()
    line = await host.line()
    await line.ask(create("k1"))
    await line.ask(create("k2"))
    line.subscribe("k1")
    client = line.client("k1")
    await client.result("x = 5")

    agent.kill()
    agent.wait()

    assert await client.result("print(x)") == "5\n"
    former = host.manager.last
    k2 = json.loads((host.directory / "data/kernels.json").read_bytes())[1]
    os.kill(int((Path(k2["directory"]) / "pid").read_text()), signal.SIGKILL)
    host.start_agent()
    beat = await host.manager.beat_with(lambda b: len(b.kernels) == 2 and b is not former)
    await host.manager.beat_with(lambda b: statuses(b)["k2"] == KernelStatus.DEAD)
    assert statuses(host.manager.last)["k1"] is KernelStatus.RUNNING
    assert (beat.agent_id, beat.relay_started) == (former.agent_id, former.relay_started)
    assert await client.result("print(x + 1)") == "6\n"
    await line.ask(RestartKernel(kernel_id="k1"))
    assert await client.result("print('x' in globals())") == "False\n"


async def test_an_agent_that_was_killed_comes_back_on_a_full_disk(host: Host, little_disk: Path):
    data_dir = ("--data-dir", str(little_disk / "data"))
    first = host.start_agent(*data_dir)
    line = await host.line()
    await line.ask(create())
    fill(little_disk / "filler")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    host.manager.beats.clear()

    second = host.start_agent(*data_dir)

    await host.manager.beat_with(lambda b: statuses(b) == {"k1": KernelStatus.RUNNING})
    assert (little_disk / "data" / "lock").read_text() == str(second.pid)
    assert await line.ask(DestroyKernel(kernel_id="k1")) == Done()


async def test_when_the_relay_dies_the_beat_tells_and_the_kernel_goes_on(host: Host):
    host.start_agent()
    line = await host.line()
    await line.ask(create())
    line.subscribe("k1")
    client = line.client("k1")
    await client.result("x = 5")
    former = host.manager.last.relay_started

    (relay,) = [
        int(entry.parent.name)
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if b"sorna_agent.relay" in (command := entry.read_bytes())
        and str(host.directory).encode() in command
    ]
    os.kill(relay, signal.SIGKILL)

    await host.manager.beat_with(lambda b: b.relay_started > former)
    again = await host.line()
    again.subscribe("k1")
    assert await again.client("k1").result("print(x)") == "5\n"


async def test_kernels_can_outlive_a_signal_to_the_agent(host: Host):
    agent = host.start_agent("--keep-kernels")
    line = await host.line()
    await line.ask(create())

    agent.send_signal(signal.SIGTERM)
    agent.wait(PATIENCE)

    assert any("ipykernel_launcher" in p for p in host.processes())
    host.manager.beats.clear()
    host.start_agent()
    await host.manager.beat_with(lambda b: statuses(b) == {"k1": KernelStatus.RUNNING})


# -- the agent's decisions, without a process ------------------------------------------------


class SilentLink(RelayLink):
    """A relay that is never started: kernels never answer."""

    def __init__(self) -> None:
        self.adopted_kernels: list[str] = []
        self.asked: list[object] = []

    def _send(self, frames: list[bytes]) -> None:
        self.asked.append(frames)


@pytest.fixture
def runtime() -> IpykernelRuntime:
    return IpykernelRuntime()


@pytest.fixture
def make_agent(runtime: IpykernelRuntime, tmp_path: Path) -> Callable[[], Agent]:
    def make() -> Agent:
        return Agent(runtime, SilentLink(), KernelStore(tmp_path / "kernels.json"), tmp_path / "k")

    return make


async def test_a_missing_image_is_built_first_and_the_progress_is_the_kernels_reason(
    runtime: IpykernelRuntime, make_agent: Callable[[], Agent]
):
    agent = make_agent()
    runtime.image = msgspec.structs.replace(runtime.image, state=ImageState.MISSING)
    seen: list[KernelReport] = []
    changes: list[bool] = []
    agent.on_change = changes.append

    async def build(on_change: Callable[[], None]) -> None:
        runtime.image = msgspec.structs.replace(
            runtime.image, state=ImageState.BUILDING, progress=0.5, message="pip install"
        )
        changes.clear()
        on_change()
        seen.extend(agent.reports())
        runtime.image = msgspec.structs.replace(
            runtime.image, state=ImageState.FAILED, message="no network"
        )

    runtime.building = build

    with pytest.raises(ImageUnavailable, match="'python3' could not be built: no network"):
        await agent.handle(create())

    (report,) = seen
    assert report.status is KernelStatus.PREPARING
    assert report.reason == "building the image of python3: 50% pip install"
    assert changes[0] is False
    assert agent.reports() == []


async def test_a_kernel_that_was_starting_when_its_agent_died_is_dead_to_the_next(
    runtime: IpykernelRuntime, make_agent: Callable[[], Agent]
):
    runtime.image = msgspec.structs.replace(runtime.image, state=ImageState.MISSING)
    never = asyncio.Event()

    async def build(on_change: Callable[[], None]) -> None:
        await never.wait()

    runtime.building = build
    first = make_agent()
    creating = asyncio.create_task(first.handle(create()))
    await until(lambda: first.reports())

    second = make_agent()
    await second.adopt()

    (report,) = second.reports()
    assert report.status is KernelStatus.DEAD
    assert report.reason == "its agent was stopped while it was starting"
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating


async def test_on_a_full_disk_kernels_are_destroyed_and_only_new_ones_refused(
    runtime: IpykernelRuntime, little_disk: Path, caplog: pytest.LogCaptureFixture
):
    store = KernelStore(little_disk / "kernels.json")
    agent = Agent(runtime, SilentLink(), store, little_disk / "k")
    for kernel_id in ("k1", "k2"):
        agent._add(create(kernel_id))
    before = store.load()

    fill(little_disk / "filler")
    with pytest.raises(AgentDiskFull, match="The agent's disk is full"):
        await agent.handle(create("k3"))
    assert await agent.handle(DestroyKernel(kernel_id="k1")) == Done()

    assert [report.kernel_id for report in agent.reports()] == ["k2"]
    assert store.load() == before
    assert [file.name for file in little_disk.glob("kernels.*")] == ["kernels.json"]
    agent.save_the_rest()
    (little_disk / "filler").unlink()
    agent.save_the_rest()
    assert [record.request.kernel_id for record in store.load()] == ["k2"]
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [
        "the record of the kernels can't be saved for now: [Errno 28] No space left on device"
    ]


async def test_a_kernel_whose_own_files_do_not_fit_is_refused_and_leaves_nothing(
    runtime: IpykernelRuntime, little_disk: Path, tmp_path: Path
):
    agent = Agent(runtime, SilentLink(), KernelStore(tmp_path / "kernels.json"), little_disk / "k")
    fill(little_disk / "filler")

    with pytest.raises(AgentDiskFull, match="The agent's disk is full"):
        await agent.handle(create())

    assert agent.reports() == []
    assert list((little_disk / "k").iterdir()) == []


async def test_a_kernel_that_cannot_be_destroyed_stays_reported_and_can_be_tried_again(
    runtime: IpykernelRuntime, make_agent: Callable[[], Agent], monkeypatch: pytest.MonkeyPatch
):
    agent = make_agent()
    agent._add(create())
    engine_is_away = True

    async def destroy(kernel_id: str) -> None:
        if engine_is_away:
            raise SornaError("the engine is away")

    monkeypatch.setattr(runtime, "destroy", destroy)

    with pytest.raises(SornaError, match="the engine is away"):
        await agent.handle(DestroyKernel(kernel_id="k1"))
    assert agent.reports()[0].status is KernelStatus.TERMINATING
    engine_is_away = False
    await agent.handle(DestroyKernel(kernel_id="k1"))
    assert agent.reports() == []


def test_a_key_may_begin_with_a_dash():
    common = "--join-token-file t --data-dir d --runtime-dir r --manager-addr a".split()

    options = parse_options([*common, "--manager-key", "-k", "--gateway-key", "--g"])

    assert (options.manager_key, options.gateway_key) == ("-k", ["--g"])


def test_an_identity_is_made_once_and_for_this_user_only(tmp_path: Path):
    path = tmp_path / "agent.json"

    identity = Identity.load(path)

    assert Identity.load(path) == identity
    assert path.stat().st_mode & 0o777 == 0o600


def test_slots_are_what_this_process_may_use():
    slots = find_slots()

    assert 0 < slots.cpus == usable_cpus() <= (os.cpu_count() or 1)
    assert 64 << 20 < slots.memory == usable_memory()
    assert slots.kernels >= 4
    assert find_slots(max_kernels=2).kernels == 2


def test_an_agent_refuses_a_socket_directory_that_is_someone_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In /tmp anyone could have made it first."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "theirs")
    monkeypatch.setenv("SORNA_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))

    options = "--manager-addr=tcp://127.0.0.1:9 --manager-key=k --join-token-file=t".split()

    assert sorna_jupyter.cli.agent.main(options) == 1

    assert "belongs to someone else" in capsys.readouterr().err

"""Whatever breaks while a kernel writes, everyone gets what it wrote: all, in order, once.

Rounds of faults at random moments: a cell counts, then one asked for over REST; meanwhile something
is cut, killed, filled or stalled. Then what two tabs, a follower of `messages?since=`, the run and
a fresh reading of the journal got is compared with the counters, and with one another.

The seed is printed; `SORNA_FAULT_SEED=…` repeats it. A seed that failed joins `FAILED_BEFORE`.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nbformat
import pytest

from tests.acceptance.engines import SecondEngine
from tests.acceptance.fault_parts import (
    DOUBT,
    IN_FLIGHT,
    Cell,
    Reader,
    Scene,
    Tab,
    difference,
    doubled,
    hole_in,
    ids,
    is_text,
    messages_of,
    numbers_in,
    of,
    once,
    printed,
    rss,
    unannounced,
    units,
)
from tests.chaos import Cut
from tests.disks import fill, small_disk
from tests.gateways import Gateway, Home, text_of
from tests.kernel_socket import Message
from tests.waiting import PATIENCE, wait_until

SEED = os.environ.get("SORNA_FAULT_SEED") or str(secrets.randbelow(1_000_000))

FAILED_BEFORE: list[tuple[str, str, str]] = []
"""(runtime, fault, seed)"""

Fault = Callable[[Scene, random.Random], None]
NewScene = Callable[..., Scene]


# -- what may happen -------------------------------------------------------------------------


def clean_close(scene: Scene, rng: random.Random) -> None:
    scene.far.leave()
    time.sleep(rng.uniform(0, 0.5))
    scene.far.come_back()


def orderly_cut(scene: Scene, rng: random.Random) -> None:
    scene.proxy.cut(Cut.FIN)


def reset(scene: Scene, rng: random.Random) -> None:
    scene.proxy.cut(Cut.RST)


def reset_within_a_frame(scene: Scene, rng: random.Random) -> None:
    scene.proxy.cut(rng.choice((Cut.RST, Cut.FIN)), after=rng.randint(1, 3000))


def silence(scene: Scene, rng: random.Random) -> None:
    """The server does not learn of the cut: the client is back while it still writes to the old
    connection."""
    scene.proxy.cut(Cut.SILENCE)


def stall_and_reset(scene: Scene, rng: random.Random) -> None:
    scene.proxy.stall()
    time.sleep(rng.uniform(0.05, 0.5))
    scene.proxy.cut(rng.choice((Cut.RST, Cut.SILENCE)))
    scene.proxy.go_on()


def three_resets(scene: Scene, rng: random.Random) -> None:
    for _ in range(3):
        scene.proxy.cut(Cut.RST, after=rng.choice((0, rng.randint(1, 3000))))
        time.sleep(rng.uniform(0, 0.2))


def stalled_neighbour(scene: Scene, rng: random.Random) -> None:
    """Another tab stops reading for a while; nothing is cut."""
    scene.near.reads.clear()
    time.sleep(rng.uniform(0.2, 1))
    scene.near.reads.set()


def gateway_killed(scene: Scene, rng: random.Random) -> None:
    scene.replace_gateway()


def agent_killed(scene: Scene, rng: random.Random) -> None:
    scene.kill("sorna_agent.app")


FAULTS: dict[str, tuple[Fault, int, int]] = {
    # name: (fault, rounds with local kernels, rounds with Docker)
    "clean close": (clean_close, 6, 1),
    "FIN": (orderly_cut, 5, 0),
    "RST": (reset, 6, 1),
    "RST within a frame": (reset_within_a_frame, 8, 1),
    "silence": (silence, 4, 0),
    "stall, then RST": (stall_and_reset, 5, 0),
    "three RST": (three_resets, 3, 0),
    "a stalled neighbour": (stalled_neighbour, 4, 0),
    "gateway killed": (gateway_killed, 5, 1),
    "agent killed": (agent_killed, 4, 1),
}

# In turns: an agent that ends again and again within seconds is started again ever later.
ROUNDS = [
    *FAILED_BEFORE,
    *(
        (runtime, name, f"{SEED}-{runtime}-{name}-{number}")
        for runtime, column in (("local", 1), ("docker", 2))
        for number in range(10)
        for name, row in FAULTS.items()
        if number < row[column]
    ),
]
RELAY_ROUNDS = [
    (runtime, f"{SEED}-{runtime}-relay-{number}")
    for runtime, count in (("local", 4), ("docker", 1))
    for number in range(count)
]


# -- scenes ----------------------------------------------------------------------------------


class Scenes:
    """One a runtime, used by round after round until one fails."""

    def __init__(self) -> None:
        self._open: dict[str, Scene] = {}

    @contextmanager
    def round(self, runtime: str, seed: str) -> Iterator[tuple[Scene, random.Random]]:
        """A scene as good as new, and the round's dice."""
        print(f"SORNA_FAULT_SEED={SEED}; this round: {seed!r}")
        if runtime not in self._open:
            self._open[runtime] = Scene(f"--runtime={runtime}")
            self._open[runtime].open()
        scene = self._open[runtime]
        scene.proxy.spare()
        try:
            yield scene, random.Random(seed)
        except BaseException:
            print(f"the gateway's log:\n{scene.gateway.output[-5000:]}")
            self._open.pop(runtime).close()
            raise

    def close(self) -> None:
        for scene in self._open.values():
            scene.close()


@pytest.fixture(scope="module")
def all_scenes() -> Iterator[Scenes]:
    scenes = Scenes()
    yield scenes
    scenes.close()


@pytest.fixture
def scenes(request: pytest.FixtureRequest, runtime: str, all_scenes: Scenes) -> Scenes:
    if runtime == "docker":
        request.getfixturevalue("docker_gateway")  # its image is built once
    return all_scenes


@pytest.fixture
def new_scene() -> Iterator[Callable[..., Scene]]:
    """Makes scenes of this test's own, with local kernels unless it says otherwise."""
    made: list[Scene] = []

    def make(*args: str, **options: Any) -> Scene:
        scene = Scene(*(args or ("--runtime=local",)), **options)
        made.append(scene)
        scene.open()
        return scene

    yield make
    for scene in made:
        print(f"the gateway's log:\n{scene.gateway.output[-5000:]}")
        scene.close()


# -- rounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "fault", "seed"),
    ROUNDS,
    ids=[f"{runtime}-{fault}-{seed.rpartition('-')[2]}" for runtime, fault, seed in ROUNDS],
)
def test_everyone_gets_what_the_kernel_sent(
    scenes: Scenes, runtime: str, fault: str, seed: str
) -> None:
    with scenes.round(runtime, seed) as (scene, rng):
        by_tab, over_rest = some_cell(rng), some_cell(rng)
        since = scene.follower.next

        parent = scene.far.execute(by_tab.code)
        wait_until(lambda: scene.near.has_seen("status", parent), "the cell begins")
        run_id = scene.submit(over_rest.code)
        time.sleep(rng.uniform(0, 0.9 * (by_tab.seconds + over_rest.seconds)))
        FAULTS[fault][0](scene, rng)
        everyone_has_finished(scene, [parent, run_id])

        everyone_has_all(scene, parent, by_tab, since)
        everyone_has_all(scene, run_id, over_rest, since)
        run = scene.run(run_id)
        assert difference(text_of(run["outputs"]), over_rest) == "", "the run"
        assert run["status"] == "ok"


@pytest.mark.parametrize(
    ("runtime", "seed"),
    RELAY_ROUNDS,
    ids=[f"{runtime}-{seed.rpartition('-')[2]}" for runtime, seed in RELAY_ROUNDS],
)
def test_what_a_killed_relay_could_not_hear_is_announced_and_nothing_else_is_lost(
    scenes: Scenes, runtime: str, seed: str
) -> None:
    with scenes.round(runtime, seed) as (scene, rng):
        cell = Cell(400, 0.005)

        by_tab, over_rest = scene.far.execute(cell.code), scene.submit(cell.code)
        request_id = rng.choice((by_tab, over_rest))
        wait_until(lambda: scene.near.has_seen("status", request_id), "the cell begins")
        time.sleep(rng.uniform(0, cell.seconds / 3))
        scene.kill("sorna_agent.relay")
        everyone_has_finished(scene, [by_tab, over_rest])

        journal = scene.messages()
        assert hole_in(journal) == ""
        missing, wrong = unannounced(journal, request_id, cell)
        assert wrong == "", "the journal"
        print(f"{len(missing)} lines, {len(missing) * cell.pause:.2f} s, are missing")
        assert len(missing) * cell.pause < MOST_LOST
        for reader in (scene.far, scene.near, scene.follower):
            assert unannounced(reader.items, request_id, cell) == (missing, "")
        run = scene.run(over_rest)
        assert run["status"] == "ok"
        got = numbers_in("".join(o["text"] for o in run["outputs"] if o.get("name") == "stdout"))
        lost_by_run = missing if request_id == over_rest else []
        assert got == [n for n in range(cell.count) if n not in lost_by_run]
        if lost_by_run:
            assert any(o.get("name") == "stderr" for o in run["outputs"]), "the run is not told"


@pytest.mark.parametrize("runtime", ["local", "docker"])
def test_what_a_kernel_says_while_the_relay_stands_still_waits_in_the_kernel(
    new_scene: NewScene, request: pytest.FixtureRequest, runtime: str
) -> None:
    """As on a machine with far too much to do: a kernel's own socket used to drop all above 1000
    messages, and no one could know."""
    if runtime == "docker":
        request.getfixturevalue("docker_gateway")  # its image is built once
    scene = new_scene(f"--runtime={runtime}")
    cell = Cell(10_000, width=100)
    relay = scene.pid("sorna_agent.relay")

    parent = scene.near.execute(cell.code)
    wait_until(lambda: scene.near.has_seen("status", parent), "the cell begins")
    os.kill(relay, signal.SIGSTOP)
    time.sleep(cell.seconds / 3)
    os.kill(relay, signal.SIGCONT)
    wait_until(lambda: scene.near.has_finished(parent), "the cell ends", 60)

    everyone_has_all(scene, parent, cell)


def test_a_cell_whose_end_no_relay_heard_is_ended_and_those_behind_it_are_answered(
    new_scene: NewScene,
) -> None:
    scene = new_scene()
    agent = scene.pid("sorna_agent.app")
    relay = scene.pid("sorna_agent.relay")

    unheard = scene.near.execute("import time; time.sleep(1)")
    heard = [scene.near.execute(code) for code in ("time.sleep(8); 'heard'", "1", "2", "3")]
    wait_until(lambda: scene.near.has_seen("status", unheard), "the cell begins")
    os.kill(agent, signal.SIGSTOP)  # else there is another relay too soon
    os.kill(relay, signal.SIGKILL)
    time.sleep(2)
    os.kill(agent, signal.SIGCONT)

    for request in (unheard, *heard):
        wait_until(lambda r=request: scene.near.has_finished(r), "the cell ends")
    [lost] = replies_to(scene.near, unheard)
    assert (lost["status"], lost["ename"]) == ("error", "ReplyLost")
    assert "not known" in lost["evalue"]
    assert any("not known" in m["content"]["text"] for m in stderr_of(scene.near, unheard))
    for request in heard:
        assert [reply["status"] for reply in replies_to(scene.near, request)] == ["ok"]


def replies_to(tab: Tab, request: str) -> list[Any]:
    return [m["content"] for m in tab.of(request) if m["header"]["msg_type"] == "execute_reply"]


def stderr_of(tab: Tab, request: str) -> list[Message]:
    return [m for m in tab.of(request) if is_text(m, "stderr")]


MOST_LOST = 3.0
"""seconds of a kernel's iopub that nobody hears while a relay is started"""


def some_cell(rng: random.Random) -> Cell:
    return Cell(*rng.choice(((60, 0.01), (120, 0.005), (300, 0.002), (800, 0.0005))))


def everyone_has_finished(scene: Scene, parents: list[str], timeout: float = 30) -> None:
    readers: dict[str, Reader] = {
        "far": scene.far,
        "near": scene.near,
        "follower": scene.follower,
    }

    def late() -> dict[str, list[str]]:
        """Who, and the last lines that they have."""
        return {
            f"{name}, cell {number}": printed(reader.of(parent), parent).split()[-3:]
            for name, reader in readers.items()
            for number, parent in enumerate(parents)
            if not reader.has_finished(parent)
        }

    def run_is_over() -> bool:
        return scene.run(parents[1])["status"] not in ("queued", "running")

    try:
        wait_until(lambda: not late(), "everyone got the end", timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}; last lines of those that wait: {late()}") from None
    wait_until(run_is_over, "the run is over")


def everyone_has_all(scene: Scene, request_id: str, cell: Cell, since: int = 1) -> None:
    journal = scene.messages(since)
    assert hole_in(journal) == ""
    sent = of(messages_of(journal), request_id)
    assert difference(printed(sent, request_id), cell) == "", "the journal"
    assert hole_in(scene.follower.items) == ""
    assert ids(scene.follower.of(request_id)) == ids(sent), "the follower"
    for tab in (scene.far, scene.near):
        tab_has_all(tab, sent, request_id, scene.proxy.cuts)


def tab_has_all(tab: Tab, sent: list[Message], request_id: str, cuts: list[float]) -> None:
    """What was meant for it, in order; doubled only where its connection was cut."""
    for_it = [
        m
        for m in sent
        if m["channel"] == "iopub" or m["parent_header"].get("session") == tab.session
    ]
    got = units(tab.of(request_id))

    assert once(got) == once(units(for_it))
    twice = doubled(got)
    for began, ended in zip(tab.connections, tab.connections[1:], strict=False):
        cut = max((moment for moment in cuts if began < moment < ended), default=began)
        doubts = [cut - read for read in twice if began <= read < cut]
        if any(began <= read < ended for _, read in got):
            DOUBTS.append(len(doubts))
        assert len([doubt for doubt in doubts if doubt > IN_FLIGHT]) <= DOUBT
        twice = [read for read in twice if not began <= read < ended]
    assert twice == [], "doubled without a cut"


DOUBTS: list[int] = []
"""how much each cut doubled of what its client had read before"""


def test_a_cut_makes_a_stock_client_doubt_two_messages_at_most() -> None:
    """Where the machine gave the client the time to answer: hence not of every cut."""
    if len(DOUBTS) < 20:
        pytest.skip("too few cuts: the rounds before count them")
    print(f"doubled, cut by cut: {sorted(DOUBTS)}")

    assert statistics.quantiles(DOUBTS, n=4)[2] <= DOUBT


# -- open websockets -------------------------------------------------------------------------


def test_open_websockets_outlive_a_kernel_restart_and_an_agents_return(
    new_scene: NewScene,
) -> None:
    scene = new_scene()
    cell = Cell(3)

    restarted = scene.gateway.post(f"/api/kernels/{scene.kernel_id}/restart")
    assert restarted.status_code == 200, restarted.text
    after_restart = scene.near.execute(cell.code)
    wait_until(lambda: scene.far.has_finished(after_restart), "the cell ends")
    scene.kill("sorna_agent.app")
    after_return = scene.near.execute(cell.code)
    wait_until(lambda: scene.far.has_finished(after_return), "the cell ends")

    for parent in (after_restart, after_return):
        assert difference(printed(scene.far.of(parent), parent), cell) == ""
    assert len(scene.far.connections) == len(scene.near.connections) == 1


@pytest.fixture
def lasting_engine(docker_gateway: Gateway) -> Iterator[SecondEngine]:
    """Whose containers live on when it stops."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("needs root and dockerd for a second engine")
    engine = SecondEngine("--live-restore")
    engine.start()
    [python3] = [i for i in docker_gateway.get("/sorna/images").json() if i["name"] == "python3"]
    engine.take_image(python3["reference"])
    yield engine
    engine.start()
    engine.remove()


def test_a_restart_of_the_docker_engine_costs_nothing(
    lasting_engine: SecondEngine, new_scene: NewScene
) -> None:
    scene = new_scene("--runtime=docker", env={"DOCKER_HOST": lasting_engine.host})
    cell = Cell(700, 0.01)

    parent = scene.far.execute(cell.code)
    wait_until(lambda: printed(scene.near.of(parent), parent), "the cell prints")
    lasting_engine.stop()
    lasting_engine.start()
    assert not scene.near.has_finished(parent)
    afterwards = Cell(100, 0.001)
    run_id = scene.submit(afterwards.code)
    everyone_has_finished(scene, [parent, run_id])

    everyone_has_all(scene, parent, cell)
    everyone_has_all(scene, run_id, afterwards)
    assert len(scene.far.connections) == len(scene.near.connections) == 1


def test_a_gateway_started_anew_writes_the_cells_of_who_does_not_come_back(
    new_scene: NewScene,
) -> None:
    scene = new_scene("--runtime=local", "--SornaApp.unattended_after=0.2")
    path, cell = f"unattended-{secrets.token_hex(4)}.ipynb", Cell(50, 0.1)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.code, id="c1")])
    contents = {"type": "notebook", "format": "json", "content": notebook}
    assert scene.gateway.put(f"/api/contents/{path}", contents).status_code == 201
    session = {"path": path, "type": "notebook", "name": "", "kernel": {"id": scene.kernel_id}}
    assert scene.gateway.post("/api/sessions", session).status_code == 201
    leaving = scene.tab(scene.gateway.url, scene.kernel_id)
    running = leaving.execute(cell.code, "c1")
    wait_until(lambda: printed(leaving.of(running), running), "the cell prints")

    leaving.close()
    scene.replace_gateway()

    def written() -> str:
        saved = scene.gateway.get(f"/api/contents/{path}").json()
        return text_of(saved["content"]["cells"][0]["outputs"])

    wait_until(lambda: scene.far.has_finished(running), "the cell ends")
    wait_until(lambda: written() == cell.text, "its outputs are in the notebook")


# -- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_home() -> Iterator[Home]:
    """In which everything of the agent lies on a disk of 24 MiB."""
    home = Home()
    try:
        with small_disk(home.data_dir / "agent", "24m"):
            yield home
    finally:
        home.remove()


@pytest.mark.parametrize("number", range(2))
def test_a_full_disk_loses_nothing_that_is_read_in_time(
    small_home: Home, new_scene: NewScene, number: int
) -> None:
    rng = random.Random(f"{SEED}-disk-{number}")
    print(f"SORNA_FAULT_SEED={SEED}")
    scene = new_scene("--runtime=local", home=small_home)
    filler = small_home.data_dir / "agent/filler"
    small, big = Cell(300, 0.002), Cell(1500, width=10_000)

    parent = scene.far.execute(small.code)
    wait_until(lambda: scene.near.has_seen("status", parent), "the cell begins")
    run_id = scene.submit(big.code)
    time.sleep(rng.uniform(0, small.seconds))
    fill(filler)
    everyone_has_finished(scene, [parent, run_id])
    filler.unlink()
    after = scene.far.execute(small.code)
    wait_until(lambda: scene.near.has_finished(after), "the kernel runs on")

    for reader in (scene.far, scene.near):
        assert difference(printed(reader.of(parent), parent), small) == ""
        assert difference(printed(reader.of(run_id), run_id), big) == ""
        assert difference(printed(reader.of(after), after), small) == ""
    assert difference(text_of(scene.run(run_id)["outputs"]), big) == ""
    journal = scene.messages()
    assert hole_in(journal) == ""
    assert unannounced(journal, run_id, big)[1] == ""
    assert difference(printed(messages_of(journal), after), small) == ""


def test_on_a_full_disk_kernels_are_stopped_and_new_ones_are_refused_until_there_is_room(
    small_home: Home, new_scene: NewScene
) -> None:
    scene = new_scene("--runtime=local", home=small_home)
    record, filler = (small_home.data_dir / "agent" / name for name in ("kernels.json", "filler"))
    other = scene.gateway.start_kernel(name="python3")

    fill(filler)
    refused = scene.gateway.post("/api/kernels", {"name": "python3"})
    stopped = scene.gateway.delete(f"/api/kernels/{other}")

    assert refused.status_code == 503
    assert refused.json()["message"].startswith("The agent's disk is full: ")
    assert refused.headers["Retry-After"]
    assert stopped.status_code == 204, stopped.text
    assert [k["id"] for k in scene.gateway.get("/api/kernels").json()] == [scene.kernel_id]
    filler.unlink()
    wait_until(lambda: other not in record.read_text(), "the record is saved")
    scene.gateway.start_kernel(name="python3")


# -- readers that do not read ----------------------------------------------------------------


@pytest.mark.parametrize("link", ["stalled", "1 KB/s"])
def test_a_reader_that_does_not_read_costs_nobody_else(new_scene: NewScene, link: str) -> None:
    scene = new_scene()
    # No faster than its readers can be: what is kept for the late is 64 MiB
    cell = Cell(200, 0.03, width=1 << 20)
    other = scene.gateway.start_kernel(name="python3")
    neighbour = scene.tab(scene.gateway.url, other)
    if link == "stalled":
        scene.far.reads.clear()
    else:
        scene.proxy.rate = 1000

    # It reads through the same proxy
    scene.follower.close()
    with watched_memory(scene.gateway.pid) as grown:
        parent = scene.near.execute(cell.code)
        trips = round_trips(neighbour, until=lambda: scene.near.has_finished(parent))
    neighbour.close()

    assert difference(printed(scene.near.of(parent), parent), cell) == ""
    assert grown() < 64 << 20, f"{grown() >> 20} MiB"
    print(f"round trips of a neighbour: {describe(trips)}")
    assert statistics.median(trips) < 0.25
    assert max(trips) < 2

    scene.far.reads.set()
    scene.proxy.rate = None
    wait_until(lambda: scene.far.has_finished(parent), "it has caught up")
    assert unannounced(scene.far.items, parent, cell)[1] == ""
    assert doubled(units(scene.far.of(parent))) == []


@contextmanager
def watched_memory(pid: int) -> Iterator[Callable[[], int]]:
    """By how many bytes a process had grown, at its largest."""
    before, is_over = rss(pid), threading.Event()
    sizes = [before]

    def watch() -> None:
        while not is_over.wait(0.02):
            sizes.append(rss(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(sizes) - before
    finally:
        is_over.set()
        watcher.join()


def round_trips(tab: Tab, until: Callable[[], bool]) -> list[float]:
    """Seconds from an `execute_request` to its reply and idle, one after another."""
    trips = []
    while not until():
        began = time.monotonic()
        parent = tab.execute("pass")
        while not tab.has_finished(parent):
            time.sleep(0.001)
            assert time.monotonic() - began < PATIENCE
        trips.append(time.monotonic() - began)
        time.sleep(0.05)
    return trips


def describe(seconds: list[float]) -> str:
    return (
        f"{len(seconds)}, p50 {statistics.median(seconds) * 1000:.1f} ms, "
        f"max {max(seconds) * 1000:.1f} ms"
    )

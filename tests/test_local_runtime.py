"""Kernels as processes: real ones, under each confinement that this machine can do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sorna_agent.runtimes import Limits, choose_runtime
from sorna_agent.runtimes.local import ISOLATION, LocalRuntime, find_confinement, find_specs
from sorna_agent.runtimes.processes import marked_processes, start_time
from sorna_jupyter.exceptions import InvalidRequest, UnknownKernelspec
from sorna_jupyter.protocol import ImageState
from tests.runtime_parts import Deaths, attached, is_running, new_launch, short_directory


@pytest.fixture
def place() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(params=["bubblewrap", "landlock"])
async def runtime(request: pytest.FixtureRequest) -> AsyncIterator[LocalRuntime]:
    best = find_confinement()
    if request.param == "bubblewrap" and best != "bubblewrap":
        pytest.skip("bubblewrap is not installed or does not work here")
    runtime = LocalRuntime(agent_id="local-test", confinement=request.param)
    await runtime.start_up()
    yield runtime
    for kernel_id in list(runtime._kernels):
        await runtime.destroy(kernel_id)
    await runtime.close()


async def test_a_kernel_answers_in_its_own_home(runtime: LocalRuntime, place: Path) -> None:
    launch = new_launch(place, path="a/b", env={"GREETING": "hello"})

    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        said = await kernel.run(
            "import os; print(os.environ['GREETING'],"
            " os.path.relpath(os.getcwd(), os.environ['HOME']))"
        )
        assert said == "hello a/b"
        assert await kernel.run("open('new', 'w').write('x'); print(os.listdir('.'))") == "['new']"


async def test_a_kernel_reads_and_writes_nothing_outside(
    runtime: LocalRuntime, place: Path
) -> None:
    secret = place / "id_ed25519"
    secret.write_text("a private key")
    launch = new_launch(place)
    launch_elsewhere = new_launch(place)
    started = await runtime.launch(launch)
    await runtime.launch(launch_elsewhere)

    async with attached(started, launch) as kernel:
        refusals = ("PermissionError", "FileNotFoundError", "OSError: [Errno 30]")
        for code in (
            f"print(open({str(secret)!r}).read())",
            f"open({str(place / 'planted')!r}, 'w')",
            f"print(open({str(launch_elsewhere.directory / 's/kernel.json')!r}).read())",
            f"open({__file__!r}, 'a')",
            f"open({str(Path(sys.prefix) / 'planted')!r}, 'w')",
            "open('/etc/shadow').read()",
            "open('/etc/planted', 'w')",
            "open('/usr/planted', 'w')",
        ):
            assert (await kernel.run(code)).startswith(refusals), code
    assert not (place / "planted").exists()


async def test_a_kernel_sees_no_environment_of_the_agent(
    runtime: LocalRuntime, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "very secret")
    launch = new_launch(place, env={"MINE": "1"})
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        assert await kernel.run("import os; print(os.environ.get('AGENT_SECRET'))") == "None"
        code = f"print('very' in open('/proc/{os.getpid()}/environ').read())"
        refused = await kernel.run(code)
        assert refused.startswith(("PermissionError", "FileNotFoundError"))
    for process in (launch.directory / "process.json",):
        pid = json.loads(process.read_text())["pid"]
        assert b"MINE" not in Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_a_kernel_has_no_privileges_and_keeps_its_limits(
    runtime: LocalRuntime, place: Path
) -> None:
    launch = new_launch(place, limits=Limits(memory=1 << 30, disk=1 << 20))
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        status = await kernel.run("print(open('/proc/self/status').read())")
        assert "NoNewPrivs:\t1" in status
        assert "CapEff:\t0000000000000000" in status
        assert (await kernel.run("x = bytearray(2 << 30)")).startswith("MemoryError")
        too_big = await kernel.run("open('big', 'wb').write(b'x' * (2 << 20))")
        assert too_big.startswith("OSError: [Errno 27]")
        assert await kernel.run("print(6 * 7)") == "42"


async def test_a_bubble_has_no_network(place: Path) -> None:
    if find_confinement() != "bubblewrap":
        pytest.skip("bubblewrap is not installed or does not work here")
    runtime = LocalRuntime(agent_id="local-test")
    await runtime.start_up()
    launch = new_launch(place)
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        said = await kernel.run("import socket; print([name for _, name in socket.if_nameindex()])")
    await runtime.destroy(launch.kernel_id)

    assert said == "['lo']"


async def test_a_library_preloaded_by_the_users_env_runs_only_inside(
    runtime: LocalRuntime, place: Path
) -> None:
    launch = new_launch(place, env={"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(place / "leak")})

    started = await runtime.launch(launch)

    async with attached(started, launch):
        assert list(place.glob("leak*")) == []


async def test_a_death_says_how(runtime: LocalRuntime, place: Path) -> None:
    deaths = Deaths(runtime)
    for code, reason in (
        ("import os; os._exit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL)"),
    ):
        launch = new_launch(place)
        started = await runtime.launch(launch)

        async with attached(started, launch) as kernel:
            kernel.send(code)
            assert await deaths.next() == (launch.kernel_id, reason)


async def test_a_kernel_that_cannot_start_says_why(runtime: LocalRuntime, place: Path) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place, env={"PYTHONHOME": "/nowhere"})

    await runtime.launch(launch)

    kernel_id, reason = await deaths.next()
    assert kernel_id == launch.kernel_id
    assert reason.startswith("exit code 1: ")
    assert "encodings" in await runtime.logs(kernel_id)


async def test_relaunch_is_a_new_process_with_the_same_files(
    runtime: LocalRuntime, place: Path
) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place, env={"GREETING": "hello"})
    started = await runtime.launch(launch)
    async with attached(started, launch) as kernel:
        await kernel.run("x = 1; open('kept', 'w').close()")

    again = await runtime.relaunch(launch.kernel_id)

    assert again.address == started.address
    async with attached(again, launch) as kernel:
        assert (await kernel.run("x")).startswith("NameError")
        said = await kernel.run("import os; print(os.environ['GREETING'], os.listdir('.'))")
        assert said.startswith("hello") and "kept" in said
    assert deaths.seen == []


async def test_interrupt_reaches_the_kernel(runtime: LocalRuntime, place: Path) -> None:
    launch = new_launch(place)
    started = await runtime.launch(launch)
    async with attached(started, launch) as kernel:
        await kernel.run_until_output("import time\nprint('go', flush=True)\ntime.sleep(60)")

        await runtime.interrupt(launch.kernel_id)

        assert (await kernel.next_reply())["ename"] == "KeyboardInterrupt"


async def test_destroy_leaves_neither_processes_nor_files(
    runtime: LocalRuntime, place: Path
) -> None:
    deaths = Deaths(runtime)
    precious = place / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    launch = new_launch(place)
    started = await runtime.launch(launch)
    async with attached(started, launch) as kernel:
        await kernel.run(
            "import os, subprocess\n"
            f"os.symlink({str(precious)!r}, 'link')\n"
            "os.makedirs('shut/inner'); os.chmod('shut', 0)\n"
            "subprocess.Popen(['sleep', '1000'], start_new_session=True)"
        )

    await runtime.destroy(launch.kernel_id)
    await runtime.destroy(launch.kernel_id)

    assert not launch.directory.exists()
    assert (precious / "file").read_text() == "x"
    assert [
        pid for pid, _ in marked_processes("SORNA_KERNEL_ID", launch.kernel_id) if is_running(pid)
    ] == []
    assert deaths.seen == []


async def test_a_restarted_agent_adopts_what_runs_and_hears_what_died(
    runtime: LocalRuntime, place: Path
) -> None:
    lives, dies, forgotten = (new_launch(place) for _ in range(3))
    started = {
        launch.kernel_id: await runtime.launch(launch) for launch in (lives, dies, forgotten)
    }
    async with attached(started[lives.kernel_id], lives) as kernel:
        await kernel.run("x = 'still here'")
    await runtime.close()
    dead = runtime._kernels[dies.kernel_id]
    os.kill(dead.pid, signal.SIGKILL)
    await dead.exited.wait()
    next_agent = LocalRuntime(agent_id="local-test", confinement=runtime.confinement)
    await next_agent.start_up()
    deaths = Deaths(next_agent)

    adopted = await next_agent.adopt({lives.kernel_id: lives, dies.kernel_id: dies})

    assert adopted == {lives.kernel_id: started[lives.kernel_id]}
    assert await deaths.next() == (dies.kernel_id, "ended while its agent was away")
    async with attached(adopted[lives.kernel_id], lives) as kernel:
        assert await kernel.run("print(x)") == "still here"
        kernel.send("import os; os._exit(1)")
        kernel_id, reason = await deaths.next()
    assert kernel_id == lives.kernel_id
    assert reason.startswith("ended")
    await runtime._kernels[forgotten.kernel_id].exited.wait()
    for kernel_id in (lives.kernel_id, dies.kernel_id):
        await next_agent.destroy(kernel_id)
    await next_agent.close()


async def test_a_reused_process_id_is_not_adopted(runtime: LocalRuntime, place: Path) -> None:
    launch = new_launch(place)
    stranger = subprocess.Popen(["sleep", "60"])
    record = {"pid": stranger.pid, "started": str(int(start_time(stranger.pid)) - 1)}
    (launch.directory / "process.json").write_text(json.dumps(record))

    assert await runtime.adopt({launch.kernel_id: launch}) == {}
    await runtime.destroy(launch.kernel_id)

    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "../up"},
        {"path": "/etc"},
        {"path": "a\0b"},
        {"path": "a\ud800b"},
        {"env": {"A=B": "1"}},
        {"env": {"": "1"}},
        {"env": {"A": "\0"}},
    ],
)
async def test_impossible_requests_are_refused_and_leave_nothing(
    place: Path, fields: dict[str, object]
) -> None:
    runtime = LocalRuntime(agent_id="local-test", confinement="none")
    await runtime.start_up()

    with pytest.raises(InvalidRequest):
        await runtime.launch(new_launch(place, **fields))


async def test_an_unknown_kernelspec_names_those_there_are(place: Path) -> None:
    runtime = LocalRuntime(agent_id="local-test", confinement="none")
    await runtime.start_up()

    with pytest.raises(UnknownKernelspec, match="python3"):
        await runtime.launch(new_launch(place, image="cobol"))


def test_installed_kernelspecs_are_found_but_not_those_that_lead_back_to_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(name: str, **more: object) -> None:
        folder = tmp_path / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": ["python", "-m", name, "{connection_file}"], "display_name": name}
        (folder / "kernel.json").write_text(json.dumps({**spec, "language": "x", **more}))

    install("mine")
    install("sorna-remote", metadata={"sorna": {"url": "http://elsewhere"}})
    install("spark", metadata={"kernel_provisioner": {"provisioner_name": "yarn"}})
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))

    specs = find_specs()

    assert {"mine", "python3"} <= set(specs)
    assert not {"sorna-remote", "spark"} & set(specs)
    assert specs["mine"].argv[0] == sys.executable
    assert specs["python3"].status.state is ImageState.READY


async def test_isolation_is_told_in_one_sentence_and_how_to_get_docker() -> None:
    runtime = await choose_runtime("local", agent_id="x")

    assert runtime.isolation in ISOLATION.values()
    for sentence in ISOLATION.values():
        assert "\n" not in sentence and sentence.count(". ") == 0
        assert "install Docker and start `jupyter sorna` again" in sentence

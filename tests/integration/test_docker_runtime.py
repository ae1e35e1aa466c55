"""Kernels in containers: a real engine, the real Python image."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sorna_agent.runtimes import Limits, choose_runtime, remove_directory
from sorna_agent.runtimes.docker import DockerRuntime
from sorna_jupyter.exceptions import (
    ImageUnavailable,
    InvalidRequest,
    KernelStartFailed,
    RuntimeUnavailable,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import ImageState
from tests.runtime_parts import Deaths, attached, new_launch, short_directory

PROBE = """
import json, os, socket
def refused(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "allowed"
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines()
              if ":\\t" in line)
print(json.dumps({
    "uid": os.getuid(), "cwd": os.getcwd(), "home": os.environ["HOME"],
    "capabilities": status["CapEff"] + status["CapBnd"],
    "no_new_privs": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "interfaces": [name for _, name in socket.if_nameindex()],
    "write_root": refused(lambda: open("/planted", "w")),
    "write_usr": refused(lambda: open("/usr/planted", "w")),
    "write_shared": refused(lambda: open("/run/sorna/planted", "w")),
    "setuid": refused(lambda: os.setuid(0)),
    "reach": refused(lambda: socket.create_connection(("1.1.1.1", 53), 2)),
    "docker_socket": os.path.exists("/var/run/docker.sock"),
}))
"""

SYSCALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(number, *arguments):
    ctypes.set_errno(0)
    return ctypes.get_errno() if libc.syscall(number, *arguments) == -1 else 0
names = {"ptrace": 101, "process_vm_readv": 310, "keyctl": 250, "bpf": 321, "io_uring_setup": 425,
         "unshare": 272, "perf_event_open": 298, "userfaultfd": 323, "open_by_handle_at": 304,
         "mount": 165, "setns": 308}
arguments = {"unshare": (0x10000000,)}
print({name: errno_of(number, *arguments.get(name, (0, 0, 0, 0, 0)))
       for name, number in names.items()})
os.mkfifo("fifo")
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def runtime(base_image: str) -> AsyncIterator[DockerRuntime]:
    """A runtime with the Python image, whose agent has no other containers."""
    runtime = DockerRuntime(agent_id=f"test-{uuid.uuid4()}", base_image=base_image)
    await runtime.start_up()
    await runtime.build(["python3"], lambda: None)
    (image,) = [image for image in runtime.images() if image.name == "python3"]
    assert image.state is ImageState.READY, image.message
    yield runtime
    for kernel_id in list(runtime._kernels):
        await runtime.destroy(kernel_id)
    assert containers(runtime) == []
    await runtime.close()


def containers(runtime: DockerRuntime) -> list[str]:
    label = f"label=sorna.agent-id={runtime.agent_id}"
    asked = ["docker", "ps", "-aq", "--filter", label]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


async def test_a_kernel_is_locked_up_as_promised(runtime: DockerRuntime, place: Path) -> None:
    launch = new_launch(place, path="lessons/today", env={"GREETING": "hello"})

    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        if os.geteuid() == 0:
            guarding = runtime._kernels[launch.kernel_id].guarding
            assert guarding is not None
            await guarding  # ends when the directory is sealed
        seen = json.loads(await kernel.run(PROBE))
        assert await kernel.run("import os; print(os.environ['GREETING'])") == "hello"
    uid = 1000 if os.geteuid() == 0 else os.geteuid()
    assert seen == {
        "uid": uid,
        "cwd": "/home/sorna/lessons/today",
        "home": "/home/sorna",
        "capabilities": "0" * 32,
        "no_new_privs": "1",
        "seccomp": "2",
        "interfaces": ["lo"],
        "write_root": "OSError",
        "write_usr": "OSError" if uid == 0 else seen["write_usr"],
        "write_shared": "PermissionError" if os.geteuid() == 0 else "allowed",
        "setuid": "PermissionError",
        "reach": "OSError",
        "docker_socket": False,
    }
    assert seen["write_usr"] in ("OSError", "PermissionError")


async def test_a_new_home_holds_what_the_first_tab_and_the_first_plot_need(
    runtime: DockerRuntime, place: Path
) -> None:
    launch = new_launch(place)

    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        found = await kernel.run(
            "import os; print(*sorted(n for n in os.listdir(os.path.expanduser('~/.cache'))"
            " if os.listdir(os.path.expanduser('~/.cache/' + n))))"
        )
    assert found == "jedi matplotlib"


async def test_the_seccomp_profile_refuses_what_it_names(
    runtime: DockerRuntime, place: Path
) -> None:
    launch = new_launch(place)
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        seen = eval(await kernel.run(SYSCALLS))
        threads = await kernel.run("import threading as t; x = t.Thread(); x.start(); print('ran')")

    assert set(seen.values()) == {1}, seen
    assert threads == "ran"


async def test_limits_stand_in_the_cgroup(runtime: DockerRuntime, place: Path) -> None:
    limits = Limits(memory=256 << 20, cpus=0.5, pids=100, disk=20 << 20)
    launch = new_launch(place, limits=limits)
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        seen = await kernel.run(
            "from pathlib import Path\n"
            "def read(*names):\n"
            "    for name in names:\n"
            "        path = Path('/sys/fs/cgroup', name)\n"
            "        if path.exists(): return path.read_text().split()\n"
            "print(read('memory/memory.limit_in_bytes', 'memory.max'),\n"
            "      read('pids/pids.max', 'pids.max'),\n"
            "      read('cpu/cpu.cfs_quota_us', 'cpu.max')[0])"
        )
        assert seen == f"['{256 << 20}'] ['100'] 50000"
        for folder in ("/tmp", "/home/sorna", "/dev/shm"):
            # One file may not grow beyond the limit, nor may all of them together.
            full = await kernel.run(
                f"for i in range(5): open(f'{folder}/{{i}}', 'wb').write(b'x' * (15 << 20))\n"
            )
            assert full.startswith("OSError: [Errno 28]"), folder
            await kernel.run(f"import glob, os\nfor f in glob.glob('{folder}/?'): os.remove(f)")
        big = await kernel.run("open('/tmp/big', 'wb').write(b'x' * (21 << 20))")
        assert big.startswith(("OSError: [Errno 27]", "OSError: [Errno 28]"))


async def test_a_memory_bomb_dies_with_its_reason(runtime: DockerRuntime, place: Path) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place, limits=Limits(memory=128 << 20))
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        kernel.send("x = bytearray(1 << 30); x[::4096] = x[::4096].replace(b'\\0', b'1')")
        death = await deaths.next()

    assert death == (launch.kernel_id, "killed: out of memory (limit 128 MiB)")


async def test_a_fork_bomb_stays_in_its_kernel(runtime: DockerRuntime, place: Path) -> None:
    launch = new_launch(place, limits=Limits(pids=64))
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        refused = await kernel.run(
            "import subprocess\n"
            "bombs = []\n"
            "while len(bombs) < 500: bombs.append(subprocess.Popen(['sleep', '1000']))"
        )

        assert refused.startswith("BlockingIOError")
        assert await kernel.run("print(len(bombs) < 64)") == "True"


async def test_a_kernel_that_fills_its_directory_is_stopped(
    runtime: DockerRuntime, place: Path
) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place)
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        if os.geteuid() == 0:
            guarding = runtime._kernels[launch.kernel_id].guarding
            assert guarding is not None
            await guarding
            refused = await kernel.run("open('/run/sorna/kernel.json', 'ab')")
            assert refused.startswith("PermissionError")
        else:
            kernel.send("open('/run/sorna/x', 'wb').write(b'x' * (32 << 20))")
            reason = "killed: it filled the directory of its sockets"
            assert await deaths.next() == (launch.kernel_id, reason)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11 (SIGSEGV)"),
    ],
)
async def test_a_death_says_how(
    runtime: DockerRuntime, place: Path, code: str, reason: str
) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place)
    started = await runtime.launch(launch)

    async with attached(started, launch) as kernel:
        kernel.send(code)

        assert await deaths.next() == (launch.kernel_id, reason)


async def test_a_kernel_that_cannot_start_says_why_at_once(
    runtime: DockerRuntime, place: Path
) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place, env={"PYTHONHOME": "/nowhere"})

    await runtime.launch(launch)

    kernel_id, reason = await deaths.next()
    assert kernel_id == launch.kernel_id
    assert reason.startswith("exit code 1: ")
    assert "encodings" in await runtime.logs(kernel_id)


async def test_interrupt_reaches_the_kernel(runtime: DockerRuntime, place: Path) -> None:
    launch = new_launch(place)
    started = await runtime.launch(launch)
    async with attached(started, launch) as kernel:
        await kernel.run_until_output("import time\nprint('go', flush=True)\ntime.sleep(60)")

        await runtime.interrupt(launch.kernel_id)

        assert (await kernel.next_reply())["ename"] == "KeyboardInterrupt"


async def test_relaunch_keeps_id_directory_and_environment(
    runtime: DockerRuntime, place: Path
) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place, env={"GREETING": "hello"})
    started = await runtime.launch(launch)
    async with attached(started, launch) as kernel:
        await kernel.run("x = 1")

    again = await runtime.relaunch(launch.kernel_id)

    assert again == started
    async with attached(again, launch) as kernel:
        assert (await kernel.run("x")).startswith("NameError")
        assert await kernel.run("import os; print(os.environ['GREETING'])") == "hello"
        # Also out of a dead one.
        kernel.send("import os; os._exit(3)")
        assert await deaths.next() == (launch.kernel_id, "exit code 3")
    again = await runtime.relaunch(launch.kernel_id)
    async with attached(again, launch) as kernel:
        assert await kernel.run("print(6 * 7)") == "42"
    assert deaths.seen == []
    assert len(containers(runtime)) == 1


async def test_destroy_leaves_nothing_and_follows_no_symlink(
    runtime: DockerRuntime, place: Path
) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place)
    precious = place / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    started = await runtime.launch(launch)
    async with attached(started, launch):
        pass
    # As a kernel could before the directory is taken back from it.
    (launch.directory / "link").symlink_to(precious)
    (launch.directory / "inner").mkdir()
    (launch.directory / "inner" / "link").symlink_to(precious / "file")

    await runtime.destroy(launch.kernel_id)
    await runtime.destroy(launch.kernel_id)

    assert not launch.directory.exists()
    assert (precious / "file").read_text() == "x"
    assert containers(runtime) == []
    assert deaths.seen == []


def test_a_directory_that_became_a_symlink_is_not_followed(place: Path) -> None:
    precious = place / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (place / "link").symlink_to(precious)

    remove_directory(place / "link")

    assert (precious / "file").read_text() == "x"
    assert not (place / "link").is_symlink()


async def test_a_cancelled_launch_leaves_nothing(runtime: DockerRuntime, place: Path) -> None:
    launch = new_launch(place)
    launching = asyncio.create_task(runtime.launch(launch))
    await asyncio.sleep(0.02)  # wherever that is: nothing may stay behind

    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching

    assert containers(runtime) == []
    assert not launch.directory.exists()


async def test_a_refused_launch_leaves_nothing(runtime: DockerRuntime, place: Path) -> None:
    launch = new_launch(place, limits=Limits(memory=1 << 70))

    with pytest.raises(KernelStartFailed, match="the engine refused"):
        await runtime.launch(launch)

    assert containers(runtime) == []
    assert not launch.directory.exists()


async def test_impossible_requests_are_refused(runtime: DockerRuntime, place: Path) -> None:
    for fields in ({"path": "../up"}, {"env": {"A=B": "1"}}, {"limits": Limits(pids=-1)}):
        with pytest.raises(InvalidRequest):
            await runtime.launch(new_launch(place, **fields))
    with pytest.raises(UnknownKernelspec, match="python3"):
        await runtime.launch(new_launch(place, image="cobol"))


async def test_a_restarted_agent_adopts_what_runs_and_hears_what_died(
    runtime: DockerRuntime, place: Path
) -> None:
    lives, dies, forgotten = launches = [new_launch(place) for _ in range(3)]
    started = {launch.kernel_id: await runtime.launch(launch) for launch in launches}
    async with attached(started[lives.kernel_id], lives) as kernel:
        await kernel.run("x = 'still here'")
    async with attached(started[dies.kernel_id], dies) as kernel:
        deaths = Deaths(runtime)
        kernel.send("import os; os._exit(9)")
        await deaths.next()
    next_agent = DockerRuntime(agent_id=runtime.agent_id)
    await next_agent.start_up()
    deaths = Deaths(next_agent)

    adopted = await next_agent.adopt({lives.kernel_id: lives, dies.kernel_id: dies})

    assert adopted == {lives.kernel_id: started[lives.kernel_id]}
    assert await deaths.next() == (dies.kernel_id, "exit code 9")
    assert len(containers(runtime)) == 2
    async with attached(adopted[lives.kernel_id], lives) as kernel:
        assert await kernel.run("print(x)") == "still here"
        kernel.send("import os; os._exit(8)")
        assert await deaths.next() == (lives.kernel_id, "exit code 8")
    for kernel_id in (lives.kernel_id, dies.kernel_id):
        await next_agent.destroy(kernel_id)
    await next_agent.close()


async def test_a_container_removed_by_hand_is_a_death(runtime: DockerRuntime, place: Path) -> None:
    deaths = Deaths(runtime)
    launch = new_launch(place)
    started = await runtime.launch(launch)

    subprocess.run(["docker", "rm", "-f", started.handle], check=True, capture_output=True)

    kernel_id, reason = await deaths.next()
    assert kernel_id == launch.kernel_id
    assert reason in ("its container was removed", "killed by signal 9 (SIGKILL)")


async def test_an_engine_that_is_away_is_said_so_and_kernels_wait_for_it(
    place: Path,
) -> None:
    runtime = DockerRuntime(agent_id="away", base_url=f"unix://{place}/no.sock")
    await runtime.start_up()
    launch = new_launch(place)
    message = f"The Docker engine at unix://{place}/no.sock does not answer"

    with pytest.raises(RuntimeUnavailable, match=message):
        await runtime.ping()
    with pytest.raises(ImageUnavailable):
        await runtime.launch(launch)
    await runtime.build(["python3"], lambda: None)
    assert [image.message for image in runtime.images() if image.name == "python3"] == [message]
    assert set(await runtime.adopt({launch.kernel_id: launch})) == {launch.kernel_id}
    with pytest.raises(RuntimeUnavailable):
        await runtime.destroy(launch.kernel_id)
    await runtime.close()


async def test_the_engines_return_is_noticed(base_image: str, place: Path) -> None:
    """Through a socket that appears, goes and comes again while the engine runs on."""
    door = place / "engine.sock"
    runtime = DockerRuntime(agent_id=f"test-{uuid.uuid4()}", base_url=f"unix://{door}")
    runtime._folders = DockerRuntime(agent_id="x", base_image=base_image)._folders
    await runtime.start_up()
    deaths = Deaths(runtime)
    server = await open_door(door)
    await runtime.build(["python3"], lambda: None)
    launch = new_launch(place)
    started = await runtime.launch(launch)

    await close_door(server, door)
    with pytest.raises(RuntimeUnavailable):
        await runtime.ping()
    subprocess.run(["docker", "kill", started.handle], check=True, capture_output=True)
    server = await open_door(door)

    assert await deaths.next() == (launch.kernel_id, "killed by signal 9 (SIGKILL)")
    await close_door(server, door)
    with pytest.raises(RuntimeUnavailable):
        await runtime.destroy(launch.kernel_id)
    server = await open_door(door)
    while launch.directory.exists():  # it is destroyed now, unasked
        await asyncio.sleep(0.05)
    assert containers(runtime) == []
    await runtime.close()
    await close_door(server, door)


class Door:
    """Forwards a socket to the engine's, and can be shut with all its connections."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.server: asyncio.AbstractServer | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_unix_connection("/var/run/docker.sock")
        self.writers += [writer, other_writer]
        await asyncio.gather(copy(reader, other_writer), copy(other_reader, writer))


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()


async def open_door(path: Path) -> Door:
    door = Door()
    door.server = await asyncio.start_unix_server(door.serve, path)
    return door


async def close_door(door: Door, path: Path) -> None:
    assert door.server is not None
    door.server.close()
    path.unlink(missing_ok=True)
    for writer in door.writers:
        writer.transport.abort()
    await asyncio.sleep(0)


def write_image(parent: Path, name: str, *lines: str) -> None:
    folder = parent / name
    folder.mkdir()
    base = "ARG BASE_IMAGE=none\nFROM ${BASE_IMAGE}\n"
    (folder / "Dockerfile").write_text(base + "\n".join(lines) + "\n")
    spec = '{"argv": ["true", "{connection_file}"], "display_name": "x", "language": "x"}'
    (folder / "kernel.json").write_text(spec)


@pytest.fixture
def tiny_name() -> Iterator[str]:
    name = f"tiny-{uuid.uuid4().hex[:8]}"
    yield name
    listed = subprocess.run(
        ["docker", "images", "-q", f"sorna-kernel-{name}"], capture_output=True, text=True
    ).stdout.split()
    if listed:
        subprocess.run(["docker", "rmi", "-f", *listed], capture_output=True)


async def test_a_build_shows_its_progress_and_is_done_once(
    base_image: str, tmp_path: Path, tiny_name: str
) -> None:
    write_image(tmp_path, tiny_name, f"RUN echo {tiny_name}; sleep 1; echo Collecting x", "ENV A=1")
    runtime = DockerRuntime(agent_id="x", base_image=base_image, image_folders=[tmp_path])
    await runtime.start_up()
    seen = []

    def note() -> None:
        (image,) = [image for image in runtime.images() if image.name == tiny_name]
        seen.append(image)

    await asyncio.gather(*(runtime.build([tiny_name], note) for _ in range(3)))

    states = [image.state for image in seen]
    assert states[-1] is ImageState.READY
    assert states.count(ImageState.READY) == 1
    assert set(states[:-1]) == {ImageState.BUILDING}
    progress = [image.progress for image in seen]
    assert progress == sorted(progress) and progress[-1] == 1.0
    assert any(image.message.startswith("step ") for image in seen)
    # Found again, by its tag; and by another agent that has not got the folder, not at all.
    again = DockerRuntime(agent_id="y", base_image=base_image, image_folders=[tmp_path])
    await again.refresh_images()
    assert {i.name: i.state for i in again.images()}[tiny_name] is ImageState.READY
    await runtime.close()
    await again.close()


async def test_a_failed_build_says_why(base_image: str, tmp_path: Path, tiny_name: str) -> None:
    write_image(tmp_path, tiny_name, f"RUN echo the reason is {tiny_name}; exit 7")
    runtime = DockerRuntime(agent_id="x", base_image=base_image, image_folders=[tmp_path])
    await runtime.start_up()

    await runtime.build([tiny_name], lambda: None)

    (image,) = [image for image in runtime.images() if image.name == tiny_name]
    assert image.state is ImageState.FAILED
    assert f"the reason is {tiny_name}" in image.message
    assert "returned a non-zero code: 7" in image.message
    with pytest.raises(ImageUnavailable, match="the reason is"):
        await runtime.launch(new_launch(tmp_path, image=tiny_name))
    await runtime.close()


async def test_any_image_with_our_label_becomes_a_kernelspec(
    base_image: str, tmp_path: Path, tiny_name: str
) -> None:
    dockerfile = f"FROM {base_image}\nLABEL org.sorna.name=mine-{tiny_name}\n"
    label = '{\\"argv\\": [\\"true\\"], \\"display_name\\": \\"Mine\\", \\"language\\": \\"x\\"}'
    dockerfile += f'LABEL org.sorna.kernelspec="{label}"\n'
    tag = f"sorna-kernel-{tiny_name}:own"
    subprocess.run(
        ["docker", "build", "-q", "-t", tag, "-"],
        input=dockerfile,
        text=True,
        check=True,
        capture_output=True,
    )
    runtime = DockerRuntime(agent_id="x", base_image=base_image)

    await runtime.start_up()

    images = {image.name: image for image in runtime.images()}
    assert images[f"mine-{tiny_name}"].reference == tag
    assert images[f"mine-{tiny_name}"].spec["display_name"] == "Mine"
    await runtime.close()


async def test_docker_is_chosen_where_an_engine_answers(docker_engine: str) -> None:
    runtime = await choose_runtime("auto", agent_id="x")

    assert runtime.name == "docker"
    await runtime.close()


async def test_the_local_runtime_is_chosen_where_none_answers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}/no.sock")

    assert (await choose_runtime("auto", agent_id="x")).name == "local"
    assert (await choose_runtime("docker", agent_id="x")).name == "docker"

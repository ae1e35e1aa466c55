"""Image folders and build streams, from plain values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sorna_agent.runtimes import (
    DEFAULT_LIMITS,
    Launch,
    Limits,
    check_limits,
    check_path,
    death_reason,
    expand_argv,
    fill_limits,
)
from sorna_agent.runtimes.container import (
    Identity,
    choose_identity,
    container_options,
)
from sorna_agent.runtimes.images import BuildProgress, find_folders, label_spec
from sorna_jupyter.exceptions import InvalidRequest
from sorna_jupyter.protocol import ImageState, ImageStatus


def make_folder(parent: Path, name: str, **spec: object) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "Dockerfile").write_text("FROM scratch\n")
    content = {"argv": ["k", "{connection_file}"], "display_name": name, "language": "x", **spec}
    (folder / "kernel.json").write_text(json.dumps(content))
    return folder


def test_a_folders_tag_follows_its_content_and_its_base(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "One")
    (first,) = find_folders([tmp_path], None)
    (rebased,) = find_folders([tmp_path], "other:1")
    before = first.reference
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("x")
    assert first.reference == before
    (folder / "Dockerfile").write_text("FROM scratch\n# changed\n")

    assert before.startswith("sorna-kernel-one:")
    assert len({before, rebased.reference, first.reference}) == 3


def test_folders_name_their_kernelspec_or_lend_it_their_own_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", "python", metadata={"sorna": {"name": "python3"}})
    make_folder(tmp_path / "a", "r")
    make_folder(tmp_path / "b", "r")
    (tmp_path / "a" / "broken").mkdir()
    (tmp_path / "a" / "broken" / "Dockerfile").write_text("FROM scratch")
    (tmp_path / "a" / "broken" / "kernel.json").write_text("{")

    folders = find_folders([tmp_path / "a", tmp_path / "b", tmp_path / "missing"], None)

    assert [(folder.name, folder.path.parent.name) for folder in folders] == [
        ("python3", "a"),
        ("r", "a"),
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"argv": "sh"}'])
def test_a_label_that_is_no_kernelspec_is_none(text: str) -> None:
    assert label_spec({"org.sorna.kernelspec": text}) is None


def test_a_builds_progress_only_grows_and_speaks_plainly() -> None:
    progress = BuildProgress()
    pulling = {"status": "Downloading", "progressDetail": {"current": 1 << 20, "total": 4 << 20}}
    waiting = {"status": "Downloading", "progressDetail": {"current": 0, "total": 4 << 20}}
    entries = [
        {"stream": "Step 1/3 : FROM python:3.12-slim\n"},
        {**pulling, "id": "a"},
        {**waiting, "id": "b"},
        {"stream": "Step 2/3 : RUN python3 -m pip install numpy\n"},
        {"stream": " ---> Running in 0123\n"},
        {"stream": "Collecting numpy>=2 (from x)\n"},
        {"stream": "\x1b[91mInstalling collected packages: numpy, six\n"},
        {"stream": "Step 3/3 : LABEL a=b\n"},
    ]
    seen = []
    for entry in entries:
        progress.feed(entry)
        seen.append((round(progress.progress, 2), progress.message))

    assert seen == [
        (0.0, "step 1 of 3: getting the base image python:3.12-slim"),
        (0.08, "downloading the base image: 1 of 4 MiB"),
        (0.08, "downloading the base image: 1 of 8 MiB"),
        (0.33, "step 2 of 3: installing Python packages"),
        (0.33, "step 2 of 3: installing Python packages"),
        (0.34, "step 2 of 3: looking for numpy"),
        (0.36, "step 2 of 3: installing 2 packages"),
        (0.67, "step 3 of 3: setting label"),
    ]


def test_a_failed_builds_message_is_its_last_lines() -> None:
    progress = BuildProgress()
    for number in range(50):
        progress.feed({"stream": f"line {number}\n"})
    progress.feed({"error": "returned a non-zero code: 1"})

    lines = progress.failure.splitlines()
    assert (lines[0], lines[-2:], len(lines)) == (
        "line 38",
        ["line 49", "returned a non-zero code: 1"],
        13,
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"exit_code": 0, "last_line": "bye"}, "exit code 0"),
        ({"exit_code": 1, "last_line": "ImportError: x"}, "exit code 1: ImportError: x"),
        ({"exit_code": 137}, "killed by signal 9 (SIGKILL)"),
        ({"exit_code": 139, "last_line": "x"}, "killed by signal 11 (SIGSEGV)"),
        ({"exit_code": 255}, "exit code 255"),
        (
            {"exit_code": 137, "out_of_memory": True, "memory": 512 << 20},
            "killed: out of memory (limit 512 MiB)",
        ),
        # A child was killed for memory, and the kernel then left by itself.
        ({"exit_code": 1, "out_of_memory": True, "memory": 512 << 20}, "exit code 1"),
    ],
)
def test_deaths_are_told_in_words(arguments: dict[str, object], reason: str) -> None:
    assert death_reason(**arguments) == reason  # type: ignore[arg-type]


def test_limits_fall_back_to_the_agents_and_then_to_ours() -> None:
    limits = fill_limits(Limits(memory=1), Limits(memory=2, pids=3))

    assert limits == Limits(memory=1, cpus=None, pids=3, disk=DEFAULT_LIMITS.disk)


def test_limits_that_no_kernel_can_live_with_are_refused() -> None:
    assert check_limits(DEFAULT_LIMITS) is DEFAULT_LIMITS
    for limits in (
        Limits(memory=1 << 20),
        Limits(cpus=0.0),
        Limits(cpus=float("nan")),
        Limits(pids=-1),
        Limits(disk=0),
    ):
        with pytest.raises(InvalidRequest, match="a kernel needs"):
            check_limits(limits)


def test_paths_are_made_plain_or_refused() -> None:
    assert [check_path(path) for path in ("", ".", "a//b/", "./a/./b")] == [".", ".", "a/b", "a/b"]
    for path in ("..", "a/../b", "/", "/a", "a\0", "\udcff"):
        with pytest.raises(InvalidRequest):
            check_path(path)


def test_argv_is_filled_in_and_other_braces_stay() -> None:
    argv = ["k", "--f={connection_file}", "{}", "{other}"]

    assert expand_argv(argv, {"connection_file": "/c"}) == ["k", "--f=/c", "{}", "{other}"]


@pytest.mark.parametrize(
    ("options", "root", "agent", "identity"),
    [
        (["name=seccomp"], "/var/lib/docker", (0, 0), Identity(1000, 1000, 1000, 1000)),
        (["name=seccomp"], "/var/lib/docker", (999, 998), Identity(999, 998, 999, 998)),
        (
            ["name=userns"],
            "/var/lib/docker/100000.200000",
            (0, 0),
            Identity(1000, 1000, 101000, 201000),
        ),
        (["name=rootless"], "/home/a/.local/share/docker", (500, 500), Identity(0, 0, 500, 500)),
    ],
)
def test_the_kernels_user_suits_the_engine(
    options: list[str], root: str, agent: tuple[int, int], identity: Identity
) -> None:
    info = {"SecurityOptions": options, "DockerRootDir": root}

    assert choose_identity(info, *agent) == identity


def test_tmpfs_and_shm_fit_below_the_memory_limit() -> None:
    image = ImageStatus(
        name="x",
        reference="x:1",
        state=ImageState.READY,
        spec={"argv": ["k"], "env": {"A": "${HOME}/a"}},
    )
    launch = Launch("id", "x", "ann", Path("/d"), "key", env={"B": "2"}, path="p")
    memory = 300 << 20
    options = container_options(
        launch,
        image,
        Limits(memory=memory, pids=64, disk=1 << 30, cpus=None),
        1.5,
        Identity(1000, 1000, 1000, 1000),
        "agent",
    )

    sizes = [
        int(option.removeprefix("size="))
        for mount in options["tmpfs"].values()
        for option in mount.split(",")
        if option.startswith("size=")
    ]
    assert sum(sizes) + options["shm_size"] < memory
    assert options["cpu_quota"] == 150_000
    assert options["environment"]["A"] == "/home/sorna/a"
    assert options["environment"]["B"] == "2"
    assert options["entrypoint"][-1] == "p"

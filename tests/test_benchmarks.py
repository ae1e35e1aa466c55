"""The benchmark suite runs, and its ratios have the right order of magnitude."""

from __future__ import annotations

import hmac
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.clients import Execution, numbers
from benchmarks.measures import MEASURES
from benchmarks.null_kernel import Signer
from benchmarks.report import Results
from benchmarks.rows import ROWS

ROOT = Path(__file__).parent.parent


def run_suite(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--quick", *arguments),
            *("--json", str(folder / "results.json"), "--chart", str(folder / "chart.svg")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert not results["notes"], results["notes"]
    return results


def test_the_suite_measures_us_against_straight_zeromq(tmp_path: Path) -> None:
    results = run_suite(
        tmp_path,
        *("--only", "rtt-null", "--only", "burst-v1", "--servers", "direct,sorna-local"),
    )

    p50, rate = results["medians"]["rtt-null.p50"], results["medians"]["burst-v1.rate"]
    assert 1 < p50["sorna-local"] / p50["direct"] < 40
    assert 0.02 < rate["sorna-local"] / rate["direct"] < 2
    assert set(results["values"]["burst-v1.lost"]["sorna-local"]) == {0}
    assert "straight ZeroMQ" in (tmp_path / "chart.svg").read_text()


def test_every_row_belongs_to_a_measure() -> None:
    names = {measure.name for measure in MEASURES}

    assert {row.key.split(".")[0] for row in ROWS} <= names


def test_numbered_lines_are_found_however_a_kernel_cuts_them() -> None:
    messages = [b'{"text": "0"}', b'{"text": "\\n1\\n2"}', b'{"x": 1}', b'{"text":"\\n3....\\n"}']

    assert numbers(messages) == [0, 1, 2, 3]


def test_an_execution_is_done_when_its_own_reply_and_idle_have_come() -> None:
    execution = Execution("mine")
    reply = b'shell{"msg_type": "execute_reply"}{"msg_id": "%s"}'
    idle = b'iopub{"msg_type": "status"}{"msg_id": "%s"}{"execution_state": "idle"}'

    execution.take([reply % b"other", idle % b"other", idle % b"mine"])
    assert not execution.is_done

    execution.take([reply % b"mine"])
    assert execution.is_done


def test_the_null_kernels_signature_is_an_hmac() -> None:
    for key in (b"k", b"long" * 40):
        assert Signer(key).sign([b"a", b"b"]).decode() == hmac.digest(key, b"ab", "sha256").hex()


def test_a_ratio_is_taken_within_a_round() -> None:
    results = Results({})
    for direct, ours in ((1.0, 2.0), (10.0, 20.0), (4.0, 4.0)):
        results.add("rtt", "direct", {"p50": direct})
        results.add("rtt", "ours", {"p50": ours})

    assert results.ratio("rtt.p50", "ours", "direct") == 2.0

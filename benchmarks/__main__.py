"""`python -m benchmarks`: start what is compared, measure in interleaved rounds, show, keep."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.bed import FULL, QUICK, Bed, Scale
from benchmarks.clients import Closed
from benchmarks.measures import MEASURES, Measure
from benchmarks.report import Results
from benchmarks.servers import Server, Unavailable, all_servers

DOCS = Path(__file__).parent.parent / "docs"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    names = ", ".join(measure.name for measure in MEASURES)
    add("--quick", action="store_true", help="few rounds, small ones: two or three minutes")
    add(
        "--only",
        action="append",
        metavar="NAME",
        help=f"may be repeated; a beginning will do: {names}",
    )
    add("--servers", metavar="KEYS", help="comma separated; default: all that are here")
    add("--rounds", type=int, help=f"default: {FULL.rounds}, with --quick {QUICK.rounds}")
    add("--idle-kernels", type=int, help=f"default: {FULL.idle_kernels}, with --quick"
        f" {QUICK.idle_kernels}")  # fmt: skip
    add("--json", type=Path, help="write all numbers there")
    add("--chart", type=Path, help="write a chart there (SVG)")
    add("--docs", action="store_true", help="write results and chart into docs/performance.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    console = Console(stderr=True)
    scale = QUICK if options.quick else FULL
    changes = {"rounds": options.rounds, "idle_kernels": options.idle_kernels}
    scale = dataclasses.replace(scale, **{k: v for k, v in changes.items() if v is not None})
    wanted = tuple(options.only or [""])
    measures = [
        measure
        for measure in MEASURES
        if measure.name.startswith(wanted) and (measure.is_quick or not options.quick)
    ]
    if not measures:
        console.print(f"no measure begins with {options.only}")
        return 2
    keys = options.servers.split(",") if options.servers else [s.key for s in all_servers()]
    keys = [key for key in keys if any(key in measure.servers for measure in measures)]
    # What was started is stopped also then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    allow_many_files()
    results = Results.of(scale)
    with running([s for s in all_servers() if s.key in keys], results, console) as servers:
        beds = [Bed(server, scale) for server in servers]
        for measure in measures:
            run(measure, beds, scale, results, console)
    report.print_table(results)
    if options.json:
        report.write_json(results, options.json)
    if options.chart:
        report.write_chart(results, options.chart)
    if options.docs:
        report.write_docs(results, DOCS)
    return 0


def allow_many_files() -> None:
    """To this process and to all that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def running(servers: list[Server], results: Results, console: Console) -> Iterator[list[Server]]:
    """Those that could be started; whatever happens, all are stopped."""
    console.print(f"starting {', '.join(server.title for server in servers)}")
    started = []
    try:
        with ThreadPoolExecutor() as pool:
            starting = [(server, pool.submit(server.start)) for server in servers]
        for server, start in starting:
            try:
                start.result()
            except Unavailable as error:
                results.notes.append(f"{server.title} is left out: {error}")
                console.print(results.notes[-1], markup=False)
            else:
                started.append(server)
                results.titles[server.key] = server.title
        yield started
    finally:
        with ThreadPoolExecutor() as pool:
            stopping = [pool.submit(server.stop) for server in servers]
        for stop in stopping:
            stop.result()


def run(
    measure: Measure, beds: list[Bed], scale: Scale, results: Results, console: Console
) -> None:
    """All servers in each round, so that what else this machine does meets all of them."""
    beds = [bed for bed in beds if bed.server.key in measure.servers]
    start = time.monotonic()
    for _ in range(min(scale.rounds, measure.rounds or scale.rounds)):
        for bed in list(beds):
            try:
                results.add(measure.name, bed.server.key, measure.function(bed))
            except (Unavailable, TimeoutError, Closed, OSError) as error:
                results.notes.append(f"{measure.name}, {bed.server.title}: {error or 'closed'}")
                beds.remove(bed)
    for bed in beds:
        bed.release()
    console.print(f"{measure.name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())

"""What was measured: as a table, as JSON, as a chart, and as a part of docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bed import Scale
from benchmarks.rows import ROWS, SHIPPED, Row

PACKAGES = (
    "sorna-jupyter jupyter_server jupyter_kernel_gateway jupyter_client ipykernel tornado pyzmq"
).split()
BEGIN, END = "<!-- results: python -m benchmarks --docs -->", "<!-- end of results -->"


@dataclass
class Results:
    about: dict[str, Any]
    titles: dict[str, str] = field(default_factory=dict)
    """of the servers, by key, in their order"""
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """row's key -> server's key -> one number a round"""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scale: Scale) -> Results:
        return cls({"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "machine": machine(),
                    "versions": versions(), "scale": asdict(scale)})  # fmt: skip

    def add(self, measure: str, server: str, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            row = self.values.setdefault(f"{measure}.{name}", {})
            row.setdefault(server, []).append(number)

    def median(self, row: str, server: str) -> float | None:
        """For a peer as shipped in place of the peer, where a row is about that."""
        values = self.values.get(row, {})
        found = values.get(server) or values.get(f"{server}-as-shipped")
        return statistics.median(found) if found else None

    def ratio(self, row: str, server: str, base: str) -> float | None:
        """The median over the rounds of the ratio within a round."""
        values = self.values.get(row, {})
        pairs = zip(values.get(server, []), values.get(base, []), strict=False)
        ratios = [one / other for one, other in pairs if other]
        return statistics.median(ratios) if ratios else None

    @property
    def columns(self) -> list[str]:
        return [key for key in self.titles if key not in SHIPPED]

    @property
    def rows(self) -> list[Row]:
        return [row for row in ROWS if row.key in self.values]


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0))
    name = model[1] if model else platform.machine()
    return f"{name}, {cores} cores, {memory:.0f} GiB, Linux {platform.release()}"


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # that peer is left out, and the table says so
    return found


# -- as text --


def cells(results: Results, row: Row) -> list[str]:
    """Medians, and how many times the straight way's they are; or jupyter_server's, where there is
    no straight way."""
    base = "direct" if "direct" in results.values.get(row.key, {}) else "jupyter-server"
    texts = []
    for server in results.columns:
        value = results.median(row.key, server)
        if value is None:
            texts.append("–")
            continue
        ratio = results.ratio(row.key, server, base) if server != base else None
        shows_ratio = ratio is not None and row.unit not in ("", "B")
        texts.append(f"{value:,.{row.digits}f}" + (f" ({ratio:.2f}×)" if shows_ratio else ""))
    return texts


def print_table(results: Results) -> None:
    table = Table(title=f"{results.about['date']}; {results.about['machine']}")
    for title in ("", "unit", *(results.titles[key] for key in results.columns), "goal"):
        table.add_column(title, justify="left" if title in ("", "unit", "goal") else "right")
    for row in results.rows:
        table.add_row(row.title, row.unit, *cells(results, row), row.goal)
    console = Console(width=None if os.isatty(1) else 180)
    console.print(table)
    for note in results.notes:
        console.print(f"– {note}", markup=False)


def write_json(results: Results, path: Path) -> None:
    medians = {
        row: {server: statistics.median(values) for server, values in servers.items()}
        for row, servers in results.values.items()
    }
    path.write_text(json.dumps({**asdict(results), "medians": medians}, indent=1) + "\n")


def write_docs(results: Results, folder: Path) -> None:
    """Replace what stands between the two marks, and the chart."""
    write_chart(results, folder / "performance.svg")
    page = folder / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{markdown(results)}{END}{after}")


def markdown(results: Results) -> str:
    about = results.about
    titles = [results.titles[key] for key in results.columns]
    lines = [
        f"{about['date']}, {about['machine']}. "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f". {about['scale']['rounds']} interleaved rounds, medians; in brackets: times straight "
        "ZeroMQ's of the same round, or jupyter_server's where there is no straight way.",
        "",
        "![Speed against straight ZeroMQ and the peers](performance.svg)",
        "",
        f"| | unit | {' | '.join(titles)} | goal |",
        f"| --- | --- |{' ---: |' * len(titles)} --- |",
        *(
            f"| {row.title} | {row.unit} | {' | '.join(cells(results, row))} | {row.goal} |"
            for row in results.rows
        ),
        "",
        *split_by_process(results),
        *(f"- {note}" for note in results.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def split_by_process(results: Results) -> list[str]:
    """Where our processor time goes."""
    roles = ("gateway", "agent", "relay")
    lines = []
    for row in results.rows:
        for server in results.columns:
            parts = [results.median(f"{row.key}.{role}", server) for role in roles]
            if row.key.endswith(".cpu") and None not in parts:
                texts = " | ".join(f"{part:,.{row.digits}f}" for part in parts if part is not None)
                lines.append(f"| {row.key} | {row.unit} | {results.titles[server]} | {texts} |")
    if not lines:
        return []
    head = [
        "Our processor time by process:",
        "",
        "| | unit | | gateway | agent | relay |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    return [*head, *lines, ""]


# -- as a picture --

PANELS = [
    "rtt-ipykernel.p50",
    "rtt-null.p50",
    "burst-v1.rate",
    "burst-json.rate",
    "prints.rate",
    "fanout-20.rate",
    "parallel-8.rate",
    "bulk-text.rate",
    "burst-v1.cpu",
]


def write_chart(results: Results, path: Path) -> None:
    """One panel a row, one bar a server. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same numbers make the same file
    from matplotlib import pyplot

    rows = [row for row in results.rows if row.key in PANELS]
    if not rows:
        return
    height = -(-len(rows) // 3)
    figure, axes = pyplot.subplots(height, 3, figsize=(13, 2.1 * height), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for row, axis in zip(rows, axes.flat, strict=False):
        servers = [key for key in reversed(results.columns) if results.median(row.key, key)]
        values = [results.median(row.key, server) or 0.0 for server in servers]
        colours = [
            "#2b6cb0" if "sorna" in s else "#444" if s == "direct" else "#bbb" for s in servers
        ]
        bars = axis.barh([results.titles[server] for server in servers], values, color=colours)
        axis.bar_label(bars, [f" {value:,.{row.digits}f}" for value in values], fontsize=8)
        way = "more" if row.higher_is_better else "less"
        axis.set_title(f"{full_title(row)}\n{row.unit}; {way} is better", fontsize=9)
        axis.margins(x=0.2)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_visible(False)
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def full_title(row: Row) -> str:
    """`…` stands for the row above."""
    if not row.title.startswith("…"):
        return row.title
    earlier = ROWS[: ROWS.index(row)]
    above = next(other for other in reversed(earlier) if not other.title.startswith("…"))
    return f"{above.title}: {row.title.removeprefix('… ')}"

"""The rows of the table: what each number is, which way is better, and what we want of it."""

from __future__ import annotations

from dataclasses import dataclass

OURS = ("sorna-local", "sorna-docker")
PEERS = ("jupyter-server", "kernel-gateway")
SHIPPED = ("jupyter-server-as-shipped", "kernel-gateway-as-shipped")
"""with the rate limit that they drop output by, unless told otherwise"""


@dataclass(frozen=True)
class Row:
    key: str
    """`MEASURE.NUMBER`, as in the JSON"""
    title: str
    unit: str = ""
    goal: str = ""
    """as a ratio, where it is of time: machines differ by more than servers do"""
    higher_is_better: bool = False
    digits: int = 1


def _speed(key: str, title: str, unit: str, goal: str = "") -> Row:
    return Row(key, title, unit, goal, higher_is_better=True, digits=0)


ROWS = [
    Row("rtt-ipykernel.p50", "execute `pass`, ipykernel, p50", "ms", "≤ 1.5× straight", digits=2),
    Row("rtt-ipykernel.p99", "… p99", "ms", "no 40 ms step", digits=2),
    Row("rtt-ipykernel.cpu", "… CPU per 1,000 executes", "s", "≤ 0.58× jupyter_server", digits=2),
    Row("rtt-null.p50", "execute, null kernel, p50", "ms", "≤ 3× straight", digits=2),
    Row("rtt-null.p99", "… p99", "ms", digits=2),
    Row("rtt-null.cpu", "… CPU per 1,000 executes", "s", "≤ 0.58× jupyter_server", digits=2),
    Row("rtt-null.bytes", "… bytes to and from the client, per execute", "B", digits=0),
    _speed("burst-v1.rate", "burst, null kernel, v1 framing", "msg/s", "≥ 5× jupyter_server"),
    Row("burst-v1.cpu", "… CPU per message", "µs", "≤ 0.24× jupyter_server"),
    _speed("burst-json.rate", "burst, null kernel, JSON framing", "msg/s", "≥ 3× jupyter_server"),
    Row("burst-json.cpu", "… CPU per message", "µs"),
    _speed("prints.rate", "flushed prints, ipykernel", "msg/s", "≥ 0.75× straight"),
    Row("prints.lost", "… lost", "", "0", digits=0),
    Row("prints.disordered", "… out of order", "", "0", digits=0),
    Row("prints.cpu", "… CPU per message", "µs"),
    Row("prints-as-shipped.lost", "… lost with the peers' rate limit on, as shipped", digits=0),
    _speed("fanout-1.rate", "1 kernel × 1 client, null kernel", "msg/s"),
    _speed("fanout-5.rate", "1 kernel × 5 clients", "msg/s"),
    _speed("fanout-20.rate", "1 kernel × 20 clients", "msg/s", "≥ 0.9× straight"),
    Row("fanout-20.cpu", "… CPU per message and client", "µs", "≤ 0.1× jupyter_server"),
    _speed("parallel-1.rate", "1 kernel in a closed loop, null kernel", "executes/s"),
    _speed("parallel-8.rate", "8 kernels in closed loops", "executes/s", "≥ 0.39× straight"),
    _speed("parallel-64.rate", "64 kernels in closed loops", "executes/s"),
    _speed("bulk-text.rate", "50 × 1 MiB of text, ipykernel, v1", "MB/s", "≥ 1.5× jupyter_server"),
    _speed("bulk-binary.rate", "50 × 1 MiB in buffers", "MB/s", "≥ 1.5× jupyter_server"),
    *(
        row
        for way, title in {
            "clean": "reconnect after a clean close",
            "rst": "reconnect after a reset",
            "attached": "reconnect after a reset, another client attached",
            "new-session": "new session id, asking for the gap",
            "rst-fast": "reconnect after a reset at 2,000 msg/s",
        }.items()
        for row in (
            Row(f"reconnect.{way}.lost", f"{title}: lost", "", "0", digits=0),
            Row(f"reconnect.{way}.doubled", "… doubled", "", "0", digits=0),
            Row(f"reconnect.{way}.replies_lost", "… replies lost", "", "0", digits=0),
        )
    ),
    Row("stalled.memory", "a reader stops while 200 MiB are written: memory", "MiB", "≤ 64"),
    Row("stalled.lost", "… lost by the kernel's other reader", "", "0", digits=0),
    Row("stalled.p50", "… p50 of another kernel meanwhile", "ms", "as without it", digits=2),
    Row("stalled.calm_p50", "… the same without the stalled reader", "ms", digits=2),
    Row("idle.alone.gateway", "memory per idle kernel: gateway", "MiB", "≤ 0.25", digits=2),
    Row("idle.alone.agent", "… agent and relay", "MiB", "≤ 0.5", digits=2),
    Row("idle.open.gateway", "… gateway, with an open websocket each", "MiB", digits=2),
    Row("idle.open.agent", "… agent and relay, with an open websocket each", "MiB", digits=2),
    Row("idle.cpu", "… CPU of all processes", "ms/s", digits=2),
    Row(
        "list-kernels.p50",
        "GET /api/kernels, authenticated, p50",
        "ms",
        "≤ 1× jupyter_server",
        digits=2,
    ),
    Row("list-kernels.p99", "… p99", "ms", digits=2),
]

"""The measures: one function each, of one server in one round, returning named numbers.

`MEASURES` names them in the order of the table. A number for which `rows` has no row (the
processor time of each process, say) is in the JSON only.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks.bed import Bed, fresh_kernels
from benchmarks.clients import Client, Crowd, Execution, numbers
from benchmarks.processes import Usage
from benchmarks.rows import OURS, PEERS, SHIPPED
from benchmarks.servers import NULL, PYTHON, HttpServer, Kernel

Numbers = dict[str, float]

MIB = 1 << 20
QUIET = 2.0
"""seconds without a message after which what has not come is lost"""
SERVERS = (*PEERS, *OURS)


@dataclass(frozen=True)
class Measure:
    name: str
    function: Callable[[Bed], Numbers]
    servers: Sequence[str] = ("direct", *SERVERS)
    rounds: int | None = None
    """at most"""
    is_quick: bool = True
    """whether `--quick` has it, too"""


# -- one execute at a time --


def round_trip(bed: Bed, spec: str) -> Numbers:
    """From an execute's sending to the last of its reply and its `idle`."""
    with bed.client(spec) as client:
        _loop(client, bed.scale.executes // 10, bed.scale.seconds)
        before, received, sent = bed.usage(), client.received, client.sent
        times = _loop(client, bed.scale.executes, bed.scale.seconds)
        cpu = _cpu(bed.usage(), before, "cpu", 1000 / len(times))
        moved = client.received - received + client.sent - sent
    return {**_percentiles(times), **cpu, "bytes": moved / len(times)}


def list_kernels(bed: Bed) -> Numbers:
    """`GET /api/kernels` with a token, over a kept-alive connection."""
    assert isinstance(bed.server, HttpServer)
    bed.kernels(NULL, 1)
    client = bed.server.http()
    times: list[float] = []
    for _ in range(bed.scale.executes):
        start = time.perf_counter()
        status, _content = client.request("GET", "/api/kernels")
        times.append(time.perf_counter() - start)
        assert status == 200, status
    client.close()
    return _percentiles(times)


def _loop(client: Client, count: int, seconds: float) -> list[float]:
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < count and (start := time.perf_counter()) < deadline:
        client.execute("pass")
        times.append(time.perf_counter() - start)
    return times


def _percentiles(times: list[float]) -> Numbers:
    """In milliseconds."""
    ordered = sorted(times)
    return {
        "p50": statistics.median(ordered) * 1e3,
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
    }


# -- output as fast as it goes --


def burst(bed: Bed, framing: str) -> Numbers:
    """Many small messages of a kernel that is faster than any server."""
    with bed.client(NULL, framing) as client:
        return _stream(bed, client, f"stream {bed.scale.messages}", bed.scale.messages)


def prints(bed: Bed) -> Numbers:
    """What `print(…, flush=True)` in a loop sends, from ipykernel."""
    count = bed.scale.messages
    with bed.client(PYTHON) as client:
        return _stream(bed, client, f"for i in range({count}): print(i, flush=True)", count)


def _stream(bed: Bed, client: Client, code: str, count: int) -> Numbers:
    before, start = bed.usage(), time.perf_counter()
    execution = client.start(code)
    seconds = client.collect(execution, QUIET) - start
    got = numbers(execution.messages)
    return {
        "rate": len(got) / seconds,
        "lost": count - len(set(got)),
        "disordered": sum(a >= b for a, b in zip(got, got[1:], strict=False)),
        **_cpu(bed.usage(), before, "cpu", 1e6 / count),
    }


TEXT_SETUP = "from IPython.display import display"
TEXT = "display({'text/plain': 'x' * (1 << 20)}, raw=True)"
BINARY_SETUP = (
    "from comm import create_comm; channel = create_comm(target_name='nobody'); "
    "data = b'x' * (1 << 20)"
)
BINARY = "channel.send({}, buffers=[data])"


def bulk(bed: Bed, setup: str, statement: str) -> Numbers:
    """50 messages of 1 MiB."""
    count = 50
    with bed.client(PYTHON) as client:
        client.execute(setup)
        received, start = client.received, time.perf_counter()
        execution = client.start(f"for _ in range({count}): {statement}")
        seconds = client.collect(execution, QUIET) - start
        received = client.received - received
    return {"rate": received / seconds / 1e6, "lost": round(count - received / MIB)}


def fanout(bed: Bed, count: int) -> Numbers:
    """One kernel's burst, to many clients: messages that arrive in a second, of all together."""
    messages = bed.scale.fanout_messages
    kernel = bed.kernel(NULL)
    clients = [bed.server.connect(kernel) for _ in range(count)]
    try:
        _wait_until_all_hear(clients)
        before, start = bed.usage(), time.perf_counter()
        heard, end = _hear(clients, f"stream {messages}")
        got = sum(len(numbers(received)) for received in heard)
        return {
            "rate": got / (end - start),
            "lost": messages * count - got,
            **_cpu(bed.usage(), before, "cpu", 1e6 / (messages * count)),
        }
    finally:
        for client in clients:
            client.close()


def _wait_until_all_hear(clients: list[Client]) -> None:
    """A server may answer a websocket before it has subscribed to the kernel's output for it."""
    for _ in range(100):
        heard, _end = _hear(clients, "0", quiet=0.3)
        if all(any(b'"idle"' in message for message in messages) for messages in heard):
            return
    raise TimeoutError(f"not all of {len(clients)} clients hear the kernel")


def _hear(
    clients: list[Client], code: str, quiet: float = QUIET
) -> tuple[list[list[bytes]], float]:
    """The first one executes it: what each of them hears, and when the last message came."""
    asked = clients[0].start(code)
    executions = {client: Execution(asked.msg_id.decode()) for client in clients}
    crowd, end, waiting = Crowd(clients), time.perf_counter(), set(clients)
    while waiting and (heard := crowd.receive(quiet)):
        for client, received in heard:
            executions[client].take(received)
            if executions[client].is_idle:
                waiting.discard(client)
        end = time.perf_counter()
    return [execution.messages for execution in executions.values()], end


def parallel(bed: Bed, count: int) -> Numbers:
    """Kernels that each get the next execute when the last one is answered."""
    clients = [bed.server.connect(kernel) for kernel in bed.kernels(NULL, count)]
    try:
        for client in clients:
            client.execute("0")
        before, start = bed.usage(), time.perf_counter()
        deadline = start + max(1.0, bed.scale.seconds)
        running = {client: client.start("pass") for client in clients}
        crowd, done = Crowd(clients), 0
        while time.perf_counter() < deadline:
            for client, received in crowd.receive(QUIET):
                running[client].take(received)
                if running[client].is_done:
                    done += 1
                    running[client] = client.start("pass")
        seconds = time.perf_counter() - start
        cpu = _cpu(bed.usage(), before, "cpu", 1000 / max(1, done))
        for client, execution in running.items():
            client.collect(execution, QUIET)
        return {"rate": done / seconds, **cpu}
    finally:
        for client in clients:
            client.close()


# -- clients that go and come back --


@dataclass(frozen=True)
class Absence:
    """A kernel counts while its client is away."""

    count: int = 350
    rate: int = 100
    """a second"""
    away: float = 2.0
    """seconds; the client is there for half a second before"""
    resets: bool = True
    """rather than saying goodbye"""
    keeps_session: bool = True
    has_company: bool = False
    """another client stays attached"""


SLOW_ABSENCES = {
    "clean": Absence(resets=False),
    "rst": Absence(),
    "attached": Absence(has_company=True),
    "new-session": Absence(keeps_session=False),
}
FAST_ABSENCE = Absence(count=6000, rate=2000, away=1.0)


def reconnect(bed: Bed) -> Numbers:
    """What one client gets of what its kernel counts, over both its connections."""
    assert isinstance(bed.server, HttpServer)
    server = bed.server
    with ThreadPoolExecutor(len(SLOW_ABSENCES)) as pool:
        slow = pool.map(partial(_go_and_return, server), SLOW_ABSENCES.values())
    found = dict(zip(SLOW_ABSENCES, slow, strict=True))
    found["rst-fast"] = _go_and_return(server, FAST_ABSENCE)
    return {f"{way}.{name}": n for way, part in found.items() for name, n in part.items()}


def _go_and_return(server: HttpServer, absence: Absence) -> Numbers:
    with fresh_kernels(server, NULL, 1) as [kernel], ExitStack() as stack:
        first = server.connect(kernel)
        if absence.has_company:
            stack.callback(server.connect(kernel).close)
        first.execute("0")
        execution = first.start(f"stream {absence.count} 0 {absence.rate}")
        deadline = time.perf_counter() + 0.5
        while (left := deadline - time.perf_counter()) > 0:
            execution.take(first.receive(left))
        if absence.resets:
            first.reset()
        else:
            execution.take(first.say_goodbye())
        time.sleep(absence.away)
        second = server.connect(kernel, session=first.session if absence.keeps_session else None)
        stack.callback(second.close)
        second.collect(execution, QUIET)
        got = numbers(execution.messages)
        if not absence.keeps_session and (kept := _kept_messages(server, kernel)) is not None:
            # It holds all, from the first on: alone, it must be exact.
            got = numbers(kept)
            execution.take(kept)
    return {
        "lost": absence.count - len(set(got)),
        "doubled": len(got) - len(set(got)),
        "disordered": sum(a > b for a, b in zip(got, got[1:], strict=False)),
        "replies_lost": 0 if execution.has_reply else 1,
    }


def _kept_messages(server: HttpServer, kernel: Kernel) -> list[bytes] | None:
    """All that the server has kept of this kernel; None if it can't be asked."""
    client = server.http()
    status, content = client.request("GET", f"/api/kernels/{kernel.id}/messages?since=1")
    client.close()
    return content.splitlines() if status == 200 else None


MOST_OF_A_PEER = 100
"""kernels; with 200 and a websocket each they have no ZeroMQ sockets left"""
SETTLING, LOOKING = 2.0, 5.0
"""seconds in which idle kernels do what they still have to do, and are then looked at"""
PIECE = 1 << 16
"""bytes of a message of the flood"""


def stalled_reader(bed: Bed) -> Numbers:
    """One client stops reading while its kernel writes; another one of that kernel reads on, and
    a client of another kernel executes."""
    calm = _flood(bed, stalls=False)
    stalled = _flood(bed, stalls=True)
    return {**stalled, "calm_p50": calm["p50"]}


def _flood(bed: Bed, *, stalls: bool) -> Numbers:
    writing, other = bed.kernels(NULL, 2)
    count = bed.scale.flood * MIB // PIECE
    stalled = bed.server.connect(writing) if stalls else None
    reader, neighbour = bed.server.connect(writing), bed.server.connect(other)
    try:
        reader.execute("0")
        neighbour.execute("0")
        before = bed.usage()
        most = Counter(before.memory)
        times: list[float] = []
        with ThreadPoolExecutor(1) as pool:
            execution = reader.start(f"stream {count} {PIECE}")
            reading = pool.submit(reader.collect, execution, QUIET)
            while not reading.done():
                times += _loop(neighbour, 10, 1.0)
                most |= Counter(bed.usage().memory)
            reading.result()
        grown = {role: (size - before.memory[role]) / MIB for role, size in most.items()}
        return {
            **_percentiles(times),
            "lost": count - len(numbers(execution.messages)),
            "memory": sum(grown.values()),
            **{f"memory.{role}": size for role, size in grown.items()},
        }
    finally:
        for client in (stalled, reader, neighbour):
            if client is not None:
                client.close()


# -- kernels that do nothing --


def idle(bed: Bed) -> Numbers:
    """Memory and processor time of many idle kernels, alone and each with an open websocket."""
    count = bed.scale.idle_kernels
    if bed.server.key in PEERS:
        count = min(count, MOST_OF_A_PEER)
    bed.kernels(NULL, 1)
    before = bed.usage()
    with fresh_kernels(bed.server, NULL, count) as kernels, ExitStack() as stack:
        time.sleep(SETTLING)
        alone = bed.usage()
        for kernel in kernels:
            client = bed.server.connect(kernel)
            stack.callback(client.close)
            client.execute("0")
        time.sleep(SETTLING)
        full = bed.usage()
        time.sleep(LOOKING)
        cpu = _cpu(bed.usage(), full, "cpu", 1e3 / count / LOOKING)
    return {
        **_memory(alone.memory_since(before), "alone", count),
        **_memory(full.memory_since(before), "open", count),
        **cpu,
    }


def _memory(grown: dict[str, int], name: str, count: int) -> Numbers:
    """MiB a kernel: of the gateway, and of agent and relay together."""
    gateway = {f"{name}.gateway": grown["gateway"] / count / MIB}
    if "agent" not in grown:
        return gateway
    return {**gateway, f"{name}.agent": (grown["agent"] + grown["relay"]) / count / MIB}


def _cpu(now: Usage, before: Usage, name: str, factor: float) -> Numbers:
    """Of all processes together, and of each; nothing where there is no process."""
    spent = now.cpu_since(before)
    if not spent:
        return {}
    each = {f"{name}.{role}": seconds * factor for role, seconds in spent.items()}
    return {name: sum(spent.values()) * factor, **each}


MEASURES = [
    # First, as a server that has worked has memory left that it can give to a kernel.
    Measure("idle", idle, (*PEERS, "sorna-local"), rounds=1),
    Measure("rtt-ipykernel", partial(round_trip, spec=PYTHON)),
    Measure("rtt-null", partial(round_trip, spec=NULL)),
    Measure("burst-v1", partial(burst, framing="v1")),
    Measure("burst-json", partial(burst, framing="json"), SERVERS),
    Measure("prints", prints),
    Measure("prints-as-shipped", prints, SHIPPED, rounds=2),
    Measure("fanout-1", partial(fanout, count=1)),
    Measure("fanout-5", partial(fanout, count=5)),
    Measure("fanout-20", partial(fanout, count=20)),
    Measure("parallel-1", partial(parallel, count=1)),
    Measure("parallel-8", partial(parallel, count=8)),
    # Without Docker, where starting 64 containers takes longer than all the rounds.
    Measure(
        "parallel-64",
        partial(parallel, count=64),
        ("direct", *PEERS, "sorna-local"),
        is_quick=False,
    ),
    Measure("bulk-text", partial(bulk, setup=TEXT_SETUP, statement=TEXT)),
    Measure("bulk-binary", partial(bulk, setup=BINARY_SETUP, statement=BINARY)),
    Measure("list-kernels", list_kernels, SERVERS),
    Measure("reconnect", reconnect, (*PEERS, "sorna-local"), rounds=2),
    Measure("stalled", stalled_reader, (*PEERS, "sorna-local"), rounds=1),
]

"""What the registry's tests share: an agent's beats, and kernels in a few words."""

from sorna_jupyter.protocol import (
    Beat,
    ImageState,
    ImageStatus,
    KernelReport,
    KernelStatus,
    Limits,
    Slots,
)
from sorna_jupyter.registry import (
    KernelRow,
    Policy,
    Registry,
)
from sorna_jupyter.registry.lifecycle import BEAT_MAY_LAG

NOW = 1_700_000_000.0
LATER = NOW + BEAT_MAY_LAG + 1
GiB = 1 << 30
PYTHON = ImageStatus(
    name="python3",
    reference="sorna-kernel-python:1",
    state=ImageState.READY,
    spec={"argv": ["python"], "language": "python"},
    logo=b"\x89PNG\0",
)


def beat(*reports: KernelReport, agent_id: str = "agent-1", **fields) -> Beat:
    values = dict(
        agent_id=agent_id,
        join_token="join",
        public_key=f"key of {agent_id}",
        addresses=["ipc:///run/relay.sock", "tcp://10.0.0.1:6001"],
        host="host/boot",
        runtime="docker",
        isolation="containers without network",
        slots=Slots(cpus=4.0, memory=8 * GiB, kernels=20),
        images=[PYTHON],
        kernels=list(reports),
    )
    return Beat(**(values | fields))


def said(kernel_id: str, status: str, reason: str = "") -> KernelReport:
    return KernelReport(kernel_id=kernel_id, status=KernelStatus(status), reason=reason)


async def reserve(registry: Registry, kernel_id: str = "k1", **fields) -> KernelRow:
    return (await try_reserve(registry, kernel_id, **fields))[0]


async def try_reserve(registry: Registry, kernel_id: str, **fields) -> tuple[KernelRow, bool]:
    values = dict(
        name="python3",
        owner="ada",
        limits=Limits(),
        path="",
        idle_timeout=None,
        policy=Policy(),
        now=NOW,
    )
    return await registry.reserve_kernel(kernel_id=kernel_id, **(values | fields))


async def run(registry: Registry, kernel_id: str = "k1", **fields) -> KernelRow:
    await reserve(registry, kernel_id, **fields)
    return await registry.mark_running(kernel_id, now=NOW)


async def statuses(registry: Registry) -> dict[str, tuple[str, str]]:
    rows = await registry.list_kernels(live_only=False)
    return {row.id: (row.status.value, row.reason) for row in rows}

"""How much a new kernel gets and which agent starts it. Pure; used by `Registry.reserve_kernel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sorna_jupyter.exceptions import InvalidRequest, LimitExceeded
from sorna_jupyter.protocol import ImageState, Limits, Slots

_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Policy:
    """What one user may have."""

    max_kernels: int | None = None
    """kernels that are not over, lost ones included; None: any number"""
    max_limits: Limits = Limits()
    default_limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live agent that knows the kernelspec, and what its kernels have reserved of it."""

    agent_id: str
    slots: Slots
    image: ImageState
    used_kernels: int = 0
    used_memory: int = 0

    @property
    def free_kernels(self) -> int:
        return self.slots.kernels - self.used_kernels

    @property
    def free_memory(self) -> int:
        return self.slots.memory - self.used_memory

    def fits(self, need: Limits) -> bool:
        """Memory and kernels are reserved. CPUs are a cap: they are shared when all are busy, and
        reserving them would let a laptop with two cores run two idle notebooks."""
        return (
            self.free_kernels >= 1
            and self.free_memory >= (need.memory or 0)
            and self.slots.cpus >= (need.cpus or 0)
        )

    @property
    def free_share(self) -> float:
        """0..1 of whichever runs out first, so that agents of different sizes fill evenly."""
        return min(
            self.free_kernels / max(self.slots.kernels, 1),
            self.free_memory / max(self.slots.memory, 1),
        )


IMAGE_RANK = {
    ImageState.READY: 3,
    ImageState.BUILDING: 2,
    ImageState.MISSING: 1,
    ImageState.FAILED: 0,  # may be tried again, and then says why it fails
}


def pick_agent(agents: Sequence[Candidate], need: Limits) -> Candidate | None:
    """The agent to start a kernel with these limits: where it fits, the image is nearest to
    ready, and most is free. The same agents in any order give the same answer."""
    return max(
        (agent for agent in agents if agent.fits(need)),
        key=lambda agent: (IMAGE_RANK[agent.image], agent.free_share, agent.agent_id),
        default=None,
    )


def settle_limits(asked: Limits, policy: Policy) -> Limits:
    """What is asked for, else the policy's default, else its maximum.

    Raises `LimitExceeded` for more than the maximum: nothing is cut silently.
    """
    settled: dict[str, Any] = {}
    for name in Limits.__struct_fields__:
        most = getattr(policy.max_limits, name)
        value = getattr(asked, name)
        if value is None:
            value = getattr(policy.default_limits, name)
        if value is None:
            value = most
        if value is not None and not (0 < value <= _LARGEST and math.isfinite(value)):
            raise InvalidRequest(f"The limit {name} must be a positive number, not {value}")
        if value is not None and most is not None and value > most:
            raise LimitExceeded(f"The limit {name} may be at most {most}, not {value}")
        settled[name] = value
    return Limits(**settled)

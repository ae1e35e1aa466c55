"""Steps of the registry's transactions: each works in the open one that it is given.

Rows are locked in the order users, agents, kernels, sessions, so that no two transactions wait
for each other. Used by `registry.registry` only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.orm import Session

from sorna_jupyter.exceptions import (
    AgentRefused,
    IllegalTransition,
    InvalidRequest,
    KernelNotFound,
    LimitExceeded,
    NoAgentAvailable,
    UnknownKernelspec,
)
from sorna_jupyter.protocol import Beat, ImageState, ImageStatus, KernelReport, KernelStatus, Limits
from sorna_jupyter.registry import models
from sorna_jupyter.registry.lifecycle import judge, may_move
from sorna_jupyter.registry.models import KernelRow
from sorna_jupyter.registry.placement import Candidate, Policy, pick_agent

LOCK = {"key_share": True}
"""`SELECT … FOR NO KEY UPDATE`: others may still insert what refers to the row. SQLite needs no
such word: BEGIN IMMEDIATE lets one write at a time."""

LIVE = [status.value for status in KernelStatus if not status.is_final]

LONGEST_ID = 255


def check_text(*, longest: int | None = LONGEST_ID, **texts: object) -> None:
    """Refuse what a database cannot hold, naming it."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InvalidRequest(f"The {name} must be text")
        if longest and len(text) > longest:
            raise InvalidRequest(f"The {name} may have at most {longest} characters")
        if "\0" in text or not text.isascii() and _has_surrogates(text):
            raise InvalidRequest(f"The {name} holds characters that are no text")


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


# -- kernels ----------------------------------------------------------------------------------


def lock_kernels(db: Session, *where: ColumnElement[bool]) -> list[models.Kernel]:
    query = select(models.Kernel).where(*where).order_by(models.Kernel.id)
    return list(db.scalars(query.with_for_update(key_share=True)))


def lock_live_kernel(db: Session, kernel_id: str) -> models.Kernel:
    kernel = db.get(models.Kernel, kernel_id, with_for_update=LOCK)
    if kernel is None:
        raise KernelNotFound(kernel_id)
    if KernelStatus(kernel.status).is_final:
        raise KernelNotFound(kernel_id, kernel.reason)
    return kernel


def move_kernel(
    db: Session, kernel: models.Kernel, status: KernelStatus, reason: str, now: float
) -> KernelRow:
    """Every change of a kernel's status. What is over takes its Jupyter sessions along."""
    old = KernelStatus(kernel.status)
    if not may_move(old, status):
        raise IllegalTransition(kernel.id, old, status)
    kernel.change(status, reason)
    kernel.confirmed_at = now
    if status.is_final:
        kernel.ended_at = now
        db.execute(delete(models.Session).where(models.Session.kernel_id == kernel.id))
    return kernel.row()


# -- placing a kernel -------------------------------------------------------------------------


def check_quota(db: Session, owner: str, policy: Policy) -> None:
    if policy.max_kernels is None:
        return
    mine = (models.Kernel.owner == owner) & models.Kernel.status.in_(LIVE)
    count = db.scalar(select(func.count()).select_from(models.Kernel).where(mine)) or 0
    if count >= policy.max_kernels:
        raise LimitExceeded(f"{owner} has {count} kernels and may have {policy.max_kernels}")


def place_kernel(db: Session, name: str, need: Limits) -> str:
    """The id of the agent that starts a kernel of this name. Locks all that could."""
    alive = {agent.id: agent for agent in lock_agents(db, models.Agent.status == "alive")}
    if not alive:
        raise NoAgentAvailable("No agent is connected")
    images: dict[str, ImageState] = {}
    for agent_id, state in db.execute(
        select(models.Image.agent_id, models.Image.state).where(models.Image.name == name)
    ):
        images[agent_id] = ImageState(state)
    if not images:
        raise UnknownKernelspec(name, _known_kernelspecs(db))
    used = _used_slots(db)
    candidates = [
        Candidate(agent.id, agent.slots, images[agent.id], *used.get(agent.id, (0, 0)))
        for agent in alive.values()
        if agent.id in images
    ]
    if not candidates:
        raise NoAgentAvailable(f"No agent that has kernelspec {name!r} is connected")
    chosen = pick_agent(candidates, need)
    if chosen is None:
        freest = max(candidates, key=lambda agent: agent.free_share)
        raise NoAgentAvailable(
            f"No agent has room for this kernel: it needs {(need.memory or 0) >> 20} MiB and "
            f"{need.cpus or 0:g} cores; the freest has {freest.free_memory >> 20} MiB, "
            f"{freest.slots.cpus:g} cores and {freest.free_kernels} more kernels to give. "
            "Stop one, or ask for less."
        )
    return chosen.agent_id


def _known_kernelspecs(db: Session) -> list[str]:
    return list(db.scalars(select(models.Image.name).distinct().order_by(models.Image.name)))


def _used_slots(db: Session) -> dict[str, tuple[int, int]]:
    """Kernels and memory that are reserved, by agent."""
    query = (
        select(
            models.Kernel.agent_id,
            func.count(),
            func.sum(models.Kernel.memory),
        )
        .where(models.Kernel.status.in_(LIVE))
        .group_by(models.Kernel.agent_id)
    )
    return {agent_id: (count, int(memory or 0)) for agent_id, count, memory in db.execute(query)}


# -- an agent's beat --------------------------------------------------------------------------


def lock_agents(db: Session, *where: ColumnElement[bool]) -> list[models.Agent]:
    query = select(models.Agent).where(*where).order_by(models.Agent.id)
    return list(db.scalars(query.with_for_update(key_share=True)))


def record_agent(db: Session, beat: Beat, now: float) -> None:
    agent = db.get(models.Agent, beat.agent_id, with_for_update=LOCK)
    if agent is None:
        agent = models.Agent(id=beat.agent_id, public_key=beat.public_key, last_beat=now)
        db.add(agent)
    if agent.public_key != beat.public_key:
        raise AgentRefused(f"Agent {beat.agent_id} is known with another key")
    agent.status = "alive"
    agent.addresses = beat.addresses
    agent.host = beat.host
    agent.runtime = beat.runtime
    agent.isolation = beat.isolation
    agent.cpus = beat.slots.cpus
    agent.memory = beat.slots.memory
    agent.kernels = beat.slots.kernels
    agent.last_beat = max(agent.last_beat, now)
    db.flush()


def record_images(db: Session, agent_id: str, images: Iterable[ImageStatus]) -> None:
    """Make the agent's images those of its beat; writes only what is another one now."""
    query = select(models.Image).where(models.Image.agent_id == agent_id)
    known = {image.name: image for image in db.scalars(query)}
    for status in images:
        image = known.pop(status.name, None)
        if image is None:
            image = models.Image(agent_id=agent_id, name=status.name)
            db.add(image)
        for field, value in _image_columns(status).items():
            setattr(image, field, value)
    for image in known.values():
        db.delete(image)


def _image_columns(status: ImageStatus) -> dict[str, Any]:
    return {
        "reference": status.reference,
        "state": status.state.value,
        "spec": status.spec,
        "digest": status.digest,
        "progress": status.progress,
        "message": status.message.replace("\0", ""),
        "logo": status.logo,
    }


def lock_kernels_of_beat(db: Session, beat: Beat) -> list[models.Kernel]:
    """What the registry has on this agent, and what the agent holds although it is over."""
    reported = [report.kernel_id for report in beat.kernels]
    return lock_kernels(
        db,
        models.Kernel.agent_id == beat.agent_id,
        or_(models.Kernel.status.in_(LIVE), models.Kernel.id.in_(reported)),
    )


def reconcile(
    db: Session, kernel: models.Kernel, report: KernelReport | None, now: float
) -> tuple[bool, KernelRow | None]:
    """Whether the agent must destroy it, and the row if it is another one now."""
    old = KernelStatus(kernel.status)
    verdict = judge(old, kernel.reason, now - kernel.confirmed_at, report)
    if verdict.confirmed:
        kernel.confirmed_at = now
    if verdict.status is not old:
        return verdict.destroy, move_kernel(db, kernel, verdict.status, verdict.reason, now)
    if verdict.reason != kernel.reason:
        kernel.change(old, verdict.reason)
        return verdict.destroy, kernel.row()
    return verdict.destroy, None

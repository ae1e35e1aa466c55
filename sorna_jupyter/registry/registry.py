"""Every query and every change of the registry, each method one transaction.

Rows leave as plain values. Time comes in as `now` (Unix seconds) where it decides something.
Used by `kernels`, `auth`, the operations face and Jupyter's session manager. An environment is
never stored.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from sorna_jupyter.exceptions import (
    Conflict,
    KernelExists,
    KernelNotFound,
    NotFound,
    SessionNotFound,
)
from sorna_jupyter.protocol import Beat, ImageStatus, KernelStatus, Limits
from sorna_jupyter.registry import models, steps
from sorna_jupyter.registry.database import Database, reading, writing
from sorna_jupyter.registry.models import AgentRow, KernelRow, SessionRow, TokenRow, UserRow
from sorna_jupyter.registry.placement import IMAGE_RANK, Policy, settle_limits

_END_OF_WAITING = {
    KernelStatus.LOST: (KernelStatus.DEAD, "agent lost"),
    KernelStatus.PREPARING: (KernelStatus.DEAD, "its start was abandoned"),
    KernelStatus.TERMINATING: (KernelStatus.TERMINATED, ""),
}
"""How a kernel ends that nobody has heard of for too long; without a reason it keeps its own."""


@dataclass(frozen=True, slots=True)
class BeatOutcome:
    """What a beat led to."""

    destroy: list[str]
    """kernel ids that the agent must stop and forget"""
    changed: list[KernelRow]
    """kernels whose status or reason is another one now"""


class Registry(Database):
    # -- users and tokens ---------------------------------------------------------------------

    @writing
    def ensure_user(self, db: Session, name: str, *, is_admin: bool = False) -> UserRow:
        """The user of this name, made if missing; may make an admin, never unmakes one."""
        steps.check_text(name=name)
        user = db.get(models.User, name, with_for_update=steps.LOCK)
        if user is None:
            user = models.User(name=name, is_admin=is_admin)
            db.add(user)
        user.is_admin = user.is_admin or is_admin
        return user.row()

    @reading
    def list_users(self, db: Session) -> list[UserRow]:
        return [user.row() for user in db.scalars(select(models.User).order_by(models.User.name))]

    @reading
    def find_user(self, db: Session, name: str) -> UserRow | None:
        user = db.get(models.User, name)
        return user.row() if user else None

    @writing
    def create_token(self, db: Session, user_name: str, label: str = "") -> str:
        """A new token of this user. It is stored as a digest, so nobody can show it again."""
        steps.check_text(longest=None, label=label)
        if db.get(models.User, user_name) is None:
            raise NotFound(f"No user is named {user_name!r}")
        token = "sorna_" + secrets.token_urlsafe(32)
        db.add(
            models.Token(
                id=secrets.token_hex(8),
                user_name=user_name,
                label=label,
                digest=_digest(token),
                created_at=time.time(),
            )
        )
        return token

    @writing
    def revoke_token(self, db: Session, token_id: str) -> None:
        token = db.get(models.Token, token_id)
        if token is None:
            raise NotFound(f"No token has the id {token_id}")
        db.delete(token)

    @reading
    def user_of_token(self, db: Session, token: str) -> UserRow | None:
        user = db.scalar(
            select(models.User)
            .join(models.Token, models.Token.user_name == models.User.name)
            .where(models.Token.digest == _digest(token))
        )
        return user.row() if user else None

    @reading
    def list_tokens(self, db: Session, user_name: str | None = None) -> list[TokenRow]:
        query = select(models.Token).order_by(models.Token.created_at, models.Token.id)
        if user_name is not None:
            query = query.where(models.Token.user_name == user_name)
        return [token.row() for token in db.scalars(query)]

    # -- agents -------------------------------------------------------------------------------

    @writing
    def record_beat(self, db: Session, beat: Beat, now: float) -> BeatOutcome:
        """Take down what an agent says of itself and reconcile its kernels with the registry's.

        Raises `AgentRefused` for a known agent with another key. A beat may be repeated; the
        rule itself is `lifecycle.judge`.
        """
        steps.record_agent(db, beat, now)
        steps.record_images(db, beat.agent_id, beat.images)
        reports = {report.kernel_id: report for report in beat.kernels}
        destroy: list[str] = []
        changed: list[KernelRow] = []
        for kernel in steps.lock_kernels_of_beat(db, beat):
            report = reports.pop(kernel.id, None)
            must_destroy, row = steps.reconcile(db, kernel, report, now)
            if must_destroy:
                destroy.append(kernel.id)
            if row:
                changed.append(row)
        # What is left nobody asked this agent to hold.
        return BeatOutcome(destroy=sorted([*destroy, *reports]), changed=changed)

    @writing
    def mark_lost_agents(self, db: Session, silent_for: float, now: float) -> list[KernelRow]:
        """Mark agents not heard for `silent_for` seconds as lost, and their kernels with them.

        Kernels keep what they reserved: they may come back. Safe to run from several gateways
        at once; whoever commits first changes it and the others find nothing to do.
        """
        silent = (models.Agent.status == "alive") & (models.Agent.last_beat < now - silent_for)
        agents = {agent.id: agent for agent in steps.lock_agents(db, silent)}
        for agent in agents.values():
            agent.status = "lost"
        kernels = steps.lock_kernels(
            db,
            models.Kernel.agent_id.in_(agents),
            models.Kernel.status.in_([KernelStatus.RUNNING, KernelStatus.RESTARTING]),
        )
        return [
            steps.move_kernel(
                db, kernel, KernelStatus.LOST, f"no word from agent {kernel.agent_id}", now
            )
            for kernel in kernels
        ]

    @writing
    def end_lost_kernels(self, db: Session, lost_for: float, now: float) -> list[KernelRow]:
        """End what nobody has heard of for `lost_for` seconds, and free what it reserved.

        That is: lost kernels; kernels whose gateway died while it started them and that their
        agent does not report either; kernels being stopped on an agent that is lost. Agents
        silent for as long are marked gone. Safe to run from several gateways at once.
        """
        for agent in steps.lock_agents(
            db, (models.Agent.status == "lost") & (models.Agent.last_beat < now - lost_for)
        ):
            agent.status = "gone"
        kernels = steps.lock_kernels(
            db,
            models.Kernel.status.in_(list(_END_OF_WAITING)),
            models.Kernel.confirmed_at < now - lost_for,
        )
        ended = []
        for kernel in kernels:
            status, reason = _END_OF_WAITING[KernelStatus(kernel.status)]
            ended.append(steps.move_kernel(db, kernel, status, reason or kernel.reason, now))
        return ended

    @reading
    def get_agent(self, db: Session, agent_id: str) -> AgentRow:
        agent = db.get(models.Agent, agent_id)
        if agent is None:
            raise NotFound(f"No agent has the id {agent_id}")
        return agent.row()

    @reading
    def list_agents(self, db: Session) -> list[AgentRow]:
        """All that ever joined; those that are `gone` too."""
        query = select(models.Agent).order_by(models.Agent.id)
        return [agent.row() for agent in db.scalars(query)]

    @reading
    def list_images(self, db: Session) -> dict[str, ImageStatus]:
        """The images of all live agents by name, each in its best state."""
        query = (
            select(models.Image)
            .join(models.Agent, models.Agent.id == models.Image.agent_id)
            .where(models.Agent.status == "alive")
            .order_by(models.Image.name, models.Image.agent_id)
        )
        best: dict[str, ImageStatus] = {}
        for image in db.scalars(query):
            found, known = image.row(), best.get(image.name)
            if known is None or _nearness(found) > _nearness(known):
                best[image.name] = found
        return best

    # -- kernels ------------------------------------------------------------------------------

    @writing
    def reserve_kernel(
        self,
        db: Session,
        *,
        kernel_id: str,
        name: str,
        owner: str,
        limits: Limits,
        path: str,
        idle_timeout: float | None,
        policy: Policy,
        idempotency_key: str | None = None,
        now: float,
    ) -> tuple[KernelRow, bool]:
        """Take a place on an agent for a new kernel, `preparing`, and say whether it is new.

        The same owner and idempotency key give the same kernel, whatever became of it. Two
        reservations never share the last place of a user or of an agent: both rows are locked
        from the look to the commit.
        """
        steps.check_text(kernel_id=kernel_id, name=name, idempotency_key=idempotency_key or "")
        steps.check_text(longest=None, path=path)
        if db.get(models.User, owner, with_for_update=steps.LOCK) is None:
            raise NotFound(f"No user is named {owner!r}")
        if idempotency_key is not None:
            same = (models.Kernel.owner == owner) & (
                models.Kernel.idempotency_key == idempotency_key
            )
            if known := db.scalar(select(models.Kernel).where(same)):
                return known.row(), False
        if db.get(models.Kernel, kernel_id) is not None:
            raise KernelExists(f"Another kernel already has this id: {kernel_id}")
        need = settle_limits(limits, policy)
        steps.check_quota(db, owner, policy)
        kernel = models.Kernel(
            id=kernel_id,
            name=name,
            owner=owner,
            agent_id=steps.place_kernel(db, name, need),
            image=name,
            status=KernelStatus.PREPARING,
            reason="",
            path=path,
            memory=need.memory,
            cpus=need.cpus,
            pids=need.pids,
            disk=need.disk,
            idle_timeout=idle_timeout,
            created_at=now,
            confirmed_at=now,
            ended_at=None,
            idempotency_key=idempotency_key,
            revision=0,
        )
        db.add(kernel)
        return kernel.row(), True

    # Each of these refuses an illegal move (`IllegalTransition`); what is so already, or is
    # over, stays as it is and keeps its first reason. What the agent knows first, it may also
    # tell first: the beat and the mark then agree, in either order.

    async def mark_running(self, kernel_id: str, *, now: float | None = None) -> KernelRow:
        return await self._mark(kernel_id, KernelStatus.RUNNING, "", now)

    async def mark_restarting(self, kernel_id: str, *, now: float | None = None) -> KernelRow:
        return await self._mark(kernel_id, KernelStatus.RESTARTING, "", now)

    async def mark_terminating(
        self, kernel_id: str, reason: str = "", *, now: float | None = None
    ) -> KernelRow:
        return await self._mark(kernel_id, KernelStatus.TERMINATING, reason, now)

    async def mark_terminated(
        self, kernel_id: str, reason: str, *, now: float | None = None
    ) -> KernelRow:
        return await self._mark(kernel_id, KernelStatus.TERMINATED, reason, now)

    async def mark_dead(
        self, kernel_id: str, reason: str, *, now: float | None = None
    ) -> KernelRow:
        return await self._mark(kernel_id, KernelStatus.DEAD, reason, now)

    @writing
    def _mark(
        self, db: Session, kernel_id: str, status: KernelStatus, reason: str, now: float | None
    ) -> KernelRow:
        kernel = db.get(models.Kernel, kernel_id, with_for_update=steps.LOCK)
        if kernel is None:
            raise KernelNotFound(kernel_id)
        old = KernelStatus(kernel.status)
        if old is status or (old.is_final and status.is_final):
            if reason and not kernel.reason:
                kernel.change(old, reason)
            return kernel.row()
        return steps.move_kernel(db, kernel, status, reason, time.time() if now is None else now)

    @reading
    def get_kernel(self, db: Session, kernel_id: str) -> KernelRow:
        """Also one that is over; its `reason` says why."""
        kernel = db.get(models.Kernel, kernel_id)
        if kernel is None:
            raise KernelNotFound(kernel_id)
        return kernel.row()

    @reading
    def list_kernels(
        self, db: Session, owner: str | None = None, live_only: bool = True
    ) -> list[KernelRow]:
        """Oldest first."""
        query = select(models.Kernel).order_by(models.Kernel.created_at, models.Kernel.id)
        if owner is not None:
            query = query.where(models.Kernel.owner == owner)
        if live_only:
            query = query.where(models.Kernel.status.in_(steps.LIVE))
        return [kernel.row() for kernel in db.scalars(query)]

    # -- Jupyter's sessions -------------------------------------------------------------------

    @writing
    def create_session(self, db: Session, session: SessionRow) -> SessionRow:
        """Raises `KernelNotFound` unless its kernel lives: a session ends with its kernel."""
        steps.check_text(id=session.id)
        steps.check_text(longest=None, path=session.path, name=session.name, type=session.type)
        steps.lock_live_kernel(db, session.kernel_id)
        if db.get(models.Session, session.id) is not None:
            raise Conflict(f"Another session already has this id: {session.id}")
        db.add(
            models.Session(
                id=session.id,
                path=session.path,
                name=session.name,
                type=session.type,
                kernel_id=session.kernel_id,
                owner=session.owner,
            )
        )
        return session

    @reading
    def get_session(
        self,
        db: Session,
        *,
        id: str | None = None,
        path: str | None = None,
        name: str | None = None,
        type: str | None = None,
        kernel_id: str | None = None,
        owner: str | None = None,
    ) -> SessionRow:
        """The session that matches everything given."""
        wanted = dict(id=id, path=path, name=name, type=type, kernel_id=kernel_id, owner=owner)
        given = {field: value for field, value in wanted.items() if value is not None}
        steps.check_text(longest=None, **given)
        query = select(models.Session).filter_by(**given).order_by(models.Session.id).limit(1)
        session = db.scalars(query).first()
        if session is None:
            raise SessionNotFound()
        return session.row()

    @writing
    def update_session(self, db: Session, /, session_id: str, **fields: Any) -> SessionRow:
        """Change `path`, `name`, `type` or `kernel_id`."""
        if unknown := fields.keys() - {"path", "name", "type", "kernel_id"}:
            raise TypeError(f"a session's {', '.join(sorted(unknown))} cannot be changed")
        steps.check_text(longest=None, **fields)
        if "kernel_id" in fields:
            steps.lock_live_kernel(db, fields["kernel_id"])
        session = db.get(models.Session, session_id, with_for_update=steps.LOCK)
        if session is None:
            raise SessionNotFound(f"Session does not exist: {session_id}")
        for field, value in fields.items():
            setattr(session, field, value)
        return replace(session.row(), **fields)

    @writing
    def delete_session(self, db: Session, session_id: str) -> None:
        session = db.get(models.Session, session_id, with_for_update=steps.LOCK)
        if session is None:
            raise SessionNotFound(f"Session does not exist: {session_id}")
        db.delete(session)

    @reading
    def list_sessions(self, db: Session, owner: str | None = None) -> list[SessionRow]:
        query = select(models.Session).order_by(models.Session.id)
        if owner is not None:
            query = query.where(models.Session.owner == owner)
        return [session.row() for session in db.scalars(query)]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _nearness(image: ImageStatus) -> tuple[int, float]:
    return IMAGE_RANK[image.state], image.progress

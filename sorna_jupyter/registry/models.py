"""The registry's tables, and the plain rows in which they leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sorna_jupyter.protocol import ImageState, ImageStatus, KernelStatus, Limits, Slots

AgentStatus = Literal["alive", "lost", "gone"]

# -- rows: what `Registry` returns ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UserRow:
    name: str
    is_admin: bool


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token without its secret, which is shown once and never stored."""

    id: str
    user_name: str
    label: str
    created_at: float


@dataclass(frozen=True, slots=True)
class AgentRow:
    id: str
    status: AgentStatus
    public_key: str
    addresses: list[str]
    host: str
    runtime: str
    isolation: str
    slots: Slots
    last_beat: float


@dataclass(frozen=True, slots=True)
class KernelRow:
    id: str
    name: str
    """the kernelspec's"""
    owner: str
    agent_id: str
    image: str
    """an `ImageStatus.name` of the agent"""
    status: KernelStatus
    reason: str
    path: str
    limits: Limits
    idle_timeout: float | None
    created_at: float
    ended_at: float | None
    idempotency_key: str | None
    revision: int
    """one more with every change of status or reason: of two rows of a kernel, which is newer"""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """Jupyter's session: a document and the kernel it uses."""

    id: str
    path: str
    name: str
    type: str
    kernel_id: str
    owner: str


# -- tables -----------------------------------------------------------------------------------


class Base(DeclarativeBase):
    # Named, because a later migration can only drop a constraint that has a name.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class User(Base):
    __tablename__ = "users"

    name: Mapped[str] = mapped_column(primary_key=True)
    is_admin: Mapped[bool]

    def row(self) -> UserRow:
        return UserRow(self.name, self.is_admin)


class Token(Base):
    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_name: Mapped[str] = mapped_column(ForeignKey("users.name"), index=True)
    label: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    """sha256 of the token: random enough that it needs neither salt nor stretching"""
    created_at: Mapped[float]

    def row(self) -> TokenRow:
        return TokenRow(self.id, self.user_name, self.label, self.created_at)


class Agent(Base):
    __tablename__ = "agents"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(index=True)
    public_key: Mapped[str]
    addresses: Mapped[list[str]] = mapped_column(JSON)
    host: Mapped[str]
    runtime: Mapped[str]
    isolation: Mapped[str]
    cpus: Mapped[float]
    memory: Mapped[int] = mapped_column(BigInteger)
    kernels: Mapped[int]
    last_beat: Mapped[float]

    @property
    def slots(self) -> Slots:
        return Slots(cpus=self.cpus, memory=self.memory, kernels=self.kernels)

    def row(self) -> AgentRow:
        return AgentRow(
            id=self.id,
            status=cast(AgentStatus, self.status),
            public_key=self.public_key,
            addresses=list(self.addresses),
            host=self.host,
            runtime=self.runtime,
            isolation=self.isolation,
            slots=self.slots,
            last_beat=self.last_beat,
        )


class Image(Base):
    """An image as its agent last reported it."""

    __tablename__ = "images"

    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    reference: Mapped[str]
    state: Mapped[str]
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    digest: Mapped[str]
    progress: Mapped[float]
    message: Mapped[str]
    logo: Mapped[bytes] = mapped_column(LargeBinary)

    def row(self) -> ImageStatus:
        return ImageStatus(
            name=self.name,
            reference=self.reference,
            state=ImageState(self.state),
            spec=self.spec,
            digest=self.digest,
            progress=self.progress,
            message=self.message,
            logo=self.logo,
        )


class Kernel(Base):
    """A kernel, also after its end. Its environment is not here: it may hold secrets."""

    __tablename__ = "kernels"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        Index(None, "owner", "status"),
        Index(None, "agent_id", "status"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    owner: Mapped[str] = mapped_column(ForeignKey("users.name"))
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"))
    image: Mapped[str]
    status: Mapped[str]
    reason: Mapped[str]
    path: Mapped[str]
    memory: Mapped[int | None] = mapped_column(BigInteger)
    cpus: Mapped[float | None]
    pids: Mapped[int | None] = mapped_column(BigInteger)
    disk: Mapped[int | None] = mapped_column(BigInteger)
    idle_timeout: Mapped[float | None]
    created_at: Mapped[float]
    confirmed_at: Mapped[float]
    """when the status was last set or, while preparing, last reported by the agent"""
    ended_at: Mapped[float | None]
    idempotency_key: Mapped[str | None]
    revision: Mapped[int] = mapped_column(server_default="0")

    def change(self, status: KernelStatus, reason: str) -> None:
        """Only `steps` may: it knows which change is allowed."""
        self.status = status.value
        self.reason = reason.replace("\0", "")
        self.revision += 1

    def row(self) -> KernelRow:
        return KernelRow(
            id=self.id,
            name=self.name,
            owner=self.owner,
            agent_id=self.agent_id,
            image=self.image,
            status=KernelStatus(self.status),
            reason=self.reason,
            path=self.path,
            limits=Limits(memory=self.memory, cpus=self.cpus, pids=self.pids, disk=self.disk),
            idle_timeout=self.idle_timeout,
            created_at=self.created_at,
            ended_at=self.ended_at,
            idempotency_key=self.idempotency_key,
            revision=self.revision,
        )


class Session(Base):
    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str]
    name: Mapped[str]
    type: Mapped[str]
    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id"), index=True)
    owner: Mapped[str] = mapped_column(ForeignKey("users.name"), index=True)

    def row(self) -> SessionRow:
        return SessionRow(self.id, self.path, self.name, self.type, self.kernel_id, self.owner)

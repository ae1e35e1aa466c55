"""What the agent and its relay say to each other over `rpc.sock`. No I/O.

The relay binds a ROUTER, the agent connects a DEALER; whoever spoke last is the agent. First frame:
`RPC` for what gateways ask, passed through as it came, else `CONTROL` with one of these messages.
"""

from __future__ import annotations

from typing import Any

import msgspec

VERSION = 2
"""A relay outlives its agent: raised when a newer agent could not adopt an older relay."""

RPC = b"R"
"""[RPC, gateway's route, request id, request] → [RPC, route, request id, verdict, reply]"""
CONTROL = b"C"
"""[CONTROL, message]"""


class RelayMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Hello(RelayMessage, frozen=True, kw_only=True):
    """Agent → relay: I am the agent. Also its sign of life, every few seconds."""


class OpenKernel(RelayMessage, frozen=True, kw_only=True):
    """Agent → relay: connect to this kernel; one that is open is connected anew, with its journal,
    sessions and subscribers as they were."""

    kernel_id: str
    address: str
    """prefix of the ipc sockets"""
    key: str
    opening: int
    """comes back in `KernelReady`, so that an earlier opening's answer is not taken for this one"""
    ask_ready: bool = True
    """False for a kernel known to run: it may be busy for hours and could not answer"""
    execution_state: str = "starting"


class DetachKernel(RelayMessage, frozen=True, kw_only=True):
    """Agent → relay: its process is over. Read what it still sent and close the sockets; the
    journal stays readable."""

    kernel_id: str


class ForgetKernel(RelayMessage, frozen=True, kw_only=True):
    """Agent → relay: the kernel and all that was kept of it go."""

    kernel_id: str


class KeepKernels(RelayMessage, frozen=True, kw_only=True):
    """Agent → relay: these are all that there are; what was kept of any other goes."""

    kernel_ids: list[str]


class InterruptByMessage(RelayMessage, frozen=True, kw_only=True):
    kernel_id: str


class StopRelay(RelayMessage, frozen=True, kw_only=True):
    pass


class RelayHello(RelayMessage, frozen=True, kw_only=True):
    """Relay → agent: the answer to `Hello`."""

    version: int = VERSION
    pid: int
    started: float
    fingerprint: str
    """of what it was started with; an agent with another configuration replaces it"""
    addresses: list[str]
    kernels: list[str]
    """those it holds connected"""


class KernelReady(RelayMessage, frozen=True, kw_only=True):
    """Relay → agent: it answered, and what it sends on iopub reaches us."""

    kernel_id: str
    opening: int
    kernel_info: dict[str, Any]


class KernelActivity(RelayMessage, frozen=True, kw_only=True):
    """Relay → agent: at most every tenth of a second for one kernel."""

    kernel_id: str
    execution_state: str
    last_activity: float
    seq: int
    """of the last message that these already tell of"""


ToRelay = (
    Hello | OpenKernel | DetachKernel | ForgetKernel | KeepKernels | InterruptByMessage | StopRelay
)
ToAgent = RelayHello | KernelReady | KernelActivity

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
_to_relay: msgspec.msgpack.Decoder[ToRelay] = msgspec.msgpack.Decoder(ToRelay)
_to_agent: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)


def decode_for_relay(data: bytes) -> ToRelay:
    return _to_relay.decode(data)


def decode_for_agent(data: bytes) -> ToAgent:
    return _to_agent.decode(data)

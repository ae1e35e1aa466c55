"""The body that makes a kernel, and what all such bodies have in common: limits and environment.

Used by the faces, and by `openapi`, which describes them.
"""

from __future__ import annotations

import msgspec

from sorna_jupyter.exceptions import InvalidRequest
from sorna_jupyter.protocol import Limits, parse_size

MAX_ENV = 128 * 1024
"""bytes of one variable, `NAME=value` and a NUL: what Linux takes (MAX_ARG_STRLEN)"""


class LimitsBody(msgspec.Struct, forbid_unknown_fields=True):
    """Sizes in bytes, or as people write them: `"512m"`, `"1 GiB"`."""

    memory: int | str | None = None
    cpus: float | None = None
    pids: int | None = None
    disk: int | str | None = None

    def limits(self) -> Limits:
        """Raises `InvalidRequest`."""
        limits = Limits(
            memory=_size(self.memory), cpus=self.cpus, pids=self.pids, disk=_size(self.disk)
        )
        for name in limits.__struct_fields__:
            value = getattr(limits, name)
            if value is not None and not 0 < value < 2**63:
                raise InvalidRequest(f"The limit {name} must be positive, not {value}")
        return limits


class NewKernel(msgspec.Struct):
    """An empty body is a kernel of the default kernelspec. Fields that are not here are ignored:
    clients send their own."""

    name: str | None = None
    """of the kernelspec"""
    path: str | None = None
    """working directory, relative to the kernel's home"""
    id: str | None = None
    """another name of `kernel_id`"""
    kernel_id: str | None = None
    """a UUID of the client's choice; 409 if there is such a kernel"""
    env: dict[str, str] | None = None
    limits: LimitsBody | None = None
    idle_timeout: float | None = None
    """seconds without activity after which the kernel is stopped"""


def kernel_env(env: dict[str, str], username: str) -> dict[str, str]:
    """What may go into a kernel's environment. Raises `InvalidRequest`.

    `KERNEL_USERNAME` is only a claim, and gateways before this one believed it.
    """
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidRequest(f"{name[:80]!r} can't be an environment variable")
        if len(f"{name}={value}".encode("utf-8", "replace")) >= MAX_ENV:
            raise InvalidRequest(f"The environment variable {name[:80]} is above {MAX_ENV} bytes")
    return {
        name: value for name, value in env.items() if name != "KERNEL_USERNAME" or value == username
    }


def _size(size: int | str | None) -> int | None:
    try:
        return parse_size(size) if isinstance(size, str) else size
    except OverflowError as error:
        raise InvalidRequest(f"not a size: {str(size)[:40]!r}") from error

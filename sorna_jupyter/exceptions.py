"""Everything that can go wrong here, as one hierarchy. Knows nothing of HTTP.

The docstring of a class is its message where the raiser gives none; data that a caller may
want stand in attributes. `http.py` maps these to status codes, once.
"""

from __future__ import annotations


class SornaError(Exception):
    """Something in Sorna went wrong."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])

    @property
    def message(self) -> str:
        return str(self.args[0])


class InvalidRequest(SornaError):
    """The request is not well formed."""


class NotAllowed(SornaError):
    """This user may not do that."""


class LimitExceeded(NotAllowed):
    """The request is above what the policy allows."""


class NotFound(SornaError):
    """No such thing here."""


class KernelNotFound(NotFound):
    """No kernel has this id."""

    def __init__(self, kernel_id: str, reason: str = "") -> None:
        super().__init__(f"Kernel does not exist: {kernel_id}" + (f" ({reason})" if reason else ""))
        self.kernel_id = kernel_id
        self.reason = reason


class RunNotFound(NotFound):
    """No run has this id on this kernel."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"Run does not exist: {run_id}")
        self.run_id = run_id


class SessionNotFound(NotFound):
    """No session matches."""


class UnknownKernelspec(NotFound):
    """No image carries this kernelspec."""

    def __init__(self, name: str, known: list[str] | None = None) -> None:
        hint = f"; there are: {', '.join(known)}" if known else ""
        super().__init__(f"No kernelspec is named {name!r}{hint}")
        self.name = name


class Conflict(SornaError):
    """The thing's state does not allow that."""


class KernelExists(Conflict):
    """Another kernel already has this id."""


class IllegalTransition(Conflict):
    """A kernel cannot go from that state to this one."""

    def __init__(self, kernel_id: str, old: str, new: str) -> None:
        super().__init__(f"kernel {kernel_id} cannot go from {old} to {new}")


class Unavailable(SornaError):
    """Not possible right now; try again later."""

    retry_after = 3  # seconds


class NoAgentAvailable(Unavailable):
    """No live agent has room for this kernel."""


class AgentUnreachable(Unavailable):
    """The agent did not answer in time."""


class AgentDiskFull(Unavailable):
    """The agent's disk is full: kernels that run go on, new ones can't be started."""


class RuntimeUnavailable(Unavailable):
    """The container engine does not answer."""


class ImageUnavailable(SornaError):
    """The kernel's image is not on this agent and can't be built."""


class KernelStartFailed(SornaError):
    """The kernel did not start."""


class NotebookNotWritten(SornaError):
    """The notebook's file can't be read or written."""


class AgentRefused(SornaError):
    """The gateway does not accept this agent."""


class AlreadyRunning(SornaError):
    """A gateway already runs on this data directory."""

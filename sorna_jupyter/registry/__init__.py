"""What is true: users, tokens, agents, images, kernels and sessions, in SQL.

`registry` holds the queries, `database` runs them as transactions, `placement` and `lifecycle`
decide (pure), `models` are the tables, `migrations` make them.
"""

from sorna_jupyter.registry.models import (
    AgentRow,
    AgentStatus,
    KernelRow,
    SessionRow,
    TokenRow,
    UserRow,
)
from sorna_jupyter.registry.placement import IMAGE_RANK, Candidate, Policy, pick_agent
from sorna_jupyter.registry.registry import BeatOutcome, Registry

__all__ = [
    "IMAGE_RANK",
    "AgentRow",
    "AgentStatus",
    "BeatOutcome",
    "Candidate",
    "KernelRow",
    "Policy",
    "Registry",
    "SessionRow",
    "TokenRow",
    "UserRow",
    "pick_agent",
]

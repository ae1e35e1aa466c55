"""What whoever runs the server asks of it: `jupyter sorna ps | logs | images | token | doctor`.

JSON under `/sorna`. Everyone sees their own kernels; what concerns all users is the admins'.
"""

from __future__ import annotations

from typing import Any

import msgspec
from jupyter_server.auth.decorator import authorized
from tornado import web

from sorna_jupyter.auth import is_admin
from sorna_jupyter.exceptions import NotAllowed
from sorna_jupyter.http import KERNEL_ID, SornaAPIHandler
from sorna_jupyter.kernels import Kernel

AUTH_RESOURCE = "kernels"


class NewToken(msgspec.Struct, forbid_unknown_fields=True):
    user: str
    label: str = ""


class OperationsHandler(SornaAPIHandler):
    auth_resource = AUTH_RESOURCE

    def require_admin(self) -> None:
        if not is_admin(self.current_user):
            raise NotAllowed("Only an admin may do that")


class KernelsHandler(OperationsHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The caller's kernels with what they may use; `?all=1`: everyone's, for admins."""
        owner: str | None = self.username
        if self.get_argument("all", ""):
            self.require_admin()
            owner = None
        self.write_json([_row(kernel) for kernel in self.kernels.list(owner)])


class KernelLogsHandler(OperationsHandler):
    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        """`{"text"}`: the last lines that the kernel's process itself wrote."""
        lines = self.get_argument("lines", "200")
        if not lines.isdigit():
            raise web.HTTPError(400, "lines: not a number")
        text = await self.kernels.logs(kernel_id, min(int(lines), 10_000))
        self.write_json({"text": text})


class ImagesHandler(OperationsHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Every image with its state; while one is built, how far it is."""
        self.write_json(
            [
                {
                    "name": image.name,
                    "display_name": image.spec.get("display_name", image.name),
                    "reference": image.reference,
                    "state": image.state,
                    "progress": image.progress,
                    "message": image.message,
                }
                for image in self.kernels.kernelspecs().values()
            ]
        )

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Build what is missing or failed. 202: progress stands in GET."""
        self.require_admin()
        await self.kernels.build_images()
        self.write_json({}, 202)


class AgentsHandler(OperationsHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.require_admin()
        self.write_json(
            [
                {
                    "id": agent.id,
                    "status": agent.status,
                    "runtime": agent.runtime,
                    "isolation": agent.isolation,
                    "host": agent.host.partition("/")[0],
                    "slots": agent.slots,
                    "last_beat": agent.last_beat,
                }
                for agent in self.kernels.agents()
            ]
        )


class TokensHandler(OperationsHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.require_admin()
        self.write_json(await self.registry.list_tokens())

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """A new token for a user, who is created if need be. It is shown this once."""
        self.require_admin()
        request = self.body(NewToken)
        await self.registry.ensure_user(request.user)
        token = await self.registry.create_token(request.user, request.label)
        self.write_json({"user": request.user, "token": token}, 201)


class TokenHandler(OperationsHandler):
    @web.authenticated
    @authorized
    async def delete(self, token_id: str) -> None:
        self.require_admin()
        await self.registry.revoke_token(token_id)
        self.set_status(204)
        self.finish()


def _row(kernel: Kernel) -> dict[str, Any]:
    return {
        "id": kernel.id,
        "name": kernel.name,
        "owner": kernel.owner,
        "agent": kernel.agent_id,
        "status": kernel.status,
        "execution_state": kernel.execution_state,
        "reason": kernel.reason,
        "created_at": kernel.created_at,
        "last_activity": kernel.last_activity,
        "connections": kernel.connections,
        "limits": kernel.limits,
    }


def handlers() -> list[tuple[str, type[web.RequestHandler]]]:
    return [
        (r"/sorna/kernels", KernelsHandler),
        (rf"/sorna/kernels/{KERNEL_ID}/logs", KernelLogsHandler),
        (r"/sorna/images", ImagesHandler),
        (r"/sorna/agents", AgentsHandler),
        (r"/sorna/tokens", TokensHandler),
        (r"/sorna/tokens/(?P<token_id>\w+)", TokenHandler),
    ]

"""Who asks, and what they may reach.

`SornaIdentityProvider`: the server's token is the local user, an admin; every other token stands
in the registry and belongs to its user. `SornaAuthorizer`: every kernel and session belongs to one
user, and does not exist for anyone else. Identity comes from credentials only, never from what a
request claims (`KERNEL_USERNAME`, a user name in the URL).
"""

from __future__ import annotations

import base64
import binascii
import getpass
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from jupyter_server.auth.authorizer import Authorizer
from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.auth.identity import PasswordIdentityProvider, User
from jupyter_server.auth.login import LoginFormHandler
from jupyter_server.auth.logout import LogoutHandler
from jupyter_server.base.handlers import (
    APIVersionHandler,
    FileFindHandler,
    JupyterHandler,
    PublicStaticFileHandler,
    Template404,
)
from jupyter_server.services.api.handlers import IdentityHandler
from tornado import web
from traitlets import Unicode, default

from sorna_jupyter.exceptions import KernelNotFound, SessionNotFound
from sorna_jupyter.kernels import Kernels
from sorna_jupyter.registry import Registry, UserRow

OPEN_RESOURCES = frozenset(("api", "kernels", "kernelspecs", "sessions"))
"""What users who are no admins may reach. Contents, terminals and the rest act with the rights of
the operating system's user that runs the server."""

_FOR_EVERYONE = (
    APIVersionHandler,
    FileFindHandler,
    IdentityHandler,
    LoginFormHandler,
    LogoutHandler,
    PublicStaticFileHandler,
    Template404,
)
"""Handlers of jupyter_server that name no resource and show nothing of anyone's."""


@dataclass
class SornaUser(User):
    is_admin: bool = False


class SornaLoginHandler(LoginFormHandler):
    """The stock login page; the stock `post` can't await, and the registry has to be asked."""

    @allow_unauthenticated
    async def post(self) -> None:
        provider = cast(SornaIdentityProvider, self.identity_provider)
        user = await provider.user_of_form(self)
        if user is None:
            self.set_status(401)
            self._render(  # type: ignore[no-untyped-call]
                message={"error": "Invalid credentials"}
            )
            return
        self.log.info("%s logged in", user.username)
        self.current_user = user
        provider.set_login_cookie(self, user)
        next_page = self.get_argument("next", default=self.base_url)
        self._redirect_safe(next_page)  # type: ignore[no-untyped-call]


class SornaIdentityProvider(PasswordIdentityProvider):
    """Tokens in every form that a Jupyter client sends: `Authorization: token …`, `Bearer …`,
    `Basic user:token`, `?token=…`, and the cookie that the login page sets."""

    local_user = Unicode(
        help="Name of the user whom the server's own token (and password) stands for; an admin. "
        "Default: the operating system's user.",
    ).tag(config=True)

    registry: Registry | None = None

    @default("local_user")
    def _default_local_user(self) -> str:
        try:
            return getpass.getuser()
        except (KeyError, OSError):  # a uid without a name
            return "sorna"

    @default("login_handler_class")
    def _default_login_handler_class(self) -> type:
        return SornaLoginHandler

    @default("allow_password_change")
    def _default_allow_password_change(self) -> bool:
        return False

    # -- jupyter_server's hooks

    async def get_user(self, handler: web.RequestHandler) -> User | None:
        user: User | None = await self._get_user(handler)
        if user is not None and not is_admin(user):
            _keep_token_out_of_pages(handler)
            _refuse_what_is_not_theirs(handler, user)
        return user

    async def get_user_token(self, handler: web.RequestHandler) -> User | None:
        username, token = _credentials(handler)
        user = await self.user_of_token(token) if token else None
        if user is None or username not in ("", user.username):
            return None
        known = await self.get_user_cookie(handler)
        if known is not None and known.username == user.username:
            return known  # with the colour and display name they chose
        return user

    async def get_user_cookie(self, handler: web.RequestHandler) -> User | None:
        """A cookie is worth what its user is: gone from the registry, gone here."""
        user = cast(User | None, super().get_user_cookie(handler))
        if user is None:
            return None
        row = await self._find_user(user.username)
        if row is None:
            return None
        return SornaUser(
            row.name,
            user.name,
            user.display_name,
            user.initials,
            user.avatar_url,
            user.color,
            is_admin=row.is_admin,
        )

    def identity_model(self, user: User) -> dict[str, Any]:
        model: dict[str, Any] = super().identity_model(user)
        model.pop("is_admin", None)
        return model

    def generate_anonymous_user(self, handler: web.RequestHandler) -> User:
        """Whom jupyter_server calls anonymous (the password, or authentication switched off) is
        the local user here: kernels need an owner that stays the same."""
        return SornaUser(self.local_user, is_admin=True)

    # -- whom a credential stands for

    async def user_of_token(self, token: str) -> User | None:
        if self.token and _equal(token, self.token):
            return SornaUser(self.local_user, is_admin=True)
        if self.registry is None:
            return None
        row = await self.registry.user_of_token(token)
        return None if row is None else SornaUser(row.name, is_admin=row.is_admin)

    async def user_of_form(self, handler: web.RequestHandler) -> User | None:
        """The login page's `password` is the password or anyone's token."""
        typed = handler.get_argument("password", default="")
        if not self.auth_enabled or (self.hashed_password and self._is_password(typed)):
            return self.generate_anonymous_user(handler)
        return await self.user_of_token(typed) if typed else None

    def _is_password(self, typed: str) -> bool:
        return bool(self.passwd_check(typed))  # type: ignore[no-untyped-call]

    async def _find_user(self, name: str) -> UserRow | None:
        if name == self.local_user:
            return UserRow(name=name, is_admin=True)
        if self.registry is None:
            return None
        return await self.registry.find_user(name)


class SornaAuthorizer(Authorizer):
    """Kernels and sessions belong to one user each; the server's machine to its admin."""

    kernels: Kernels | None = None
    registry: Registry | None = None

    async def is_authorized(
        self, handler: JupyterHandler, user: User, action: str, resource: str
    ) -> bool:
        """Asked before each request's method; 404 for another's kernel, as for none."""
        if not is_admin(user) and resource not in OPEN_RESOURCES:
            return False
        kernel_id = handler.path_kwargs.get("kernel_id")
        if kernel_id is not None and self.kernels is not None:
            owner = self.kernels.owner_of(kernel_id)
            if owner is not None and owner != user.username:
                raise web.HTTPError(404, KernelNotFound(kernel_id).message)
        session_id = handler.path_kwargs.get("session_id")
        if session_id is not None and self.registry is not None:
            await self._check_session(session_id, user)
        return True

    async def _check_session(self, session_id: str, user: User) -> None:
        assert self.registry is not None
        try:
            await self.registry.get_session(id=session_id, owner=user.username)
        except SessionNotFound as error:
            raise web.HTTPError(404, f"Session not found: session_id={session_id!r}") from error


def is_admin(user: User) -> bool:
    return getattr(user, "is_admin", False)


class _TokenlessTemplate:
    def __init__(self, template: Any) -> None:
        self._template = template

    def render(self, **names: Any) -> str:
        page: str = self._template.render(**{**names, "token": ""})
        return page


def _keep_token_out_of_pages(handler: web.RequestHandler) -> None:
    """jupyter_server writes the server's own token into every page for whoever is logged in, also
    into those that only say that something is not found."""
    if isinstance(handler, JupyterHandler):
        get_template = cast(Callable[[str], Any], handler.get_template)
        handler.get_template = (  # type: ignore[method-assign]  # no seam is nearer to all pages
            lambda name: _TokenlessTemplate(get_template(name))
        )


def _refuse_what_is_not_theirs(handler: web.RequestHandler, user: User) -> None:
    """Many pages (`/tree`, `/lab`, other extensions') ask for a login and nothing more, and they
    carry the server's own token in their HTML: no authorizer is asked before that is out."""
    resource = getattr(handler, "auth_resource", None)
    if resource not in OPEN_RESOURCES and not isinstance(handler, _FOR_EVERYONE):
        handler.current_user = user  # the page that says so asks for it
        raise web.HTTPError(403, "Only an admin of this server may see this")


_SCHEME = re.compile(r"\s*(token|bearer|basic)\s+(\S+)\s*", re.IGNORECASE)


def _credentials(handler: web.RequestHandler) -> tuple[str, str]:
    """The user name that the request claims (empty: none) and its token."""
    if token := handler.get_argument("token", ""):
        return "", token
    header = _SCHEME.fullmatch(handler.request.headers.get("Authorization", ""))
    if header is None:
        return "", ""
    scheme, value = header.groups()
    if scheme.lower() != "basic":
        return "", value
    try:
        username, _, token = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return username, token


def _equal(a: str, b: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(a.encode("utf-8", "replace"), b.encode("utf-8", "replace"))

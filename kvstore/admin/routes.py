"""What a route of the admin API is, and the few ways in which its answers are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from aiohttp import web

from kvstore.admin.auth import Scope
from kvstore.admin.schema import Problem
from kvstore.limits import ADMIN_BODY_MAX_BYTES

JSON: Final = "application/json"
PROBLEM: Final = "application/problem+json"

TITLES: Final = {
    400: "Bad request",
    401: "Token needed",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "In conflict with what is there",
    413: "Too large",
    415: "Not JSON",
    421: "Wrong host",
    429: "Too many requests",
    500: "Failed",
    503: "Not ready",
}


class Refusal(Exception):  # noqa: N818  # an answer, not a fault
    """A request is answered with a problem."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a query or a path, by its JSON schema."""

    name: str
    schema: Mapping[str, object]
    text: str
    place: str = "query"


@dataclass(frozen=True)
class Call:
    """One request, checked: its body decoded, its parameters within their limits."""

    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any  # what the route says


Handler = Callable[[Call], Awaitable[object]]


@dataclass(frozen=True)
class Route:
    """One method of one path. *answer* is a struct, or the media type of a text."""

    method: str
    path: str
    name: str
    text: str
    handler: Handler
    answer: type[msgspec.Struct] | str
    scope: Scope = Scope.READ
    asked: type[msgspec.Struct] | None = None
    parameters: tuple[Parameter, ...] = ()
    problems: tuple[int, ...] = ()
    body_max_bytes: int = ADMIN_BODY_MAX_BYTES
    unready: bool = field(default=False)
    """Whether a 503 carries the same struct as a 200."""

    @property
    def is_write(self) -> bool:
        """Whether it changes something."""
        return self.scope is not Scope.READ


@dataclass(frozen=True)
class Text:
    """An answer that is no JSON."""

    body: bytes
    media_type: str


@dataclass(frozen=True)
class Unready:
    """An answer with status 503."""

    body: msgspec.Struct


_encode = msgspec.json.Encoder().encode


def reply(answer: object) -> web.Response:
    """Return the response that carries *answer*."""
    match answer:
        case Text():
            media_type, _, charset = answer.media_type.partition("; charset=")
            response = web.Response(body=answer.body, content_type=media_type)
            if charset:
                response.headers["Content-Type"] = answer.media_type
            return response
        case Unready():
            return web.Response(body=_encode(answer.body), status=503, content_type=JSON)
        case _:
            return web.Response(body=_encode(answer), content_type=JSON)


def problem(status: int, detail: str, headers: Mapping[str, str] = {}) -> web.Response:
    """Return the response that says what is wrong."""
    title = TITLES[status]
    body = Problem(
        type="urn:kvstore:" + title.lower().replace(" ", "-"),
        title=title,
        status=status,
        detail=detail,
    )
    return web.Response(
        body=_encode(body), status=status, content_type=PROBLEM, headers=dict(headers)
    )


def whole(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """Return a whole number from 0 to *most*; raises `Refusal`."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20) or int(text) > most:
        raise Refusal(400, f"{name} must be a whole number from 0 to {most}")
    return int(text)

"""The OpenAPI 3.1 document, made from the routes and the structs that they really use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from kvstore import __version__
from kvstore.admin.auth import Scope
from kvstore.admin.routes import JSON, PROBLEM, TITLES, Route
from kvstore.admin.schema import Problem

_REFERENCE: Final = "#/components/schemas/{name}"
# What any request may meet: wrong parameters, no token, no scope, a wrong host, haste, a bug.
_ALWAYS: Final = (400, 401, 403, 421, 429, 500)
_WITH_BODY: Final = (408, 413, 415)

Document = dict[str, Any]


def document(routes: Sequence[Route], *, needs_token: bool) -> Document:
    """Return the document; *needs_token* says whether reads need one, too."""
    structs = _structs(routes)
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    of = dict(zip(structs, schemas, strict=True))
    paths: Document = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(
            route, of, needs_token=needs_token or route.is_write
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvstore admin API",
            "version": __version__,
            "description": "Status, metrics, explanations and a few switches of one daemon.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _structs(routes: Iterable[Route]) -> list[type[msgspec.Struct]]:
    found: dict[type[msgspec.Struct], None] = {Problem: None}
    for route in routes:
        if route.asked is not None:
            found[route.asked] = None
        if not isinstance(route.answer, str):
            found[route.answer] = None
    return list(found)


def _operation(
    route: Route, of: dict[type[msgspec.Struct], Document], *, needs_token: bool
) -> Document:
    operation: Document = {
        "operationId": route.name,
        "summary": route.text,
        "parameters": [
            {
                "name": parameter.name,
                "in": parameter.place,
                "required": parameter.place == "path",
                "description": parameter.text,
                "schema": dict(parameter.schema),
            }
            for parameter in route.parameters
        ],
        "responses": _responses(route, of),
    }
    if needs_token:
        operation["security"] = [{"token": []}]
        operation["x-scope"] = Scope(route.scope).name.lower()
    if route.asked is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": of[route.asked]}},
        }
    return operation


def _responses(route: Route, of: dict[type[msgspec.Struct], Document]) -> Document:
    if isinstance(route.answer, str):
        kind = route.answer.partition(";")[0]
        shape = "object" if kind == JSON else "string"
        content: Document = {kind: {"schema": {"type": shape}}}
    else:
        content = {JSON: {"schema": of[route.answer]}}
    responses: Document = {"200": {"description": "Done", "content": content}}
    if route.unready:
        responses["503"] = {"description": TITLES[503], "content": content}
    statuses = {*_ALWAYS, *route.problems, *(_WITH_BODY if route.asked else ())}
    for status in sorted(statuses):
        responses[str(status)] = {
            "description": TITLES[status],
            "content": {PROBLEM: {"schema": of[Problem]}},
        }
    return responses


def served_path(path: str) -> str:
    """Return *path*, which is written as OpenAPI does, as the router takes it."""
    return re.sub(r"\{(\w+)\}", r"{\1:[^/]*}", path)

"""The JSON schema of a configuration file, for editors."""

from __future__ import annotations

import msgspec

from kvstore.config import NAMED_TABLES, Config, named_settings, plain, settings
from kvstore.settings import Schema


def json_schema() -> Schema:
    """Return the JSON schema of a configuration file."""
    root: Schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kvstore configuration",
        **_table_schema(Config),
    }
    return root


def _table_schema(table: type[msgspec.Struct], prefix: str = "") -> Schema:
    properties: dict[str, Schema] = {}
    defaults = plain(Config())
    for field in msgspec.structs.fields(table):
        path = f"{prefix}{field.encode_name}"
        setting = settings().get(path)
        if path in NAMED_TABLES:
            properties[path] = {"type": "object", "additionalProperties": _named_schema(path)}
            continue
        if setting is None:
            properties[field.encode_name] = _table_schema(field.type, f"{path}.")
            continue
        properties[field.encode_name] = {
            "description": f"Must be {setting.kind.allowed}.",
            **setting.kind.schema(),
        }
        if path != "server.socket":  # its default depends on the user
            properties[field.encode_name]["default"] = defaults[path]
    return {
        "type": "object",
        "description": (table.__doc__ or "").strip(),
        "additionalProperties": False,
        "properties": properties,
    }


def _named_schema(table: str) -> Schema:
    return {
        "type": "object",
        "description": (NAMED_TABLES[table].__doc__ or "").strip(),
        "additionalProperties": False,
        "properties": {
            name: {"description": f"Must be {setting.kind.allowed}.", **setting.kind.schema()}
            for name, setting in named_settings(table).items()
        },
    }

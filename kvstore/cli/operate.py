"""Commands over the admin API: `explain`, `events`, `chunks` and `tenants`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvstore.cli.admin_client import AdminClient

OK: Final = 0
FAILED: Final = 1
_FOLLOW_SECONDS: Final = 0.5
_DIGITS: Final = 12
_ACTIONS: Final = ("pin", "unpin", "evict", "verify")

_Commands = argparse._SubParsersAction  # noqa: SLF001  # argparse gives it no public name
Command = Callable[[argparse.Namespace], int]
Shown = dict[str, Any]


def add_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    """Add the four commands to *commands*."""
    explain = _add(commands, "explain", "say why a prefix was a miss, chunk by chunk", _explain)
    asked = explain.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tokens", metavar="FILE", help="token ids in JSON or one a word; - reads")
    asked.add_argument("--digests", nargs="+", metavar="DIGEST", help="in hex, in order")
    asked.add_argument("--request", metavar="NAME", help="the name of a look-up")
    explain.add_argument("--namespace", metavar="HEX", help="default: the one that knows most")
    explain.add_argument("--scope", metavar="HEX", help="the parent of the first chunk")
    explain.add_argument("--recompute-us", type=int, default=0, metavar="N", help="of one chunk")
    events = _add(commands, "events", "show what happened lately", _events)
    events.add_argument("--follow", "-f", action="store_true", help="go on until interrupted")
    events.add_argument("--limit", type=int, default=50, metavar="N")
    chunks = _add(commands, "chunks", "list, pin, evict or verify chunks", _chunks)
    chunks.add_argument("action", nargs="?", choices=("list", *_ACTIONS), default="list")
    chunks.add_argument("digests", nargs="*", metavar="DIGEST", help="in hex")
    chunks.add_argument("--namespace", metavar="HEX")
    chunks.add_argument("--tier", choices=("device", "host", "disk", "redis", "peer"))
    chunks.add_argument("--limit", type=int, default=50, metavar="N")
    chunks.add_argument("--hard", action="store_true", help="pin: they never leave")
    tenants = _add(commands, "tenants", "show tenants, or change a quota", _tenants)
    tenants.add_argument("tenant", nargs="?", help="whose quota is to change, until a restart")
    tenants.add_argument("--tier", choices=("host", "disk"), default="host")
    tenants.add_argument("--quota", metavar="SIZE", help="such as 8GiB; 0 for none")
    tenants.add_argument("--floor", metavar="SIZE")


def _add(
    commands: _Commands[argparse.ArgumentParser], name: str, text: str, command: Command
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=command)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with settings")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE"
    )
    parser.add_argument("--admin", metavar="URL", help="default: where admin.listen says")
    parser.add_argument("--token-file", type=Path, help="default: what admin.token_file says")
    parser.add_argument("--ca-file", type=Path, help="what the daemon's certificate is judged by")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    return parser


def _client(arguments: argparse.Namespace) -> AdminClient:
    from kvstore.cli.admin_client import AdminClient
    from kvstore.config import load

    config = load(arguments.config, os.environ, arguments.overrides).admin
    return AdminClient.of(config, arguments.admin, arguments.token_file, arguments.ca_file)


# --- explain -----------------------------------------------------------------------------


def _explain(arguments: argparse.Namespace) -> int:
    asked: Shown = {"recompute_us": arguments.recompute_us}
    if arguments.tokens is not None:
        asked["token_ids"] = _tokens(arguments.tokens)
    elif arguments.digests:
        asked["digests"] = arguments.digests
    else:
        asked["request"] = arguments.request
    asked |= {
        name: value
        for name, value in (("namespace", arguments.namespace), ("scope", arguments.scope))
        if value is not None
    }
    explained = _client(arguments).ask("POST", "/v1/prefixes/explain", asked)
    _print(arguments, explained, _render_explanation)
    return OK


def _tokens(name: str) -> list[int]:
    from kvstore.errors import RequestError

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.split()
        return [int(token) for token in found]
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{name}: no token ids: {error}") from None


def _render_explanation(shown: Shown) -> list[str]:
    from kvstore.cli.tables import align

    asked, hits = shown["chunks_asked"], shown["hits"]
    head = [f"{hits} of {asked} chunks are a hit in namespace {shown['namespace'] or '(none)'}"]
    if shown["looked_up_hits"] is not None:
        head.append(f"{shown['looked_up_hits']} were, when it was looked up")
    head.append(shown["text"])
    rows = [("chunk", "digest", "cause", "tiers", "when", "")]
    rows += [
        (
            str(chunk["number"]),
            chunk["digest"][:_DIGITS],
            chunk["cause"],
            ",".join(chunk["tiers"]) or "-",
            _moment(chunk["at"]) if chunk["at"] else "-",
            _why(chunk),
        )
        for chunk in shown["chunks"]
    ]
    lines = [*head, "", *align(rows, right={0})]
    if shown["history"]["overwritten"]:
        lines += ["", f"{shown['history']['overwritten']:,} older fates are forgotten"]
    return lines


def _why(chunk: Shown) -> str:
    fields = [f"{one['field']}: {one['here']} / {one['there']}" for one in chunk["differences"]]
    return " ".join([chunk["text"], *fields])


# --- events ------------------------------------------------------------------------------


def _events(arguments: argparse.Namespace) -> int:
    client, after = _client(arguments), 0
    while True:
        page = client.ask("GET", f"/v1/events?limit=500&after={after}")
        is_first, after = after == 0, page["next"]
        events = page["events"][-arguments.limit :] if is_first else page["events"]
        for event in events:
            print(json.dumps(event) if arguments.output == "json" else _event_line(event))
        sys.stdout.flush()
        if not arguments.follow and len(page["events"]) < 500:
            return OK
        if arguments.follow:
            time.sleep(_FOLLOW_SECONDS)


def _event_line(event: Shown) -> str:
    from kvstore.cli.tables import align

    fields = " ".join(f"{name}={value}" for name, value in event["fields"].items())
    times = f" (x{event['count']})" if event["count"] > 1 else ""
    words = (_moment(event["at"]), event["severity"].upper(), event["source"], event["message"])
    return align([(" ".join(words) + times, fields)])[0]


# --- chunks and tenants ------------------------------------------------------------------


def _chunks(arguments: argparse.Namespace) -> int:
    client = _client(arguments)
    if arguments.action == "list":
        return _list_chunks(client, arguments)
    from kvstore.errors import RequestError

    if not arguments.namespace or not arguments.digests:
        raise RequestError(f"chunks {arguments.action} needs --namespace and digests")
    asked: Shown = {"namespace": arguments.namespace, "digests": arguments.digests}
    if arguments.action == "pin":
        asked["hard"] = arguments.hard
    done = client.ask("POST", f"/v1/chunks/{arguments.action}", asked)
    _print(arguments, done, _render_done)
    damaged = [one for one in done.get("chunks", ()) if _is_damaged(one)] if _has_list(done) else []
    return FAILED if damaged or done.get("busy") else OK


def _has_list(done: Shown) -> bool:
    return isinstance(done["chunks"], list)


def _is_damaged(one: Shown) -> bool:
    return one["verdict"] in {"damaged", "busy"}


def _render_done(done: Shown) -> list[str]:
    from kvstore.cli.tables import align

    if _has_list(done):
        return align([(one["digest"][:_DIGITS], one["verdict"]) for one in done["chunks"]])
    return [f"{done['chunks']} chunks, {done['busy']} busy ones were left as they are"]


def _list_chunks(client: AdminClient, arguments: argparse.Namespace) -> int:
    found: list[Shown] = []
    cursor: int | None = 0
    filters = "".join(
        f"&{name}={value}"
        for name, value in (("namespace", arguments.namespace), ("tier", arguments.tier))
        if value
    )
    while cursor is not None and len(found) < arguments.limit:
        most = min(arguments.limit - len(found), 500)
        page = client.ask("GET", f"/v1/chunks?limit={most}&cursor={cursor}{filters}")
        found += page["chunks"]
        cursor = page["next"]
    _print(arguments, {"chunks": found}, _render_chunks)
    return OK


def _render_chunks(shown: Shown) -> list[str]:
    from kvstore.cli.tables import align
    from kvstore.units import round_size

    rows = [("digest", "namespace", "tiers", "size", "leases", "pin", "tenant")]
    rows += [
        (
            chunk["digest"],
            chunk["namespace"][:_DIGITS],
            ",".join(chunk["tiers"]),
            round_size(sum(shard["size_bytes"] for shard in chunk["shards"])),
            str(chunk["leases"]),
            chunk["pin"],
            chunk["tenant"] or "-",
        )
        for chunk in shown["chunks"]
    ]
    return align(rows, right={3, 4})


def _tenants(arguments: argparse.Namespace) -> int:
    from kvstore.units import parse_size

    client = _client(arguments)
    if arguments.tenant is None:
        shown = client.ask("GET", "/v1/tenants")
    else:
        asked: Shown = {"tier": arguments.tier}
        for name in ("quota", "floor"):
            if getattr(arguments, name) is not None:
                asked[f"{name}_bytes"] = _size(parse_size, getattr(arguments, name))
        shown = client.ask("PUT", f"/v1/tenants/{arguments.tenant}/quota", asked)
    _print(arguments, shown, _render_tenants)
    return OK


def _size(parse: Callable[[str], int], text: str) -> int:
    from kvstore.errors import RequestError

    try:
        return parse(text)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _render_tenants(shown: Shown) -> list[str]:
    from kvstore.cli.tables import align
    from kvstore.units import round_size

    rows = [("tenant", "tier", "chunks", "used", "quota", "floor")]
    rows += [
        (
            one["tenant"] or "(none)",
            one["tier"],
            f"{one['chunks']:,}",
            round_size(one["used_bytes"]),
            round_size(one["quota_bytes"]),
            round_size(one["floor_bytes"]),
        )
        for one in shown["tenants"]
    ]
    return align(rows, right={2, 3, 4, 5})


def _print(
    arguments: argparse.Namespace, shown: Shown, render: Callable[[Shown], list[str]]
) -> None:
    if arguments.output == "json":
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join(render(shown)))


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, tz=UTC).isoformat(sep=" ", timespec="seconds")[:19]

"""The `kvstore` command: arguments in, exit status out.

Thin, and quick to start: whatever is heavy is imported by the command that needs it. Data goes
to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore import __version__
from kvstore.errors import (
    ConfigError,
    DeadlineError,
    KVStoreError,
    RefusedError,
    UnavailableError,
    VersionError,
)

if TYPE_CHECKING:
    from kvstore.config import TracedConfig

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
REFUSED: Final = 4
INTERRUPTED: Final = 130

_STATUSES: Final = {
    ConfigError: USAGE,
    UnavailableError: UNREACHABLE,
    DeadlineError: UNREACHABLE,
    RefusedError: REFUSED,
    VersionError: REFUSED,
}
_BENCHES: Final = {
    "transfer": "store and retrieve through the daemon, against the speed of memory",
    "lookup": "look-ups through the daemon, against a bare echo",
}
_DAEMON_TIMEOUT_SECONDS: Final = 5.0

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; wrong usage raises `SystemExit(2)`."""
    words = list(sys.argv[1:] if argv is None else argv)
    status: int
    try:
        # A benchmark reads its own arguments.
        if len(words) > 1 and words[0] == "bench" and words[1] in _BENCHES:
            status = _bench(words[1], words[2:])
        else:
            arguments = _parser().parse_args(words)
            status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except KVStoreError as error:
        for line in str(error).splitlines():
            print(f"kvstore: {line}", file=sys.stderr)
        return _STATUSES.get(type(error), FAILED)
    except BrokenPipeError:
        # The reader has seen enough. The interpreter must not find the pipe when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


# --- commands ----------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    from kvstore import app, logs

    config = _load(arguments).config
    logs.configure(config.log.level, config.log.format)
    return app.run(config)


def _status(arguments: argparse.Namespace) -> int:
    import msgspec

    from kvstore.cli.status import render
    from kvstore.client.sync import Client

    path = arguments.socket or _load(arguments).config.server.socket
    with Client.connect(path, timeout_seconds=_DAEMON_TIMEOUT_SECONDS) as client:
        stats = client.stats()
    if arguments.output == "json":
        _print_json(msgspec.to_builtins(stats))
    else:
        print(render(stats))
    return OK


def _doctor(arguments: argparse.Namespace) -> int:
    from kvstore import doctor

    config = _load(arguments).config
    findings = doctor.examine(config, arguments.socket or config.server.socket)
    if arguments.output == "json":
        _print_json([finding._asdict() for finding in findings])
    else:
        print(doctor.render(findings))
    return FAILED if any(finding.verdict == "fail" for finding in findings) else OK


def _config_show(arguments: argparse.Namespace) -> int:
    from kvstore.cli.tables import align
    from kvstore.config import plain

    traced = _load(arguments)
    # What is printed is a configuration file; JSON's texts, numbers and lists are TOML's too.
    rows = [
        (f"{path} = {json.dumps(value)}", f"# {traced.origins[path]}")
        for path, value in plain(traced.config).items()
    ]
    lines = align(rows) if arguments.origin else [setting for setting, _ in rows]
    print("\n".join(lines))
    return OK


def _config_check(arguments: argparse.Namespace) -> int:
    from kvstore.config import load

    try:
        load(arguments.file, {}, ())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return FAILED
    print(f"{arguments.file}: ok")
    return OK


def _config_schema(_: argparse.Namespace) -> int:
    from kvstore.config import json_schema

    _print_json(json_schema())
    return OK


def _connectors_vllm(arguments: argparse.Namespace) -> int:
    from kvstore.connectors.vllm_launch import transfer_config

    config = transfer_config(arguments.socket)
    print(config if arguments.print else f"vllm serve MODEL --kv-transfer-config '{config}'")
    return OK


def _connectors_sglang(arguments: argparse.Namespace) -> int:
    from kvstore.connectors.sglang_launch import launch_command, launch_words

    print(launch_words(arguments.socket) if arguments.print else launch_command(arguments.socket))
    return OK


def _version(_: argparse.Namespace) -> int:
    print(f"kvstore {__version__}")
    return OK


def _bench(name: str, words: list[str]) -> int:
    run: Callable[[list[str]], int] = importlib.import_module(f"kvstore.bench.{name}").main
    return run(words)


def _load(arguments: argparse.Namespace) -> TracedConfig:
    from kvstore.config import load_traced

    return load_traced(arguments.config, os.environ, arguments.overrides)


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2))


# --- arguments ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvstore",
        description="A KV cache layer daemon for LLM inference.",
        epilog="Exit status: 0 ok, 1 failed, 2 wrong usage or configuration, "
        "3 daemon unreachable, 4 refused.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = _add(commands, "serve", "run the daemon in the foreground", _serve)
    _add_config_options(serve)
    status = _add(commands, "status", "show what the daemon holds and has done", _status)
    _add_config_options(status)
    _add_daemon_options(status)
    doctor = _add(commands, "doctor", "check this machine, and say what to fix", _doctor)
    _add_config_options(doctor)
    _add_daemon_options(doctor)
    _add_config_commands(commands)
    _add_bench_commands(commands)
    _add_connector_commands(commands)
    _add(commands, "version", "print the version", _version)
    return parser


_Commands = argparse._SubParsersAction  # noqa: SLF001  # argparse gives it no public name


def _add(
    commands: _Commands[argparse.ArgumentParser], name: str, text: str, command: Command
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=command)
    return parser


def _add_config_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    text = "show, check or describe the configuration"
    group = commands.add_parser("config", help=text, description=text, allow_abbrev=False)
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = _add(actions, "show", "print every setting, as a configuration file", _config_show)
    _add_config_options(show)
    show.add_argument("--origin", action="store_true", help="say where each value comes from")
    check = _add(actions, "check", "check a configuration file", _config_check)
    check.add_argument("file", type=Path, metavar="FILE")
    _add(actions, "schema", "print the JSON schema of a configuration file", _config_schema)


def _add_bench_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    text = "measure, beside floors of the same run"
    group = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    benches = group.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, benchmark_text in _BENCHES.items():
        benches.add_parser(name, help=benchmark_text, add_help=False)


def _add_connector_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    text = "say how an engine is started so that it uses the daemon"
    group = commands.add_parser("connectors", help=text, description=text, allow_abbrev=False)
    engines = group.add_subparsers(title="engines", metavar="ENGINE", required=True)
    vllm = _add(engines, "vllm", "how vLLM is started", _connectors_vllm)
    vllm.add_argument("--print", action="store_true", help="only the value of --kv-transfer-config")
    vllm.add_argument("--socket", type=Path, help="the daemon's socket (default: the usual one)")
    sglang = _add(engines, "sglang", "how SGLang is started", _connectors_sglang)
    sglang.add_argument("--print", action="store_true", help="only the flags, for a shell")
    sglang.add_argument("--socket", type=Path, help="the daemon's socket (default: the usual one)")


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="PATH=VALUE",
        help="one setting, such as tiers.host.capacity=64GiB; may be repeated",
    )


def _add_daemon_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", type=Path, help="the daemon's socket (default: as configured)")
    parser.add_argument("--output", choices=("table", "json"), default="table")

"""The `kvstore` command: arguments in, exit status out.

Thin, and quick to start: whatever is heavy is imported by the command that needs it. Data goes
to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore import __version__
from kvstore.cli import operate
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
    from kvstore.protocol.messages import DaemonStats

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
    "gpu": "pages on a GPU to the arena and back, against plain copies",
    "codec": "what codecs do to a small model, and their speed against memcpy",
}
_DAEMON_TIMEOUT_SECONDS: Final = 5.0
_INTERVAL_MIN_SECONDS: Final = 0.1
_INTERVAL_MAX_SECONDS: Final = 3600.0
_DTYPES: Final = ("float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2")

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
    return app.run(config, reread=lambda: _load(arguments).config)


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


def _top(arguments: argparse.Namespace) -> int:
    from kvstore.cli import top
    from kvstore.client.sync import Client

    path = arguments.socket or _load(arguments).config.server.socket

    def ask() -> DaemonStats:
        with Client.connect(path, timeout_seconds=_DAEMON_TIMEOUT_SECONDS) as client:
            return client.stats()

    ask()  # a daemon that cannot be reached from the start is an error, not a screen
    with contextlib.suppress(KeyboardInterrupt):
        top.run(ask, arguments.interval)
    return OK


def _size(arguments: argparse.Namespace) -> int:
    from kvstore.cli import size
    from kvstore.units import parse_size

    geometry = size.geometry_of(arguments.model)
    if arguments.dtype:
        geometry = geometry._replace(dtype=arguments.dtype)
    try:
        capacity_bytes = parse_size(arguments.capacity)
    except ValueError as error:
        raise ConfigError(f"--capacity {arguments.capacity}: {error}") from None
    found = size.sizes_of(
        geometry,
        chunk_tokens=arguments.chunk_tokens,
        capacity_bytes=capacity_bytes,
    )
    if arguments.output == "json":
        _print_json(found._asdict())
    else:
        print(size.render(geometry, found))
    return OK


def _trace_record(arguments: argparse.Namespace) -> int:
    from kvstore.cli import trace
    from kvstore.cli.admin_client import AdminClient

    admin = _load(arguments).config.admin
    client = AdminClient.of(admin, arguments.admin, arguments.token_file, arguments.ca_file)
    source = trace.Source(client)
    source.after(0)  # who cannot be asked leaves no file behind
    # However it is told to end: what was recorded is whole, and said.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with arguments.file.open("x", buffering=1, encoding="utf-8") as file:
            recorded = trace.record(source, file, arguments.seconds)
    except OSError as error:
        raise ConfigError(f"{arguments.file}: cannot be written: {error.strerror}") from None
    print(f"{recorded.lookups:,} look-ups, {recorded.chunks:,} chunks, {recorded.lost:,} lost")
    return OK


def _trace_replay(arguments: argparse.Namespace) -> int:
    from kvstore.cli import trace
    from kvstore.client.sync import Client

    path = arguments.socket or _load(arguments).config.server.socket
    Client.connect(path, timeout_seconds=_DAEMON_TIMEOUT_SECONDS).close()
    print(trace.render(trace.replay(trace.read(arguments.file), path, arguments.speed)))
    return OK


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(_parser(), arguments.shell))
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
    from kvstore.config_schema import json_schema

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
    _add_top_command(commands)
    _add_size_command(commands)
    _add_trace_commands(commands)
    operate.add_commands(commands)
    doctor = _add(commands, "doctor", "check this machine, and say what to fix", _doctor)
    _add_config_options(doctor)
    _add_daemon_options(doctor)
    _add_config_commands(commands)
    _add_bench_commands(commands)
    _add_connector_commands(commands)
    completion = _add(commands, "completion", "print what a shell completes by", _completion)
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    _add(commands, "version", "print the version", _version)
    return parser


_Commands = argparse._SubParsersAction  # noqa: SLF001  # argparse gives it no public name


def _add(
    commands: _Commands[argparse.ArgumentParser], name: str, text: str, command: Command
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=command)
    return parser


def _add_top_command(commands: _Commands[argparse.ArgumentParser]) -> None:
    top = _add(commands, "top", "watch what the daemon does, until q is pressed", _top)
    _add_config_options(top)
    top.add_argument("--socket", type=Path, help="the daemon's socket (default: as configured)")
    top.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="from look to look"
    )


def _add_size_command(commands: _Commands[argparse.ArgumentParser]) -> None:
    size = _add(commands, "size", "say what the KV of a model takes", _size)
    size.add_argument("model", help="such as llama-3.1-8b, or the path of a config.json")
    size.add_argument("--dtype", choices=_DTYPES, help="of the KV (default: the model's)")
    size.add_argument("--chunk-tokens", type=int, default=256, metavar="N")
    size.add_argument("--capacity", default="64GiB", metavar="SIZE", help="default: 64GiB")
    size.add_argument("--output", choices=("table", "json"), default="table")


def _add_trace_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    text = "record what engines look up, and ask another daemon the same"
    group = commands.add_parser("trace", help=text, description=text, allow_abbrev=False)
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    record = _add(actions, "record", "write look-ups to a file, without tokens", _trace_record)
    _add_config_options(record)
    record.add_argument("file", type=Path, metavar="FILE", help="must not exist")
    record.add_argument("--seconds", type=_seconds, help="for so long (default: until Ctrl-C)")
    record.add_argument("--admin", metavar="URL", help="the admin API (default: as configured)")
    record.add_argument("--token-file", type=Path, metavar="FILE", help="with a token for it")
    record.add_argument("--ca-file", type=Path, help="what the daemon's certificate is judged by")
    replay = _add(actions, "replay", "store and load what a trace asks for", _trace_replay)
    _add_config_options(replay)
    replay.add_argument("file", type=Path, metavar="FILE")
    replay.add_argument("--socket", type=Path, help="the daemon's socket (default: as configured)")
    replay.add_argument(
        "--speed", type=float, default=0.0, metavar="TIMES", help="default: 0, as fast as it goes"
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not _INTERVAL_MIN_SECONDS <= seconds <= _INTERVAL_MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text} is not from {_INTERVAL_MIN_SECONDS} to {_INTERVAL_MAX_SECONDS}"
        )
    return seconds


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

"""What `kvstore bench gpu` measures of a model: time to first token, cold and loaded from a tier.

The model is a Llama made on the spot: its weights are random, its speed is a real one's. A prefix
is computed and stored once; then a prompt that begins with it is answered, by the model alone and
from what is loaded. Needs PyTorch and transformers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.gpu_pool import pool_settings, tier_of
from kvstore.bench.gpu_rig import last_words, median_seconds, wait_until
from kvstore.client.cache import PrefixCache
from kvstore.compression.policy import DEFAULT_BOUNDS
from kvstore.compression.shapes import CodecId
from kvstore.connectors.codecs import read_codec
from kvstore.connectors.huggingface import PrefixReuse
from kvstore.connectors.huggingface_device import OpenDevice, open_cuda
from kvstore.errors import InternalError, UnavailableError
from kvstore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.bench.report import Figures
    from kvstore.connectors.huggingface import PrefixedCache
    from kvstore.protocol.manifest import Manifest

_SEED: Final = 7
_ELEMENT_BYTES: Final = 2
"""All of it is bfloat16."""
_TIMEOUT_SECONDS: Final = 10.0
_NOT_COLD: Final = "not measured cold"
_BOUNDS: Final = {"int8kv": DEFAULT_BOUNDS[CodecId.INT8KV]}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama, the prefixes that are stored, in tokens, and how many tokens follow them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    chunk_tokens: int
    prefixes: tuple[int, ...]
    tail_tokens: int = 32

    def kv_bytes(self, tokens: int) -> int:
        """Return the size of the KV of so many *tokens*."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _ELEMENT_BYTES * tokens

    def peak_bytes(self, tokens: int) -> int:
        """Return about what a prompt takes of the device, with what it is compared to."""
        passing = (4 * self.intermediate + 8 * self.hidden) * _ELEMENT_BYTES * tokens
        return 4 * self.kv_bytes(tokens) + passing


ABOUT_1B: Final = ModelShape(
    "Llama of 1.2 B, bfloat16",
    layers=16,
    hidden=2048,
    intermediate=8192,
    heads=32,
    kv_heads=8,
    head_dim=64,
    vocabulary=128_256,
    chunk_tokens=256,
    prefixes=(4096, 16_384, 65_536),
)
TINY: Final = ModelShape(
    "tiny Llama, bfloat16",
    layers=2,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=320,
    chunk_tokens=16,
    prefixes=(32, 64),
    tail_tokens=5,
)


class Way(NamedTuple):
    """Where chunks are loaded from, and how they are stored. A pool has them raw alone."""

    tier: str
    codec: str

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return f"{self.tier} tier, {self.codec}"


WAYS: Final = (Way("host", "raw"), Way("device", "raw"), Way("host", "int8kv"))


def measure_cuda(
    index: int, shape: ModelShape, *, rounds: int, seconds: float
) -> Iterator[Figures]:
    """Measure on GPU number *index*."""
    if not torch.cuda.is_available():
        yield {"what": "not measured", "outcome": "this PyTorch has no CUDA device"}
        return
    place = torch.device("cuda", index)
    yield from measure_model(shape, place, open_cuda, str(index), rounds=rounds, seconds=seconds)


def measure_model(
    shape: ModelShape,
    place: torch.device,
    open_device: OpenDevice,
    gpu: str,
    *,
    rounds: int,
    seconds: float,
    ways: Sequence[Way] = WAYS,
) -> Iterator[Figures]:
    """Yield rows by prefix: cold, then each way. What was left out says why.

    *gpu* is where the daemon has its pool. Nothing is begun that would take longer than what is
    left of *seconds*, as far as can be foreseen. Raises `InternalError` behind all rows when what
    was loaded is not what was stored, or differs by more than its codec may: a row says where.
    """
    ends_at = time.monotonic() + seconds
    try:
        bench = _ModelBench(shape, place, open_device, rounds, ends_at)
    except torch.OutOfMemoryError as error:
        yield {"what": "not measured", "outcome": last_words(error)}
        return
    rows = [bench.cold(tokens) for tokens in shape.prefixes]
    for way in ways:
        rows += bench.rows(way, gpu)
    yield from sorted(rows, key=lambda row: int(row["tokens"]))
    if bench.wrong:
        raise InternalError(bench.wrong[0])


class _ModelBench:
    def __init__(
        self,
        shape: ModelShape,
        place: torch.device,
        open_device: OpenDevice,
        rounds: int,
        ends_at: float,
    ) -> None:
        self._shape = shape
        self._place = place
        self._open_device = open_device
        self._rounds = rounds
        self._ends_at = ends_at
        self._model = _build(shape, place)
        self._cold_seconds: dict[int, float] = {}
        self.wrong: list[str] = []
        """What was loaded and was not what it should have been."""

    def cold(self, tokens: int) -> Figures:
        """Return the row of the model alone."""
        row: Figures = {"tokens": tokens, "what": "cold"}
        try:
            self._refuse_what_does_not_fit(tokens)
            prompt = self._prompt(tokens)

            def once() -> None:
                self._first_token(prompt, DynamicCache(config=self._model.config))

            seconds = median_seconds(self._rounds, once)
        except (UnavailableError, torch.OutOfMemoryError) as error:
            return row | {"outcome": last_words(error)}
        self._cold_seconds[tokens] = seconds
        return row | {"first_token_ms": seconds * 1e3, "faster": 1.0}

    def rows(self, way: Way, gpu: str) -> list[Figures]:
        """Return a row for every prefix."""
        prefixes = self._shape.prefixes
        if not self._cold_seconds:
            return [self._row(way, tokens, _NOT_COLD) for tokens in prefixes]
        # All prefixes stay, and there is room for the one that is being stored.
        room = 5 * sum(map(self._shape.kv_bytes, prefixes)) // 4 + 64 * MIB
        more = pool_settings(gpu, room // 2) if way.tier == "device" else None
        _free_bytes(self._place)
        try:
            with (
                BenchDaemon(room, checksums=True, prefault=True, more=more) as daemon,
                self._open(way, daemon) as reuse,
            ):
                return list(self._rows(way, reuse, daemon))
        except UnavailableError as error:
            return [self._row(way, tokens, last_words(error)) for tokens in prefixes]

    def _rows(self, way: Way, prefixes: PrefixReuse, daemon: BenchDaemon) -> Iterator[Figures]:
        stored = 0
        for tokens in self._shape.prefixes:
            try:
                if tokens not in self._cold_seconds:
                    raise UnavailableError(_NOT_COLD)
                self._refuse_what_does_not_fit(tokens)
                stored += tokens // self._shape.chunk_tokens
                yield self._row(way, tokens) | self._loaded(way, tokens, prefixes, daemon, stored)
            except (UnavailableError, torch.OutOfMemoryError) as error:
                yield self._row(way, tokens, last_words(error))
            except InternalError as error:
                self.wrong.append(str(error))
                yield self._row(way, tokens, last_words(error))

    def _loaded(
        self, way: Way, tokens: int, prefixes: PrefixReuse, daemon: BenchDaemon, stored: int
    ) -> Figures:
        """Store a prefix, compare what is loaded of it, and time it; *stored* chunks are then."""
        prompt = self._prompt(tokens)
        with prefixes.begin(prompt[:, :tokens]) as own:
            self._first_token(prompt[:, :tokens], own)
        wait_until(lambda: tier_of(daemon, "host").chunks >= stored, "the prefix in the host tier")
        before, moved = _taken_from(daemon, way), _moved_by_device(prefixes)
        calls = 0

        def once() -> tuple[PrefixedCache, torch.Tensor]:
            nonlocal calls
            calls += 1
            past = prefixes.begin(prompt)
            logits = self._first_token(prompt, past)
            if past.report.reused_tokens != tokens:
                raise UnavailableError(f"{past.report.reused_tokens} of {tokens} tokens were found")
            return past, logits

        past, found = once()
        outcome = compare(way, tokens, own, past)
        difference = (self._first_token(prompt, own) - found).abs().max().item()
        del own, past
        _warm_up(prefixes, once)
        seconds = median_seconds(self._rounds, once)
        chunks = calls * tokens // self._shape.chunk_tokens
        taken = _taken_from(daemon, way) - before
        if way.tier == "device" and taken != chunks:
            raise UnavailableError(f"{taken} of {chunks} chunks came out of the pool")
        by_device = _moved_by_device(prefixes) - moved
        return {
            "first_token_ms": seconds * 1e3,
            "faster": self._cold_seconds[tokens] / seconds,
            "moved_by": "device" if by_device == chunks else "torch",
            "logits_off": float(difference),
            "outcome": outcome,
        }

    def _first_token(self, prompt: torch.Tensor, past: DynamicCache) -> torch.Tensor:
        """Compute what *past* lacks of *prompt*; return the logits of the token that comes next.

        The choice of the token ends on the host: all of it has been done then.
        """
        with torch.inference_mode():
            rest = prompt[:, past.get_seq_length() :].to(self._place)
            logits = self._model(rest, past_key_values=past, logits_to_keep=1).logits[0, -1]
            logits.argmax().item()
        return logits

    def _prompt(self, tokens: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(_SEED + tokens)
        shape = (1, tokens + self._shape.tail_tokens)
        return torch.randint(self._shape.vocabulary, shape, generator=rng)

    def _refuse_what_does_not_fit(self, tokens: int) -> None:
        """Raise `UnavailableError` when there is no memory for it, or no time."""
        needed = self._shape.peak_bytes(tokens)
        free = _free_bytes(self._place)
        if free is not None and needed > free:
            raise UnavailableError(
                f"takes {needed // MIB} MiB of the device, and {free // MIB} MiB are free"
            )
        # A stored prefix costs what it takes to compute it twice, and loads; attention grows by
        # the square of the prompt.
        known = self._cold_seconds
        longest = max(known, default=0)
        one = known.get(tokens) or known.get(longest, 0.0) * (tokens / max(longest, 1)) ** 2
        needed_seconds, left = one * (self._rounds + 3), max(0.0, self._ends_at - time.monotonic())
        if needed_seconds >= left:
            raise UnavailableError(f"takes about {needed_seconds:.0f} s, and {left:.0f} s are left")

    def _open(self, way: Way, daemon: BenchDaemon) -> PrefixReuse:
        policy = read_codec(way.codec)

        def connect(manifest: Manifest) -> PrefixCache:
            cache = PrefixCache(
                manifest, socket=daemon.socket, timeout_seconds=_TIMEOUT_SECONDS, policy=policy
            )
            wait_until(lambda: cache.is_connected, "a connection to the daemon")
            return cache

        return PrefixReuse(
            self._model,
            chunk_tokens=self._shape.chunk_tokens,
            revision="bench",
            codec=policy,
            open_cache=connect,
            open_device=self._open_device,
        )

    def _row(self, way: Way, tokens: int, outcome: str = "") -> Figures:
        row: Figures = {"tokens": tokens, "what": way.name}
        return row | {"outcome": outcome} if outcome else row


def compare(way: Way, tokens: int, own: PrefixedCache, past: PrefixedCache) -> str:
    """Say how what was loaded differs from what was stored; raises `InternalError`."""
    worst = 0.0
    for mine, theirs in zip(own.layers, past.layers, strict=True):
        for side in ("keys", "values"):
            first, second = (getattr(one, side)[:, :, :tokens] for one in (mine, theirs))
            if way.codec == "raw" and not torch.equal(first, second):
                raise InternalError(f"{side} loaded from the {way.name} are not what they were")
            if way.codec != "raw":
                worst = max(worst, _relative_error(first, second))
    if way.codec == "raw":
        return "KV equal"
    bound = _BOUNDS[way.codec]
    if not worst <= bound:
        raise InternalError(f"KV of {way.name} is off by {worst:.4f}, and {bound} is allowed")
    return f"KV off by {worst:.4f}, {bound} allowed"


def _build(shape: ModelShape, place: torch.device) -> Any:  # noqa: ANN401  # transformers'
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2 * max(shape.prefixes),
        tie_word_embeddings=True,
    )
    torch.manual_seed(_SEED)
    with place:
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _warm_up(prefixes: PrefixReuse, once: Callable[[], object]) -> None:
    """Load until the device reaches the arena by itself, or will not."""

    def is_warm() -> bool:
        before = prefixes.device_counters
        once()
        now = prefixes.device_counters
        return now.get("registrations_failed", 0) > 0 or (
            now.get("bounced_chunks") == before.get("bounced_chunks")
        )

    wait_until(is_warm, "the registration of the arena")


def _free_bytes(place: torch.device) -> int | None:
    """Return what is free of a GPU's memory, once PyTorch keeps no more than it uses."""
    if place.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(place)[0])


def _taken_from(daemon: BenchDaemon, way: Way) -> int:
    """Return how many chunks were loaded from the pool, if there is one."""
    return tier_of(daemon, "device").counters["loaded_chunks"] if way.tier == "device" else 0


def _moved_by_device(prefixes: PrefixReuse) -> int:
    return prefixes.device_counters.get("chunks_loaded", 0)


def _relative_error(exact: torch.Tensor, found: torch.Tensor) -> float:
    difference = (exact.float() - found.float()).norm()
    return float(difference / exact.float().norm())

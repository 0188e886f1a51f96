"""Requests of LLM traffic, as they reach a KV cache: no text, only which chunks they need.

Shaped after what has been published of production traffic:

- Wang et al., "KVCache Cache in the Wild: Characterizing and Optimizing KVCache Cache at a
  Large Cloud Provider", USENIX ATC 2025: reuse is skewed (a tenth of the blocks makes three
  quarters of it), requests of a single turn that share a system prompt matter as much as
  conversations, four in five reuses of chat come within ten minutes, those of programs within
  seconds; an endless cache hits about 54 % (chat) and 62 % (programs).
- Xiang et al., "ServeGen: Workload Characterization and Generation of Large Language Model
  Serving in Production", 2025: arrivals are burstier than Poisson (Gamma), prompts are a
  log-normal body with a Pareto tail, responses are exponential.
- Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025: more than half
  of all blocks are never used again while a few are used tens of thousands of times.
- Wang et al., "BurstGPT: A Real-world Workload Dataset to Optimize LLM Serving Systems", 2024:
  bursts, and conversations beside single calls.
- Zheng et al., "LMSYS-Chat-1M", ICLR 2024, and Patel et al., "Splitwise", ISCA 2024: few turns
  in most conversations, short questions and responses of some hundred tokens.

Equal arguments give equal traces. Memory is that of the conversations under way.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from kvstore.types import Digest

CHUNK_TOKENS = 256
CONTEXT_TOKENS_MAX = 131_072
TAIL_TOKENS_MIN = 2048
TAIL_ALPHA = 1.2


class Request(NamedTuple):
    """One call of the engine: it looks up *prompt* and afterwards stores *prompt + answer*.

    Both in digests of whole chunks, one prefix. *turn* counts from 0.
    """

    time_seconds: float
    conversation: int
    turn: int
    prompt: list[Digest]
    answer: list[Digest]


@dataclass(frozen=True)
class Traffic:
    """The shape of one kind of traffic; times in seconds, lengths in tokens.

    *bursts* is the coefficient of variation of the gaps between new conversations: 1 is
    Poisson. *turns_mean* counts the turns of those *chatting* that have more than one.
    """

    conversations_per_second: float = 1.0
    bursts: float = 2.0
    # Of the conversations that begin with a shared system prompt, and how unevenly they do.
    prompted: float = 0.6
    prompts: int = 2000
    prompts_zipf: float = 1.0
    prompt_tokens_median: float = 1000.0
    prompt_tokens_sigma: float = 1.0
    chatting: float = 0.3
    turns_mean: float = 4.0
    think_seconds_median: float = 90.0
    think_seconds_sigma: float = 1.6
    question_tokens_median: float = 400.0
    question_tokens_sigma: float = 1.2
    # Of the turns that bring a document along.
    documents: float = 0.15
    answer_tokens_mean: float = 350.0
    # Of the turns that are asked again, word for word.
    repeated: float = 0.03
    tokens_per_second: float = 40.0


CHAT = Traffic()
"""People who talk: long think times, growing prefixes."""

PROGRAMS = Traffic(
    conversations_per_second=4.0,
    bursts=3.0,
    prompted=0.85,
    prompts=1000,
    prompts_zipf=1.2,
    prompt_tokens_median=2000.0,
    chatting=0.05,
    turns_mean=4.0,
    think_seconds_median=3.0,
    think_seconds_sigma=1.0,
    question_tokens_median=900.0,
    documents=0.12,
    answer_tokens_mean=120.0,
)
"""Programs that call: one turn, few and long shared prompts, at once again."""

AGENTS = Traffic(
    conversations_per_second=0.3,
    prompted=1.0,
    prompts=20,
    prompts_zipf=1.0,
    prompt_tokens_median=8000.0,
    prompt_tokens_sigma=0.6,
    chatting=0.95,
    turns_mean=18.0,
    think_seconds_median=6.0,
    think_seconds_sigma=1.2,
    question_tokens_median=700.0,
    documents=0.05,
    answer_tokens_mean=200.0,
)
"""Agents at their tools: many turns in quick succession over one long context."""

TRAFFIC = {"chat": CHAT, "programs": PROGRAMS, "agents": AGENTS}


@dataclass
class Conversation:
    """What one conversation has said so far."""

    number: int
    shared: list[Digest]
    turns_left: int
    digests: list[Digest] = field(default_factory=list)
    tokens: int = 0
    turn: int = 0

    def grow(self, tokens: int, key: int) -> list[Digest]:
        """Say *tokens* more, and return the chunks that became whole."""
        self.tokens += tokens
        missing = self.tokens // CHUNK_TOKENS - len(self.digests)
        first = len(self.digests)
        more = [digest_of(key, self.number, first + at) for at in range(missing)]
        self.digests += more
        return more


def digest_of(*numbers: int) -> Digest:
    """Return a digest that stands for *numbers*: 64 good bits, as policies look at no more."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ number) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 31) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 29
    return Digest(mixed.to_bytes(8, "little") * 4)


class Source:
    """One kind of traffic as an endless, ordered stream of requests."""

    def __init__(self, traffic: Traffic, seed: int, *, key: int = 0) -> None:
        """*key* tells its chunks apart from those of other sources of the same trace."""
        self._traffic = traffic
        self._key = key
        self._chance = np.random.default_rng((seed, key))
        self._shared = self._system_prompts()
        ranks = np.arange(1, traffic.prompts + 1, dtype=float) ** -traffic.prompts_zipf
        self._popularity = np.cumsum(ranks / ranks.sum())
        self._count = 0

    def __iter__(self) -> Iterator[Request]:
        """Yield requests in the order of their times."""
        coming: list[tuple[float, int, Conversation]] = [(self._gap(), 0, self._open())]
        while True:
            now, number, conversation = heapq.heappop(coming)
            if conversation.turn == 0 and number == conversation.number:
                following = self._open()
                heapq.heappush(coming, (now + self._gap(), following.number, following))
            request, busy_seconds = self._turn(now, conversation)
            yield request
            if self._chance.random() < self._traffic.repeated:
                yield request._replace(time_seconds=now)
            conversation.turn += 1
            conversation.turns_left -= 1
            if conversation.turns_left > 0 and conversation.tokens < CONTEXT_TOKENS_MAX:
                again = now + busy_seconds + self._think()
                heapq.heappush(coming, (again, number, conversation))

    def _open(self) -> Conversation:
        traffic, chance = self._traffic, self._chance
        shared: list[Digest] = []
        if chance.random() < traffic.prompted:
            rank = int(np.searchsorted(self._popularity, chance.random()))
            shared = self._shared[min(rank, traffic.prompts - 1)]
        turns = 1
        if chance.random() < traffic.chatting:
            turns += int(chance.geometric(1 / max(1.0, traffic.turns_mean - 1)))
        number, self._count = self._count, self._count + 1
        tokens = len(shared) * CHUNK_TOKENS
        return Conversation(number, shared, turns, list(shared), tokens)

    def _turn(self, now: float, conversation: Conversation) -> tuple[Request, float]:
        traffic, chance = self._traffic, self._chance
        asked = chance.lognormal(
            math.log(traffic.question_tokens_median), traffic.question_tokens_sigma
        )
        if chance.random() < traffic.documents:
            asked += TAIL_TOKENS_MIN * (1 + chance.pareto(TAIL_ALPHA))
        room = CONTEXT_TOKENS_MAX - conversation.tokens
        conversation.grow(max(1, min(int(asked), room)), self._key)
        prompt = list(conversation.digests)
        answered = int(chance.exponential(traffic.answer_tokens_mean)) + 1
        answer = conversation.grow(answered, self._key)
        request = Request(now, conversation.number, conversation.turn, prompt, answer)
        return request, answered / traffic.tokens_per_second

    def _system_prompts(self) -> list[list[Digest]]:
        traffic = self._traffic
        lengths = self._chance.lognormal(
            math.log(traffic.prompt_tokens_median), traffic.prompt_tokens_sigma, traffic.prompts
        )
        chunks = np.minimum(lengths, CONTEXT_TOKENS_MAX / 4).astype(int) // CHUNK_TOKENS
        return [
            [digest_of(self._key, 1, prompt, at, 7) for at in range(count)]
            for prompt, count in enumerate(chunks.tolist())
        ]

    def _gap(self) -> float:
        shape = 1 / self._traffic.bursts**2
        scale = 1 / (self._traffic.conversations_per_second * shape)
        return float(self._chance.gamma(shape, scale))

    def _think(self) -> float:
        traffic = self._traffic
        median = math.log(traffic.think_seconds_median)
        return float(self._chance.lognormal(median, traffic.think_seconds_sigma))


def trace(kinds: tuple[str, ...], count: int, seed: int = 0) -> Iterator[Request]:
    """Yield the first *count* requests of all *kinds* of traffic together, in order of time."""
    sources = [Source(TRAFFIC[kind], seed, key=list(TRAFFIC).index(kind) + 1) for kind in kinds]
    return islice(heapq.merge(*sources, key=lambda request: request.time_seconds), count)


def scan(count: int, chunks: int, *, gap_seconds: float, seed: int = 0) -> Iterator[Request]:
    """Yield *count* requests of *chunks* chunks each that nobody ever asks for again."""
    for number in range(count):
        prompt = [digest_of(seed, 2, number, at, 11) for at in range(chunks)]
        yield Request(number * gap_seconds, number, 0, prompt, [])


def faster(traffic: Traffic, factor: float) -> Traffic:
    """Return *traffic* with *factor* times as many conversations."""
    return replace(traffic, conversations_per_second=traffic.conversations_per_second * factor)

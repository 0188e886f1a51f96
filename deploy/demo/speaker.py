"""One process of the demo: it holds a conversation, and prints a JSON line for every turn.

The first process also measures what the same turns cost without kvstore, and writes down what
the second must reproduce: tokens, and logits of the first token of every answer.

What "same bits" compares. The sums inside a matrix product are taken in an order that depends
on its shape, so a prompt computed in one pass and the same prompt computed as "prefix, then
suffix" differ in their last bits, with or without kvstore. The reference is therefore the
engine alone, keeping its own cache from turn to turn: cut back to the same prefix, then given
the same suffix. With the prefix from the daemon instead, all logits must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from models import SHAPES, Shape
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from kvstore.connectors.huggingface import PrefixReuse, Report

DOCUMENT: Final = Path(__file__).parents[2] / "LICENSE"
QUESTIONS: Final = (
    "What may I do with the work?",
    "Which notices do I have to keep?",
    "Who grants which patent licence?",
)
ANSWER_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Row:
    """What one turn showed. Seconds are until the first token of the answer."""

    turn: int
    prompt_tokens: int
    reused_tokens: int
    seconds_without: float
    seconds_with: float
    bytes_stored: int
    same_tokens: bool
    same_bits: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Whole text (`[1, tokens]`), logits of the first new token (`[vocabulary]`), seconds to it."""

    text: torch.Tensor
    logits: torch.Tensor
    seconds: float


def main() -> None:
    """Hold the conversation that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["first", "second"])
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    model = shape.make()
    # The first answer of a process pays for its threads; that is no part of a turn.
    answer(model, torch.zeros((1, 64), dtype=torch.long), DynamicCache(config=model.config))
    hold = hold_first if arguments.role == "first" else hold_second
    options = {"chunk_tokens": shape.chunk_tokens, "socket": arguments.socket}
    # Patient, because both processes may share a busy machine.
    with PrefixReuse(model, timeout_seconds=1.0, **options) as prefixes:
        hold(model, shape, prefixes, arguments.reference)


def hold_first(
    model: LlamaForCausalLM, shape: Shape, prefixes: PrefixReuse, reference: Path
) -> None:
    """Measure every turn with and without kvstore, and write the reference."""
    own = DynamicCache()
    notes: dict[str, np.ndarray] = {}
    text = opening(shape)
    for turn, question in enumerate(QUESTIONS, start=1):
        prompt = ask(text, question)
        # The first long prompt of a process is slower; that must not count for kvstore.
        report, found = answer_with(model, prefixes, prompt)
        fresh = DynamicCache(config=model.config)
        without = answer(model, prompt, fresh)
        own, expected = (
            continue_own(model, own, prompt, report.reused_tokens)
            if report.reused_tokens
            else (fresh, without.logits)
        )
        show(turn, report, found, Answer(without.text, expected, without.seconds))
        # The second process will find the chunks of this turn, too.
        later = (prompt.shape[1] - 1) // shape.chunk_tokens * shape.chunk_tokens
        _, expected = continue_own(model, own, prompt, later)
        notes |= {
            f"text{turn}": without.text.numpy(),
            f"logits{turn}": expected.numpy(),
            f"seconds{turn}": np.float64(without.seconds),
        }
        text = without.text
    np.savez(reference, **notes)


def hold_second(
    model: LlamaForCausalLM, shape: Shape, prefixes: PrefixReuse, reference: Path
) -> None:
    """Hold the same conversation in a fresh process, and compare with the reference."""
    notes = np.load(reference, allow_pickle=False)
    text = opening(shape)
    for turn, question in enumerate(QUESTIONS, start=1):
        report, found = answer_with(model, prefixes, ask(text, question))
        text = torch.from_numpy(notes[f"text{turn}"])
        logits = torch.from_numpy(notes[f"logits{turn}"])
        show(turn, report, found, Answer(text, logits, float(notes[f"seconds{turn}"])))


def opening(shape: Shape) -> torch.Tensor:
    """Return the document, `[1, tokens]`."""
    return torch.tensor([list(DOCUMENT.read_bytes()[: shape.document_bytes])])


def ask(text: torch.Tensor, question: str) -> torch.Tensor:
    """Return *text* with *question* behind it."""
    return torch.cat([text, torch.tensor([list(f"\n\n{question}\n".encode())])], dim=1)


def answer_with(
    model: LlamaForCausalLM, prefixes: PrefixReuse, prompt: torch.Tensor
) -> tuple[Report, Answer]:
    """Answer *prompt* with kvstore. Looking up and loading count towards the first token."""
    start = time.perf_counter()
    with prefixes.begin(prompt) as past:
        found = answer(model, prompt, past, start=start)
    return past.report, found


def answer(
    model: LlamaForCausalLM, prompt: torch.Tensor, past: DynamicCache, *, start: float | None = None
) -> Answer:
    """Let *model* answer *prompt*, after what *past* holds of it."""
    clock = FirstToken(time.perf_counter() if start is None else start)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=past,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answer(output.sequences, output.logits[0][0], clock.seconds)


def continue_own(
    model: LlamaForCausalLM, own: DynamicCache, prompt: torch.Tensor, prefix: int
) -> tuple[DynamicCache, torch.Tensor]:
    """Continue the engine's *own* cache after its first *prefix* tokens, without kvstore.

    Returns the new cache and the logits behind *prompt*; *own* stays as it was.
    """
    past = DynamicCache(config=model.config)
    for index, layer in enumerate(own.layers):
        past.update(layer.keys[:, :, :prefix], layer.values[:, :, :prefix], index)
    with torch.inference_mode():
        logits = model(prompt[:, prefix:], past_key_values=past, logits_to_keep=1).logits
    return past, logits[0, -1]


def show(turn: int, report: Report, found: Answer, expected: Answer) -> None:
    """Print what a turn showed, with kvstore and as it is *expected* without."""
    row = Row(
        turn=turn,
        prompt_tokens=report.prompt_tokens,
        reused_tokens=report.reused_tokens,
        seconds_without=expected.seconds,
        seconds_with=found.seconds,
        bytes_stored=report.bytes_stored,
        same_tokens=torch.equal(found.text, expected.text),
        same_bits=torch.equal(found.logits, expected.logits),
    )
    print(json.dumps(asdict(row)), flush=True)


class FirstToken(BaseStreamer):
    """Takes the time of the first token; the call before that is the prompt."""

    def __init__(self, start: float) -> None:
        self.seconds = 0.0
        self._start = start
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Count what `generate` has got so far."""
        self._calls += 1
        if self._calls == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Nothing is kept until the end."""


if __name__ == "__main__":
    main()

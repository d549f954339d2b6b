"""`lmoe generate`: continue prompts with the newest checkpoint of a run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lmoe_compiler.errors import InvalidTraining
from lmoe_compiler.models.generation import stream
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.train import checkpoint
from lmoe_compiler.train.config import from_dict
from lmoe_compiler.train.data import ByteTokenizer, JsonTokenizer, load_tokenizer
from lmoe_compiler.train.machine import pick_device


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lmoe generate", description="Continue prompts with a trained model."
    )
    parser.add_argument("run", help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--prompt", action="append", help="may be given several times, of any lengths"
    )
    parser.add_argument("--tokens", type=int, default=200, help="new tokens (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)"
    )
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args(argv)
    _check(arguments)
    model, tokenizer = load(Path(arguments.run), pick_device(arguments.device))
    texts = arguments.prompt or ["import "]
    prompts = [tokenizer.encode(text.encode()) for text in texts]
    begin = time.monotonic()
    new = _print(model, tokenizer, prompts, arguments)
    seconds = time.monotonic() - begin
    print(f"\n{new / seconds:,.0f} tokens/s", file=sys.stderr)
    return 0


def load(
    path: Path, device: torch.device
) -> tuple[LinearMoEForCausalLM, ByteTokenizer | JsonTokenizer]:
    """The model of a checkpoint and the tokenizer it was trained with."""
    folder = checkpoint.newest(path)
    config = from_dict(checkpoint.read_manifest(folder)["config"])
    tokenizer = load_tokenizer(config.tokenizer)
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    model = LinearMoEForCausalLM(model_config).to(device)
    checkpoint.load(folder, {"model": model.state_dict()})
    return model.eval(), tokenizer


def _print(
    model: LinearMoEForCausalLM,
    tokenizer: ByteTokenizer | JsonTokenizer,
    prompts: list[list[int]],
    arguments: argparse.Namespace,
) -> int:
    """One prompt appears as it is made, several when they are complete; how many tokens were
    made.
    """
    sequences = [list(prompt) for prompt in prompts]
    shown = ""
    options = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    for tokens in stream(model, prompts, arguments.tokens, seed=arguments.seed, **options):
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        if len(sequences) == 1:
            text = tokenizer.decode(sequences[0])
            # The last character may be half a multi-byte one.
            print(text[len(shown) : -1], end="", flush=True)
            shown = text[:-1]
    for number, sequence in enumerate(sequences):
        text = tokenizer.decode(sequence)
        if len(sequences) == 1:
            print(text[len(shown) :])
        else:
            print(f"--- prompt {number}\n{text}")
    return int(arguments.tokens) * len(prompts)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.temperature < 0:
        raise InvalidTraining(
            f"--temperature {arguments.temperature} is negative", try_="--temperature 0.7"
        )
    if not 0 < arguments.top_p <= 1:
        raise InvalidTraining(
            f"--top-p {arguments.top_p} is not in (0, 1]",
            why="it is the probability mass that is kept",
            try_="--top-p 0.95",
        )
    if arguments.tokens < 1:
        raise InvalidTraining(f"--tokens {arguments.tokens} is not positive", try_="--tokens 200")

"""Sampling from a model: packed prefill, then one step a token with constant memory in recurrent
layers.

Notation: N sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmoe_compiler.errors import InvalidData
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM


def pack(prompts: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths -> one row of tokens [1, T] and cu_seqlens [N+1] int32."""
    rows = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    for number, row in enumerate(rows):
        if row.ndim != 1 or not row.numel():
            raise InvalidData(
                f"prompt {number} is empty",
                why="the first token is predicted from at least one token before it",
                try_='lmoe generate --prompt "import "',
            )
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return torch.cat(rows)[None], lengths.cumsum(0).to(torch.int32)


def unpad(input_ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Padded rows [N, T] with a mask of real tokens, padding on either side -> prompts for
    `pack`.
    """
    return [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]


def choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Next tokens [N] from logits [N, vocabulary]; temperature 0 takes the likeliest.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751): the smallest set of likeliest tokens
    whose probability reaches `top_p`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]


@torch.no_grad()
def stream(
    model: LinearMoEForCausalLM,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yields the next tokens [N] of all sequences, `max_new_tokens` times."""
    device = model.embed.weight.device
    tokens, cu_seqlens = (x.to(device) for x in pack(prompts))
    capacity = int(cu_seqlens.diff().max()) + max_new_tokens
    generator = torch.Generator(device).manual_seed(seed)
    logits, cache = model.prefill(tokens, cu_seqlens, capacity)
    for produced in range(max_new_tokens):
        drawn = choose(logits, temperature, top_p, generator)
        yield drawn
        if produced + 1 < max_new_tokens:
            logits, cache = model.step(drawn, cache)


def generate(
    model: LinearMoEForCausalLM,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    **options: float,
) -> Tensor:
    """All new tokens at once: [N, max_new_tokens]. Options are those of `stream`."""
    return torch.stack(list(stream(model, prompts, max_new_tokens, **options)), dim=1)  # type: ignore[arg-type]

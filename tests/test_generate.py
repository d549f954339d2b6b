"""Decoding: the same logits as the full forward, unequal prompts, constant memory, sampling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_models import MIXERS, TINY, tiny, tokens

from lmoe_compiler.errors import InvalidData
from lmoe_compiler.models.generation import choose, generate, pack, unpad


@pytest.mark.parametrize("mixer", MIXERS)
def test_decode_equals_the_full_forward_for_unequal_prompts(mixer):
    model = tiny(mixer).double()
    sequences = [tokens(length) for length in (3, 1, 6)]
    with torch.no_grad():
        logits, cache = model.prefill(*pack(sequences), capacity=10)
        for _ in range(4):
            for row, sequence in zip(logits, sequences, strict=True):
                full = model(sequence[None]).logits[0, -1]
                torch.testing.assert_close(row, full, rtol=1e-9, atol=1e-9)
            new = tokens(3)
            sequences = [torch.cat([s, t[None]]) for s, t in zip(sequences, new, strict=True)]
            logits, cache = model.step(new, cache)


def test_padding_on_either_side_changes_nothing():
    model = tiny()
    prompts = [tokens(2), tokens(5)]
    expected = generate(model, prompts, 4, temperature=0)
    padded = torch.zeros(2, 6, dtype=torch.int64)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    padded[0, 4:], mask[0, 4:] = prompts[0], True
    padded[1, :5], mask[1, :5] = prompts[1], True
    assert torch.equal(generate(model, unpad(padded, mask), 4, temperature=0), expected)
    alone = [generate(model, [prompt], 4, temperature=0)[0] for prompt in prompts]
    assert torch.equal(torch.stack(alone), expected)


def test_recurrent_layers_need_the_same_memory_for_any_length():
    model = tiny()

    def sizes(length: int) -> list[int]:
        _, cache = model.prefill(*pack([tokens(length)]), capacity=length + 4)
        recurrent, attention = cache.layers
        of_recurrent = sum(s.numel() for s in recurrent.states) + recurrent.history.numel()
        return [of_recurrent, attention.keys.numel()]

    short, long = sizes(2), sizes(12)
    assert short[0] == long[0]
    assert short[1] < long[1]


def test_seed_decides_the_sample():
    model, prompt = tiny(), [tokens(3)]
    first = generate(model, prompt, 12, seed=1)
    assert torch.equal(first, generate(model, prompt, 12, seed=1))
    assert not torch.equal(first, generate(model, prompt, 12, seed=2))


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def share(top_p: float, temperature: float = 1.0) -> torch.Tensor:
        drawn = choose(logits, temperature, top_p, generator)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    assert share(0.4).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(share(0.7), torch.tensor([5, 3, 0, 0]) / 8, atol=0.03, rtol=0)
    everything = torch.tensor([0.5, 0.3, 0.15, 0.05])
    torch.testing.assert_close(share(1.0), everything, atol=0.03, rtol=0)
    sharper = everything.square() / everything.square().sum()
    torch.testing.assert_close(share(1.0, 0.5), sharper, atol=0.03, rtol=0)
    assert choose(logits[:1], 0, 1.0, None).tolist() == [0]


def test_empty_prompt_is_refused():
    with pytest.raises(InvalidData, match="prompt 1 is empty"):
        pack([[1, 2], []])


def test_dense_attention_only_model_decodes():
    config = dataclasses.replace(TINY, layer_pattern="N", num_experts=0)
    model = tiny().__class__(config)
    assert generate(model, [tokens(3)], 2, temperature=0).shape == (1, 2)

"""The model: every mixer, packed documents, causality, the router, and compiled = eager."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler import State, Token, recurrence
from lmoe_compiler.dims import K, V
from lmoe_compiler.errors import InvalidModel
from lmoe_compiler.models.attention import Attention, rotate
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.models.mixer_table import MIXERS, MixerSpec, Projected
from lmoe_compiler.models.moe import SparseMoE, route
from lmoe_compiler.models.short_convolution import short_conv
from lmoe_compiler.train.machine import compile_model

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    layer_pattern="LN",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    linear_heads=2,
    key_dim=4,
    value_dim=8,
    num_experts=4,
    top_k=2,
    expert_size=8,
    shared_expert_size=8,
    init_std=0.3,
)


def tiny(mixer: object = "gated_delta_rule", **changes: object) -> LinearMoEForCausalLM:
    config = dataclasses.replace(TINY, mixers={"L": mixer, "N": "attention"}, **changes)
    return LinearMoEForCausalLM(config)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, TINY.vocab_size, shape)


# -- mixers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_all_its_parameters(mixer):
    model = tiny(mixer)
    output = model(tokens(2, 9), tokens(2, 9))
    output.loss.backward()
    assert output.logits.shape == (2, 9, TINY.vocab_size)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert all(p.grad.isfinite().all() for p in trained.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_do_not_see_each_other(mixer):
    """One row with cu_seqlens gives what each document gives alone, in both kinds of layer."""
    model = tiny(mixer).double()
    documents = [tokens(1, length) for length in (5, 1, 7)]
    cu_seqlens = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    packed = model(torch.cat(documents, 1), cu_seqlens=cu_seqlens).logits
    alone = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_before_a_changed_token_changes(mixer):
    model = tiny(mixer).double()
    ids = tokens(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % TINY.vocab_size
    a, b = model(ids).logits, model(changed).logits
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, 6], b[:, 6])


def test_a_recurrence_of_the_user_is_a_mixer():
    @recurrence
    def mine(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], b: Token):
        S = S + torch.outer(k, b * v)
        return S, S.T @ q

    with pytest.raises(InvalidModel, match="nothing says how to make b of recurrence mine"):
        tiny(mine)
    plain = {name: Projected() for name in "qkv"}
    with pytest.raises(InvalidModel, match="takes q, k, v, b"):
        tiny(MixerSpec(mine, plain))
    model = tiny(MixerSpec(mine, {**plain, "b": Projected((torch.sigmoid,))}))
    model(tokens(1, 5), tokens(1, 5)).loss.backward()


def test_short_convolution_is_torchs():
    x, weight, history = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(2, 3, 6)
    for before, given in ((torch.zeros(2, 3, 6), None), (history, history)):
        padded = torch.cat([before, x], 1).transpose(1, 2)
        expected = F.conv1d(padded, weight[:, None], groups=6).transpose(1, 2)
        torch.testing.assert_close(short_conv(x, weight, history=given), expected)


# -- softmax attention ---------------------------------------------------------------------------


def test_attention_equals_its_formula():
    layer, x = Attention(TINY).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = layer._project(x, torch.arange(7))
    o = torch.zeros_like(q)
    for t in range(7):
        for head in range(TINY.num_heads):
            group = head // (TINY.num_heads // TINY.num_kv_heads)
            scores = torch.einsum("be,bse->bs", q[:, t, head], k[:, : t + 1, group])
            weights = (scores * TINY.head_dim**-0.5).softmax(-1)
            o[:, t, head] = torch.einsum("bs,bse->be", weights, v[:, : t + 1, group])
    torch.testing.assert_close(layer(x), layer.o_proj(o.flatten(-2)))


def test_rotary_products_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at: int) -> Tensor:
        here, there = torch.tensor([[at + 3]]), torch.tensor([[at]])
        return (rotate(q, here, 100.0) * rotate(k, there, 100.0)).sum()

    torch.testing.assert_close(product(0), product(17), rtol=1e-6, atol=1e-6)


# -- router --------------------------------------------------------------------------------------


def test_routing_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]).log_softmax(-1)
    p = logits.exp()
    weights, ids, routing = route(logits, 2, renormalise=True)
    assert ids.tolist() == [[0, 1], [1, 2]]
    torch.testing.assert_close(weights[0], p[0, :2] / p[0, :2].sum())
    assert routing.load.tolist() == [1, 2, 1]
    share, mean = torch.tensor([1, 2, 1]) / 4, p.mean(0)
    torch.testing.assert_close(routing.aux_loss, 3 * (share * mean).sum())
    torch.testing.assert_close(routing.z_loss, torch.tensor(0.0))
    torch.testing.assert_close(route(logits + 2, 2, True)[2].z_loss, torch.tensor(4.0))
    torch.testing.assert_close(route(logits, 2, False)[0][1], p[1, 1:])


@pytest.mark.parametrize("loss", ["aux_loss", "z_loss"])
def test_router_losses_move_the_router(loss):
    layer, x = SparseMoE(TINY), torch.randn(4, 16, 16)
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    optimiser = torch.optim.SGD([layer.router.weight], lr=0.05)
    torch.nn.init.zeros_(layer.gate_up)
    torch.nn.init.zeros_(layer.down)
    values = []
    for _ in range(20):
        value = getattr(layer(x)[1], loss)
        values.append(value.item())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert values[-1] < values[0]


def test_load_counts_every_choice():
    model = tiny()
    load = model(tokens(3, 5)).expert_load
    assert load.shape == (2, 4)
    assert load.sum(1).tolist() == [3 * 5 * 2] * 2


def test_dense_model_has_no_load():
    model = tiny(num_experts=0)
    output = model(tokens(1, 4), tokens(1, 4))
    assert output.expert_load.numel() == 0
    assert torch.equal(output.loss, output.cross_entropy)


# -- compiled ------------------------------------------------------------------------------------


def gradients(model, call, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = call(ids, labels)
    output.loss.backward()
    values = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": output.logits.detach(), "load": output.expert_load, **values}


@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_equals_eager_with_all_gradients(compiler):
    model = tiny().double()
    compiled = compile_model(model, compiler)
    ids, labels = tokens(2, 9), tokens(2, 9)
    expected = gradients(model, model, ids, labels)
    got = gradients(model, compiled, ids, labels)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
def test_compiled_under_autocast_is_as_near_to_float32_as_eager():
    """All choices of experts are the same (top_k = all), so only rounding differs."""
    model = tiny(top_k=4)
    compiled = compile_model(model, "aot_eager")
    ids, labels = tokens(2, 9), tokens(2, 9)
    exact = flat(gradients(model, model, ids, labels))
    with torch.autocast("cpu", torch.bfloat16):
        eager = flat(gradients(model, model, ids, labels))
        ours = flat(gradients(model, compiled, ids, labels))
    assert (ours - exact).norm() <= 1.5 * (eager - exact).norm()


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors.values()])


# -- bad configurations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_pattern": "LXLN", "num_layers": 4}, "letter 'X' at position 1 is unknown"),
        ({"layer_pattern": "LLN"}, "cannot be repeated to num_layers=2"),
        ({"layer_pattern": ""}, "cannot be repeated"),
        ({"top_k": 5}, "top_k=5 of num_experts=4"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": -1}, "num_experts=-1"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_size": 0}, "hidden_size=0"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(InvalidModel, match=message):
        dataclasses.replace(TINY, **changes)


def test_unknown_mixer_is_refused():
    with pytest.raises(InvalidModel, match="there is no mixer 'gated_deltanet'"):
        tiny("gated_deltanet")


def test_experts_start_with_weights():
    """Of a layer by itself too, where memory that nobody has written would be NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert all(x.isfinite().all() for x in SparseMoE(TINY).parameters())
    finally:
        torch.use_deterministic_algorithms(False)

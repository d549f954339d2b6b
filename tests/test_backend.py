"""The torch.compile backend: what it compiles to computes what the model computes, gradients included."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from calls import arguments, gated, state
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lmoe_compiler as lmoe
from lmoe_compiler import backend, errors
from lmoe_compiler.dims import K, V
from lmoe_compiler.passes.base import Record

HIDDEN, HEADS, EXPERTS = 12, 2, 4


class Block(nn.Module):
    """A recurrence and a sparse expert block with every detail that passes meet: marks, casts, an unused result."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.mix = nn.Linear(HIDDEN, 3 * HIDDEN + HEADS)
        self.bonus = nn.Parameter(torch.randn(HEADS, HIDDEN // HEADS) * 0.1)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 16, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8) * 0.3)

    def tokens(self, x: Tensor, offsets: Tensor | None) -> Tensor:
        q, k, v, g = self.mix(x).split([HIDDEN, HIDDEN, HIDDEN, HEADS], -1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
        return gated(
            q, F.normalize(k, dim=-1), v, F.logsigmoid(g), self.bonus, cu_seqlens=offsets
        ).flatten(2)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        if self.recompute:
            x = x + checkpoint(self.tokens, x, offsets, use_reentrant=False)
        else:
            x = x + self.tokens(x, offsets)
        flat = x.flatten(0, 1).contiguous()
        weights, ids = self.router(flat).float().softmax(-1).topk(2)
        return x + torch.ops.lmoe.experts(flat, weights, ids, self.gate_up, self.down).view_as(x)


def results(function, model: nn.Module, *args) -> list[Tensor]:
    """Output, gradient of the input, gradients of all parameters."""
    model.zero_grad()
    x = args[0].clone().requires_grad_()
    output = function(x, *args[1:])
    output.float().sin().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters())]


def away(x: Tensor, exact: Tensor) -> float:
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm())


def same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_is_eager(inner, recompute):
    model, x = Block(recompute), torch.randn(2, 7, HIDDEN)
    compiled = lmoe.compile(model, inner=inner, fullgraph=True)
    same(results(compiled, model, x), results(model, model, x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_by_inductor_is_eager(dtype):
    model, x = Block().to(dtype), torch.randn(2, 7, HIDDEN, dtype=dtype)
    compiled = lmoe.compile(model, fullgraph=True)
    got, want = results(compiled, model, x), results(model, model, x)
    if dtype == torch.float32:
        assert all(away(x, y) < 1e-5 for x, y in zip(got, want, strict=True))
        return
    # Inductor keeps other digits between bfloat16 operations than eager does, so both have errors.
    wide = copy.deepcopy(model).float()
    for one, other, exact in zip(got, want, results(wide, wide, x.float()), strict=True):
        assert away(one, exact) <= max(1.5 * away(other, exact), 2e-2)


@pytest.mark.slow
def test_what_inductor_has_kept_is_of_the_same_code(monkeypatch, tmp_path):
    """A process finds what another has compiled, unless an op of ours has changed in between."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for sources in ("old", "old", "new"):
        monkeypatch.setattr(backend, "_sources", lambda sources=sources: sources)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, x = Block(), torch.randn(2, 7, HIDDEN)
        lmoe.compile(model, fullgraph=True)(x)
        counts = torch._dynamo.utils.counters
        kept = counts["aot_autograd"]["autograd_cache_hit"], counts["inductor"]["fxgraph_cache_hit"]
        found.append(any(kept))
    assert found == [False, True, False]


def test_packed_documents_compile():
    model, x = Block(), torch.randn(1, 9, HIDDEN)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    compiled = lmoe.compile(model, inner="aot_eager", fullgraph=True)
    same(results(compiled, model, x, offsets), results(model, model, x, offsets))
    apart = torch.cat([model(x[:, :4]), model(x[:, 4:])], 1)
    torch.testing.assert_close(compiled(x, offsets), apart)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_compiles(inner):
    model, x = Block(), torch.randn(2, 7, HIDDEN)
    compiled = lmoe.compile(model, inner=inner, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = results(compiled, model, x), results(model, model, x)
    assert actual[0].dtype == expected[0].dtype
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).float().norm() <= 1e-2 * want.float().norm()


def test_one_dynamic_graph_for_many_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *inputs: gated(*inputs, return_state=True),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for B, T in ((5, 7), (5, 64), (6, 9), (5, 130)):
        inputs = arguments(B, T, grad=True)
        output, final = compiled(*inputs)
        expected = gated(*inputs, return_state=True)
        same((output, final), expected)
        grads = (
            torch.autograd.grad(o.sum() + s.sum(), inputs) for o, s in ((output, final), expected)
        )
        same(*grads)
    assert counter.frame_count == 1


def test_model_recompiles_once_for_other_lengths():
    """The first length is taken as it is, the second makes T symbolic, and that graph serves the rest."""
    record, model = Record(), Block()
    compiled = lmoe.compile(model, inner="aot_eager", fullgraph=True, record=record)
    for T in (5, 8, 13, 40):
        x = torch.randn(2, T, HIDDEN)
        same(results(compiled, model, x), results(model, model, x))
    assert len(record.graphs) == 2


def test_decoding_compiles():
    inputs, S = arguments(T=1), state()
    one = [x.squeeze(1) if i < 4 else x for i, x in enumerate(inputs)]
    compiled = lmoe.compile(
        lambda S, *xs: gated.step(*xs, state=S), inner="aot_eager", fullgraph=True
    )
    same(compiled(S, *one), gated.step(*one, state=S))


def test_func_grad_inside_a_compiled_function():
    inputs = arguments()

    def per_token(*inputs):
        return torch.func.grad(lambda *xs: gated(*xs).sin().sum(), argnums=(0, 2))(*inputs)

    same(lmoe.compile(per_token, inner="aot_eager", fullgraph=True)(*inputs), per_token(*inputs))


class N(lmoe.Dim, static=True):
    "writes per token"


@lmoe.recurrence
def several_writes(S: lmoe.State[K, V], q: lmoe.Token[K], k: lmoe.Token[N, K], v: lmoe.Token[N, V]):
    for i in range(k.shape[0]):
        S = S + torch.outer(k[i], v[i] - S.T @ k[i])
    return S, S.T @ q


def test_each_length_of_a_static_dim_is_a_program_of_its_own():
    compiled = lmoe.compile(
        lambda *xs: several_writes(*xs), inner="aot_eager", fullgraph=True, dynamic=True
    )
    for n, T in ((2, 5), (2, 7), (3, 9)):
        inputs = [torch.randn(2, T, 4, 3), torch.randn(2, T, 4, n, 3) * 0.3]
        inputs.append(torch.randn(2, T, 4, n, 6))
        same([compiled(*inputs)], [several_writes(*inputs)])
        same([compiled(*inputs)], [several_writes.reference(*inputs)])


class Alone(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return gated(*inputs)


def test_export_keeps_a_symbolic_length():
    inputs = arguments(3, 8)
    sizes = (*[{1: torch.export.Dim("T", min=2)}] * 4, None)
    exported = torch.export.export(Alone(), tuple(inputs), dynamic_shapes=(sizes,))
    for T in (8, 21):
        other = arguments(3, T)
        same([exported.module()(*other)], [gated(*other)])


def test_definition_under_any_context():
    """A definition is proved where it is written; what surrounds it there is not its concern."""

    def fresh():
        @lmoe.recurrence
        def attention(S: lmoe.State[K, V], q: lmoe.Token[K], v: lmoe.Token[V]):
            S = S + torch.outer(q, v)
            return S, S.T @ q

        return attention

    inputs = [torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 6)]
    expected = fresh().reference(*inputs)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert fresh()(*inputs).dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda q: fresh()(q, inputs[1]))(inputs[0].expand(3, -1, -1, -1, -1))
    same([mapped[1]], [expected])
    traced = torch.fx.experimental.proxy_tensor.make_fx(fresh(), tracing_mode="symbolic")(*inputs)
    same([traced(*inputs)], [expected])
    assert fresh()(*(x.to("meta") for x in inputs)).shape == expected.shape


def test_reference_and_ops_agree_when_compiled():
    inputs = arguments(T=3)
    reference = gated.with_options(implementation="reference")
    compiled = lmoe.compile(lambda *xs: reference(*xs), inner="eager", fullgraph=True)
    same([compiled(*inputs)], [gated(*inputs)])


def test_options_may_be_changed_inside_a_compiled_function():
    compiled = lmoe.compile(
        lambda *xs: gated.with_options(chunk_size=2)(*xs), inner="eager", fullgraph=True
    )
    inputs = arguments()
    same([compiled(*inputs)], [gated(*inputs)])


def test_decorator_forms():
    @lmoe.compile
    def bare(x):
        return x + 1

    @lmoe.compile(inner="eager", dynamic=True)
    def called(x):
        return x + 1

    assert isinstance(lmoe.compile(Block(), inner="eager"), nn.Module)
    assert called(torch.zeros(2)).tolist() == [1, 1]
    assert callable(bare)


IN_A_FRESH_PROCESS = """
import sys, torch
assert "lmoe_compiler" not in sys.modules
f = torch.compile(lambda x: x.sin() + 1, backend="lmoe", options={"inner": "eager"}, fullgraph=True)
x = torch.randn(3)
assert torch.equal(f(x), x.sin() + 1)
assert "lmoe_compiler.backend" in sys.modules
assert "lmoe" in torch._dynamo.list_backends(None)
"""


def test_entry_point_needs_no_import_of_ours():
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], check=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iner": "eager"}, "no option 'iner'(.|\n)*inner, disable"),
        ({"inner": "xla"}, "inner='xla' is not a compiler(.|\n)*inductor, aot_eager, eager"),
        ({"sequence_parallel": "sp"}, "'sp' is not an axis of the mesh(.|\n)*no mesh was given"),
    ],
)
def test_unknown_options(options, text):
    with pytest.raises(errors.InvalidOption, match=text):
        lmoe.compile(Block(), **options)


def test_disabled_pass_must_exist():
    with pytest.raises(
        Exception, match=r"disable='experts': there is no such pass(.|\n)*lower_experts"
    ):
        lmoe.compile(Block(), inner="eager", disable="experts")(torch.randn(1, 3, HIDDEN))


def test_explain_shows_every_stage():
    model = Block()
    page = lmoe.explain(model, torch.randn(2, 5, HIDDEN))
    assert all(p.grad is None for p in model.parameters())
    titles = [title for title, _ in page.stages]
    assert titles == [
        "gated: recurrence IR",
        "gated: analysis",
        "gated: chunk program",
        "gated: adjoint",
        "model graph",
        "pass canonicalize",
        "pass lower_experts",
        "forward after AOTAutograd",
        "backward after AOTAutograd",
    ]
    assert lmoe.parse(page["gated: recurrence IR"]).ir == gated.ir
    assert "solve" in page["gated: chunk program"]
    assert "torch.ops.lmoe.experts" in page["model graph"]
    assert "-1 experts" in page["pass lower_experts"]
    assert "lmoe.scan_backward.default" in page["backward after AOTAutograd"]
    assert all(f"-- {title} " in str(page) for title in titles)


def test_debug_prints_the_same_stages(monkeypatch, capsys):
    from lmoe_compiler.config import environment

    monkeypatch.setenv("LMOE_DEBUG", "fx")
    environment.cache_clear()
    try:
        lmoe.compile(Block(), inner="aot_eager")(torch.randn(2, 5, HIDDEN))
    finally:
        environment.cache_clear()
    printed = capsys.readouterr().err
    for stage in ("graph of the model", "after lower_experts", "forward after AOTAutograd"):
        assert f"-- fx: {stage} " in printed

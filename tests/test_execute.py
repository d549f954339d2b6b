"""The CPU implementation against the interpreter, which walks token by token and is differentiated by torch.

Any length, any chunk, packed or not, whole or in segments: the same numbers up to float64 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from programs import SEQUENTIAL, TEXTS, make_inputs, make_states, noise, program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmoe_compiler import interpreted, library
from lmoe_compiler.config import Options
from lmoe_compiler.errors import NoSpanMap
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.lower import chunked, execute

every_program = pytest.mark.parametrize("name", [*TEXTS, *SEQUENTIAL])
every_chunked = pytest.mark.parametrize("name", TEXTS)


def same(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], rtol: float = 1e-10
) -> None:
    """Up to rounding, relative to the largest entry (a sum of large terms may be small)."""
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            assert a is e
            continue
        scale = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol * scale + 1e-13)


def everything(
    implementation,
    p: Program,
    inputs: list[Tensor],
    states: list[Tensor] | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> list[Tensor | None]:
    """Output, final states, gradients of inputs and of initial states."""
    output, finals, saved = implementation.scan(p, inputs, states, cu_seqlens, options)
    seeds = [noise(f"d{i}", tuple(x.shape), x.dtype) for i, x in enumerate((output, *finals))]
    d_inputs, d_states = implementation.scan_backward(
        p, inputs, states, cu_seqlens, saved, seeds[0], seeds[1:], options
    )
    return [output, *finals, *d_inputs, *(d_states or ())]


@every_chunked
@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 50])
def test_any_length(name, T):
    p = program(name)
    inputs, states = make_inputs(p, 2, T), make_states(p, 2)
    options = Options(chunk_size=16)
    same(
        everything(execute, p, inputs, states, None, options),
        everything(interpreted, p, inputs, states, None, options),
    )


@every_chunked
@pytest.mark.parametrize("chunk", [1, 2, 32])
def test_any_chunk_with_packed_documents(name, chunk):
    """An empty document, one of a token, two in one chunk, and one that is longer than a chunk."""
    p = program(name)
    bounds = torch.tensor([0, 0, 1, 6, 9, 30, 37], dtype=torch.int32)
    inputs, states = make_inputs(p, 1, 37), make_states(p, len(bounds) - 1)
    options = Options(chunk_size=chunk)
    same(
        everything(execute, p, inputs, states, bounds, options),
        everything(interpreted, p, inputs, states, bounds, options),
    )


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("bounds", [None, [0, 0, 3, 70]])
def test_programs_without_a_chunk_form_run_token_by_token(name, bounds):
    """Over more tokens than one checkpoint spans."""
    p = program(name)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    inputs = make_inputs(p, 1, 70, hard=False)
    states = make_states(p, 1 if bounds is None else 3)
    same(
        everything(execute, p, inputs, states, cu_seqlens, Options()),
        everything(interpreted, p, inputs, states, cu_seqlens, Options()),
    )


@every_chunked
def test_segments_of_the_sequence_change_nothing(name, monkeypatch):
    p = program(name)
    inputs, states, options = make_inputs(p, 2, 45), make_states(p, 2), Options(chunk_size=8)
    whole = everything(execute, p, inputs, states, None, options)
    monkeypatch.setattr(chunked, "SEGMENT_ELEMENTS", 2 * 2 * 5 * 16)
    same(everything(execute, p, inputs, states, None, options), whole)


@pytest.mark.parametrize("name", ["gated_delta", "keyed_delta", "other_key", "normaliser"])
def test_without_states_and_without_gradients_of_finals(name):
    p = program(name)
    inputs, zeros = make_inputs(p, 2, 21), [torch.zeros_like(x) for x in make_states(p, 2)]
    output, _, saved = execute.scan(p, inputs, None, None, Options())
    same([output], [execute.scan(p, inputs, zeros, None, Options())[0]])
    d = noise("d", tuple(output.shape))
    none = [None] * len(zeros)
    grads, d_states = execute.scan_backward(p, inputs, None, None, saved, d, none, Options())
    assert d_states is None
    same(grads, execute.scan_backward(p, inputs, zeros, None, saved, d, zeros, Options())[0])


@every_program
def test_step_by_step_is_the_scan(name):
    p = program(name)
    inputs, states = make_inputs(p, 2, 5), make_states(p, 2)
    output, finals, _ = execute.scan(p, inputs, states, None, Options())
    rows, now = [], states
    for at in range(5):
        tokens = [
            x[:, at] if v.kind == "token" else x for v, x in zip(p.inputs, inputs, strict=True)
        ]
        o, now = execute.step(p, tokens, now, Options())
        rows.append(o)
    same([torch.stack(rows, 1), *now], [output, *finals])


# -- spans ----------------------------------------------------------------------------------------


def applied(p: Program, maps: Sequence[Tensor | None], ends: Sequence[Tensor], states):
    """M S + E; a primed axis of M, its last, meets the same axis of S."""
    results = []
    for var, m, e, s in zip(p.states, maps, ends, states, strict=True):
        if m is None:
            results.append(s + e)
        elif m.dim() == 4:
            results.append(m @ s + e if len(var.axes) == 2 else (m * s) + e)
        else:
            results.append(m[(...,) + (None,) * (s.dim() - m.dim())] * s + e)
    return results


SPANNED = [n for n in TEXTS if n not in ("chained", "written_by_reads", "transposed")]


@pytest.mark.parametrize("name", SPANNED)
def test_two_spans_compose_to_the_whole(name):
    """The entry state of the second span comes from the maps alone; gradients flow through them."""
    p = program(name)
    inputs, states = make_inputs(p, 2, 41), make_states(p, 2)
    options, cut = Options(chunk_size=8), 19

    def halves(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        return (x[:, :cut], x[:, cut:]) if kind == "token" else (x, x)

    first, second = zip(
        *(halves(x, v.kind) for v, x in zip(p.inputs, inputs, strict=True)), strict=True
    )
    maps, ends = execute.span_map(p, first, None, options)
    entry = applied(p, maps, ends, states)
    _, finals, _ = execute.scan(p, inputs, states, None, options)
    _, composed, _ = execute.scan(p, second, entry, None, options)
    same(composed, finals)
    same(execute.scan(p, first, states, None, options)[1], entry)


@pytest.mark.parametrize("name", SPANNED)
@pytest.mark.parametrize("bounds", [None, [0, 0, 25], [0, 9, 25], [0, 25, 25]])
def test_span_maps_and_their_gradients(name, bounds):
    p = program(name)
    inputs, options = make_inputs(p, 1, 25), Options(chunk_size=8)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    maps, ends = execute.span_map(p, inputs, cu_seqlens, options)
    expected_maps, expected_ends = interpreted.span_map(p, inputs, cu_seqlens, options)
    same([*maps, *ends], [*expected_maps, *expected_ends])
    d_maps = [None if m is None else noise("dM", tuple(m.shape)) for m in maps]
    d_ends = [noise("dE", tuple(e.shape)) for e in ends]
    same(
        execute.span_map_backward(p, inputs, cu_seqlens, d_maps, d_ends, options),
        interpreted.span_map_backward(p, inputs, cu_seqlens, d_maps, d_ends, options),
    )


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SPANNED)
def test_where_a_document_begins_is_not_read(name):
    p = program(name)
    inputs, options = make_inputs(p, 1, 25), Options(chunk_size=8)
    cu_seqlens = torch.tensor([0, 9, 25], dtype=torch.int32)
    with NoHostReads():
        maps, ends = execute.span_map(p, inputs, cu_seqlens, options)
        execute.span_map_backward(p, inputs, cu_seqlens, maps, ends, options)
    with pytest.raises(AssertionError, match="read on the host"), NoHostReads():
        int(cu_seqlens[-2])


@pytest.mark.parametrize(
    ("name", "why"),
    [("written_by_reads", "driven by p, which is read"), ("scaled_values", "scaled along V")],
)
def test_a_state_without_a_span_map_says_why(name, why):
    p = program(name)
    with pytest.raises(NoSpanMap, match=why):
        execute.span_map(p, make_inputs(p, 1, 3), None, Options())


# -- derivatives, precision, cost -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated_delta", "keyed_delta", "other_key", "normaliser"])
def test_gradcheck(name):
    p = program(name)
    leaves = [*make_inputs(p, 1, 3, 1, hard=False), *make_states(p, 1, 1)]
    count = len(p.inputs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = library.call(
            "scan", str(p), list(tensors[:count]), list(tensors[count:]), None, "chunk_size=2"
        )
        return tuple(results[: 1 + len(p.states)])

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("name", ["scalar", "diagonal", "keyed_delta", "other_key", "delta_before"])
@pytest.mark.parametrize("span", [(-1e-4, -1000.0), (-0.01, -torch.inf)], ids=str)
def test_float32_keeps_its_digits_at_mixed_decays(name, span):
    """Slow and sudden decays side by side: every result within 1e-5 of float64, relative to its size."""
    p = program(name)
    inputs = make_inputs(p, 1, 200)
    sudden = noise("sudden", (1, 200, 2, 1)) > 1
    for i, var in enumerate(p.inputs):
        if var.name in "gw":
            slow, fast = (torch.tensor(x).double() for x in span)
            pick = sudden if var.name == "w" else sudden[..., 0]
            inputs[i] = torch.where(pick, fast, slow).expand_as(inputs[i]).contiguous()
    states = make_states(p, 1)
    exact = everything(execute, p, inputs, states, None, Options())
    single = everything(
        execute, p, [x.float() for x in inputs], [x.float() for x in states], None, Options()
    )
    for x, e in zip(single, exact, strict=True):
        assert x is not None
        assert e is not None
        assert bool(torch.isfinite(x).all())
        error = (x.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30)
        assert float(error) < 1e-5


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made, and of all that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, x.numel())
                self.total += x.numel()
        return result


@pytest.mark.parametrize("name", ["gated_delta", "keyed_delta", "other_key"])
def test_nothing_grows_faster_than_the_inputs(name):
    """No tensor of T x T or T x K x V: the largest has C rows of pairs, or a state, per token of a chunk."""
    p, options = program(name), Options(chunk_size=16)
    largest, total = [], []
    for T in (256, 1024):
        inputs = make_inputs(p, 1, T, hard=False)
        with Largest() as seen:
            everything(execute, p, inputs, None, None, options)
        largest.append(seen.entries)
        total.append(seen.total)
    assert largest[1] <= 2 * 1024 * 16
    assert total[1] <= 4.2 * total[0]


def test_dtypes_and_strides():
    p = program("gated_delta")
    inputs = make_inputs(p, 2, 20, hard=False)
    for dtype in (torch.bfloat16, torch.float16):
        low = [x.to(dtype).transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
        output, finals, saved = execute.scan(p, low, None, None, Options())
        assert output.dtype == dtype
        assert output.is_contiguous()
        assert finals[0].dtype == torch.float32
        grads, _ = execute.scan_backward(
            p, low, None, None, saved, torch.ones_like(output), [None], Options()
        )
        assert [g.dtype for g in grads] == [dtype] * len(low)
        exact, _, _ = execute.scan(p, [x.double() for x in low], None, None, Options())
        error = (output.double() - exact).abs().max()
        assert float(error) <= torch.finfo(dtype).eps * float(exact.abs().max())

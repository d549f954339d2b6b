"""The chunk program of one chunk is the recurrence of its tokens, and its adjoint is the derivative.

The oracle is ir/interpret.py over tokens in float64, differentiated by torch.
"""

from __future__ import annotations

import pytest
import torch
from programs import SEQUENTIAL, SIZES, TEXTS, make_inputs, make_states, noise, program
from torch import Tensor

from lmoe_compiler.ir.interpret import Value, evaluate, run
from lmoe_compiler.ir.nodes import BINARY, ROW, SOURCE, UNARY, Node, input_, make, topological
from lmoe_compiler.lower.adjoint import adjoint, pull_back
from lmoe_compiler.lower.chunk import NoChunkForm, build, chunk_program
from lmoe_compiler.lower.decayed import decayed
from lmoe_compiler.lower.ops import RULES, VJP, segment_sums
from lmoe_compiler.lower.program import VALID, ChunkProgram, gradient_name

C = 8
every_program = pytest.mark.parametrize("name", TEXTS)


def leaves(p, inputs: list[Tensor], states: list[Tensor]) -> dict[Node, Value]:
    """The environment of one chunk of all tokens, for the first head of the first sequence."""
    env = {input_(VALID, (ROW,)): Value(torch.ones(C, dtype=torch.float64), (ROW,))}
    for var, x in zip(p.inputs, inputs, strict=True):
        axes = (ROW, *var.axes) if var.kind == "token" else var.axes
        env[input_(var.name, axes)] = Value(x[0, :, 0] if var.kind == "token" else x[0], axes)
    for var, x in zip(p.states, states, strict=True):
        env[var.node] = Value(x[0, 0], var.axes)
    return env


def close(actual: Value, expected: Tensor, axes: tuple[str, ...]) -> None:
    whole = actual.to(axes).expand_as(expected)
    torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-12)


LENGTHS = SIZES | {ROW: C, SOURCE: C}


@every_program
def test_one_chunk_is_the_recurrence_and_its_adjoint_the_derivative(name):
    p = program(name)
    inputs = [x.requires_grad_() for x in make_inputs(p, 1, C, 1)]
    states = [x.requires_grad_() for x in make_states(p, 1, 1)]
    output, finals = run(p, inputs, states)
    seeds = [noise(f"seed{i}", tuple(x.shape)) for i, x in enumerate((output, *finals))]
    grads = torch.autograd.grad(
        [output, *finals], [*inputs, *states], seeds, allow_unused=True, materialize_grads=True
    )
    chunk = chunk_program(p)
    back = adjoint(chunk)
    env = leaves(p, [x.detach() for x in inputs], [x.detach() for x in states])
    rows = (ROW, *p.output.axes)
    env[input_("d.o", rows)] = Value(seeds[0][0, :, 0], rows)
    for var, seed in zip(p.states, seeds[1:], strict=True):
        env[input_(gradient_name(var), var.axes)] = Value(seed[0, 0], var.axes)
    o, *ends = evaluate([chunk.output, *chunk.next_states], env, LENGTHS, RULES)
    close(o, output[0, :, 0].detach(), rows)
    for var, end, final in zip(p.states, ends, finals, strict=True):
        close(end, final[0, 0].detach(), var.axes)
    values = evaluate([*back.input_grads, *back.state_grads], env, LENGTHS, RULES)
    for var, value, grad in zip((*p.inputs, *p.states), values, grads, strict=True):
        if var.kind == "token":
            close(value, grad[0, :, 0], (ROW, *var.axes))
        else:
            close(value, grad[0] if var.kind == "head" else grad[0, 0], var.axes)


def ops(chunk: ChunkProgram) -> list[str]:
    return [node.op for node in topological([*chunk.next_states, chunk.output])]


@pytest.mark.parametrize(
    ("name", "solves", "products"),
    [("linear", 0, 1), ("two_writes", 0, 2), ("delta", 1, 2), ("keyed_delta", 1, 2),
     ("scaled_key", 1, 2), ("other_read", 1, 2), ("other_key", 1, 4)],
)  # fmt: skip
def test_only_what_the_structure_needs(name, solves, products):
    """No solve without feedback; equal keys make one group, a solve and two C x C products."""
    found = ops(chunk_program(program(name)))
    assert found.count("solve") == solves
    assert found.count("causal") + found.count("decayed") == products


def test_no_decay_costs_nothing():
    assert not {"exp", "prefix", "suffix", "segment"} & set(ops(chunk_program(program("delta"))))


def test_scalar_decay_leaves_the_operands_of_products_alone():
    chunk = chunk_program(program("gated_delta"))
    for node in topological([*chunk.next_states, chunk.output]):
        if node.op == "dot" and node["axis"] == "K":
            factors = {a.args[0].op if a.op == "rename" else a.op for a in node.args}
            assert factors <= {"input", "where"}


def test_roles_name_what_a_planner_may_keep():
    chunk = chunk_program(program("gated_delta"))
    assert set(chunk.roles) == {"scores r 0", "matrix S", "rhs S", "solution S"}
    everything = set(topological([*chunk.next_states, chunk.output]))
    assert set(chunk.roles.values()) <= everything


@pytest.mark.parametrize(
    ("name", "reason"),
    [("two_steps", "several steps"), ("signed", "positive"), ("elementwise", "no one axis"),
     ("two_reads", "no shared solve"), ("whole", "read whole"), ("scaled_values", "value by value")],
)  # fmt: skip
def test_what_has_no_chunk_form_says_why(name, reason):
    assert name in SEQUENTIAL
    assert build(program(name)) is None
    with pytest.raises(NoChunkForm, match=reason):
        chunk_program(program(name))


def t(name: str, *axes: str) -> Node:
    return input_(name, (ROW, *axes))


ROWS, PAIRS = t("x", "K"), t("w", SOURCE)
OTHER = {
    "where": make("where", make("gt", ROWS, t("c")), ROWS, t("y", "K")),
    "cast": make("cast", ROWS),
    "rename": make("rename", ROWS, old=ROW, new=SOURCE),
    "index": make("index", ROWS, axis="K", at=2),
    "sum": make("sum", ROWS, axis="K"),
    "max": make("max", ROWS, axis="K"),
    "dot": make("dot", ROWS, t("y", "K"), axis="K"),
    "prefix": make("prefix", t("g"), inclusive=False),
    "suffix": make("suffix", t("g", "K"), inclusive=True),
    "segment": make("segment", t("g"), exclusive=True),
    "causal": make("causal", PAIRS, strict=True),
    "solve": make("solve", PAIRS, ROWS, transposed=True),
} | {
    op: make(op, *args, axis="K", strict=op != "decayed", exclusive=op == "decayed_cols")
    for op, args in {
        "decayed": (ROWS, t("y", "K"), t("g", "K")),
        "decayed_rows": (PAIRS, ROWS, t("g", "K")),
        "decayed_cols": (PAIRS, ROWS, t("g", "K")),
    }.items()
}
POINTWISE = {op: make(op, make("add", make("abs", ROWS), make("exp", t("c")))) for op in UNARY}
POINTWISE |= {op: make(op, make("exp", ROWS), make("exp", t("c"))) for op in BINARY}


@pytest.mark.parametrize("op", sorted(VJP))
def test_every_vjp_is_what_torch_finds(op):
    """One op on generic operands, with operands that lack an axis of the result."""
    root = (OTHER | POINTWISE)[op]
    names = [node for node in topological([root]) if node.op == "input"]
    values = {n: noise(n.name, tuple(LENGTHS[a] for a in n.axes)).requires_grad_() for n in names}
    env = {n: Value(x, n.axes) for n, x in values.items()}
    (result,) = evaluate([root], env, LENGTHS, RULES)
    seed = input_("seed", root.axes)
    d = noise("seed", tuple(LENGTHS[a] for a in root.axes))
    expected = torch.autograd.grad(
        result.to(root.axes).expand_as(d) if result.tensor.requires_grad else d.requires_grad_(),
        list(values.values()), d.detach(), allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    env = {n: Value(x.detach(), n.axes) for n, x in values.items()}
    grads = pull_back({root: seed}, names)
    actual = evaluate(grads, env | {seed: Value(d.detach(), root.axes)}, LENGTHS, RULES)
    for node, value, want in zip(names, actual, expected, strict=True):
        close(value, want, node.axes)


GATES = {
    "mild": lambda x: -0.05 * x,
    "strong": lambda x: -5 * x,
    "mixed": lambda x: torch.where(x < 0.5, -1e-4 * x, -1000 * x),
    "huge": lambda x: -1000 * x,
    "reset": lambda x: torch.where(x < 0.1, -torch.inf, -0.01 * x),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("exclusive", [False, True])
def test_decayed_products_are_exact_at_any_decay(gate, exclusive):
    """Against the definition, pair by pair, and in float32 to some units in the last place."""
    g = GATES[gate](torch.rand(64, 6, generator=torch.Generator().manual_seed(0)).double())
    r, x = noise("r", (64, 6)), noise("x", (64, 6))
    pairs = segment_sums(g.mT, exclusive).movedim(0, -1).exp()
    expected = (r[:, None] * x[None] * pairs).sum(-1).tril(-1)
    torch.testing.assert_close(decayed(r, x, g, True, exclusive), expected, rtol=1e-12, atol=1e-14)
    single = decayed(r.float(), x.float(), g.float(), True, exclusive).double()
    rounded = (r[:, None] * x[None] * pairs).abs().sum(-1).tril(-1)
    # An exponent is the sum of at most 32 terms that were themselves rounded to float32.
    exponents = torch.where(pairs > 0, -pairs.log(), 0).amax(-1)
    bound = 4 * torch.finfo(torch.float32).eps * rounded * (1 + exponents)
    assert bool(((single - expected).abs() <= bound + 1e-37).all())

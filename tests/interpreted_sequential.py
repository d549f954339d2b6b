"""Sequential kernels, span maps and steps in Triton's interpreter against the definition; run by test_codegen.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from cases import CASES, Sizes, make_inputs, unit
from differentiated import as_argument, as_list, differentiated, scan
from interpreted_kernels import TOLERANCE, assert_close
from kinds import ROWS
from torch import Tensor

import lmoe_compiler as lmoe
from lmoe_compiler import Recurrence, State, Token
from lmoe_compiler.codegen import compiled, first_use, run, sequential
from lmoe_compiler.codegen.plan import Choice, Tuning
from lmoe_compiler.dims import K, V
from lmoe_compiler.errors import WrongResult
from lmoe_compiler.lower import execute
from lmoe_compiler.lower.chunk import build
from lmoe_compiler.models import RECURRENCES

# Rows past the end divide zero by zero before they are masked; numpy says so, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WALKED = {name: row.recurrence for name, row in ROWS.items() if build(row.recurrence.ir) is None}
del WALKED["delta_product_multiplied_out"]  # the same program as delta_product
WALKED["slstm"] = RECURRENCES["slstm"]
LENGTHS = {"K": 6, "V": 5, "M": 4, "N": 2}
BY_NAME = {case.name: case for case in CASES}


def arguments(
    recurrence: Recurrence, B: int = 1, T: int = 6, H: int = 1, **lengths: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Float32 inputs and states that keep every variant in range."""
    sizes = LENGTHS | lengths
    lead = {"token": (B, T, H), "head": (H,), "state": (B, H)}

    def shape(var: object) -> tuple[int, ...]:
        return (*lead[var.kind], *(sizes[a.rstrip("'")] for a in var.axes))

    inputs = {var.name: 0.5 * torch.randn(shape(var)) for var in recurrence.inputs}
    return inputs, [0.5 + torch.rand(shape(var)) for var in recurrence.states]


def check(
    recurrence: Recurrence, inputs: dict[str, Tensor], states: Sequence[Tensor], **options: object
) -> None:
    exact = {name: x.double() for name, x in inputs.items()}
    kernels = recurrence.with_options(implementation="triton")
    assert_close(
        differentiated(kernels, inputs, states, **options),
        differentiated(recurrence.reference, exact, [x.double() for x in states], **options),
    )


@pytest.fixture(autouse=True)
def _short_chunks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Chunks of four tokens, so that a few tokens make several; `block` is how much of a state a program holds."""
    block = getattr(request, "param", sequential.BLOCK)
    choice = Choice(chunk=4, default=Tuning(block=block, num_stages=1))
    monkeypatch.setattr(sequential, "choose", lambda *_: choice)
    compiled.forget()
    yield
    compiled.forget()


@pytest.mark.parametrize("name", WALKED)
def test_every_kind_without_a_chunk_form(name):
    """Two chunks, the second ragged: outputs, final states and every gradient."""
    check(WALKED[name], *arguments(WALKED[name]))


@pytest.mark.parametrize("_short_chunks", [128], indirect=True)
@pytest.mark.parametrize("name", ["gate_of_the_state", "hgrn", "mamba1"])
def test_tiles(name):
    """Tiles of 16; gradients that contract the tiled axis are sums of the programs' parts."""
    lengths = {"K": 256} if name == "hgrn" else {"V": 40}
    check(WALKED[name], *arguments(WALKED[name], T=5, **lengths))


@pytest.mark.parametrize("T", [0, 1, 4, 9])
def test_any_length(T):
    check(WALKED["recurrent_gate"], *arguments(WALKED["recurrent_gate"], B=2, T=T))


@pytest.mark.parametrize("name", ["recurrent_gate", "dense_transition"])
def test_packed_documents(name):
    """A document of one token, a ragged one, an empty one, a whole chunk."""
    ends = torch.tensor([0, 1, 7, 7, 11], dtype=torch.int32)
    inputs, _ = arguments(WALKED[name], T=11)
    _, states = arguments(WALKED[name], B=4)
    check(WALKED[name], inputs, states, cu_seqlens=ends)


def test_grouped_heads():
    recurrence = WALKED["gate_of_the_state"]
    inputs, states = arguments(recurrence, H=4, T=3)
    inputs["q"], inputs["k"] = inputs["q"][:, :, :2], inputs["k"][:, :, ::2]
    check(recurrence, inputs, states)


@lmoe.recurrence
def awkward(T: State[K, V], o: Token[K], do: Token[V], i_t: Token, tl: Token[K]):
    """Names that kernels have for themselves, and one that is another's gradient."""
    T = torch.sigmoid(i_t) * T + torch.outer(o, do - T.T @ tl)
    return T, T.T @ o


@pytest.mark.parametrize("chunked", [True, False])
def test_awkward_names(chunked):
    inputs, states = arguments(awkward, T=5)
    inputs["tl"] = unit(inputs["tl"])
    if chunked:
        check(awkward, inputs, states)
    else:
        stepped(awkward, inputs, states)


def stepped(recurrence: Recurrence, inputs: dict[str, Tensor], states: list[Tensor]) -> None:
    """Steps one after the other are the scan; in place, the given states become the final ones."""
    exact = {name: x.double() for name, x in inputs.items()}
    wanted, ends = scan(recurrence.reference, exact, [x.double() for x in states])
    tokens = {var.name for var in recurrence.inputs if var.kind == "token"}
    kernels = recurrence.with_options(implementation="triton")
    held = [x.clone() for x in states]
    for t in range(wanted.shape[1]):
        now = [x[:, t] if name in tokens else x for name, x in inputs.items()]
        output, after = kernels.step(*now, state=as_argument(states))
        states = as_list(after)
        again, same = kernels.step(*now, state=as_argument(held), inplace=True)
        assert all(x is y for x, y in zip(as_list(same), held, strict=True))
        for x, y in zip([again, *held], [output, *states], strict=True):
            assert torch.equal(x, y)
        assert (output.double() - wanted[:, t]).norm() <= TOLERANCE * wanted[:, t].norm()
    for x, y in zip(states, ends, strict=True):
        assert (x.double() - y).norm() <= TOLERANCE * y.norm()


@pytest.mark.parametrize("name", ["slstm", "delta_product", "dense_transition", "running_maximum"])
def test_steps(name):
    stepped(WALKED[name], *arguments(WALKED[name], T=2, H=2))


def test_a_step_in_place_into_a_part_of_a_cache():
    recurrence = WALKED["gate_of_the_state"].with_options(implementation="triton")
    inputs, (state,) = arguments(recurrence, B=2, T=1)
    cache = torch.stack([state, state], 2)[:, :, 0]
    now = [x[:, 0] for x in inputs.values()]
    wanted = recurrence.step(*now, state=state)
    output, same = recurrence.step(*now, state=cache, inplace=True)
    assert same is cache
    assert not cache.is_contiguous()
    assert torch.equal(output, wanted[0])
    assert torch.equal(cache, wanted[1])


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("simple_gla", (0, 5, 21)),
        ("gla", None),
        ("gated_delta_rule", (0, 0, 21)),
        ("gated_delta_rule", (0, 5, 21)),
    ],
    ids=str,
)
def test_span_maps(name, ends):
    """M and E of the last document, and their gradients, with no look at the offsets."""
    case, span = BY_NAME[name], torch.ops.lmoe.span_map.default
    made, _ = make_inputs(case, Sizes(B=1, T=21, H=1, K=6, V=5))
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    exact = [x.float().double().requires_grad_() for x in made.values()]
    rounded = [x.float().requires_grad_() for x in made.values()]
    text = case.recurrence.text()
    expected = span(text, exact, offsets, "implementation=torch")
    actual = span(text, rounded, offsets, "implementation=triton chunk_size=16")
    weights = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, exact, weights, allow_unused=True)
    found = torch.autograd.grad(actual, rounded, [w.float() for w in weights], allow_unused=True)
    for x, y in zip((*actual, *found), (*expected, *wanted), strict=True):
        assert (x.double() - y).norm() <= TOLERANCE * y.norm()


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(first_use, "unknown", lambda: True)
    compiled.forget()
    yield
    compiled.forget()


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(("name", "packed"), [("gated_delta_rule", True), ("retention", False)])
def test_an_unmeasured_gpu_is_checked_at_first_use(name, packed):
    """Scans, backward and step pass the comparison with ATen; a second call is not compared again."""
    case = BY_NAME[name]
    made, starts = make_inputs(case, Sizes(B=1, T=20, H=1, K=6, V=5))
    inputs = {name: x.float() for name, x in made.items()}
    ends = {"cu_seqlens": torch.tensor([0, 0, 20], dtype=torch.int32)} if packed else {}
    documents = [x.float().repeat(1 + packed, *[1] * (x.dim() - 1)) for x in starts]
    check(case.recurrence, inputs, documents, **ends)
    stepped(case.recurrence, {n: x[:, :1] if x.dim() > 2 else x for n, x in inputs.items()}, [
        x.float() for x in starts
    ])  # fmt: skip
    assert all(entry.verified for entry in compiled._calls.values())
    program = case.recurrence.program()
    page = run.report(program, list(inputs.values()), case.recurrence.options)
    assert "lmoe bench tune" in page


@pytest.mark.usefixtures("_unmeasured")
def test_wrong_numbers_on_an_unmeasured_gpu_are_an_error(monkeypatch):
    right = execute.scan

    def wrong(*args: object) -> object:
        output, finals, saved = right(*args)
        return 1.1 * output, finals, saved

    monkeypatch.setattr(execute, "scan", wrong)
    case = BY_NAME["simple_gla"]
    made, _ = make_inputs(case, Sizes(B=1, T=20, H=1, K=6, V=5))
    kernels = case.recurrence.with_options(implementation="triton")
    with pytest.raises(WrongResult, match=r"simple_gla are wrong on(.|\n)*torch"):
        kernels(*(x.float() for x in made.values()))


@lmoe.recurrence
def unit_keys(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, u: lmoe.Head):
    k = k / k.norm()
    S = g.exp() * S
    S = S + torch.outer(k, u * (v - S.T @ k))
    return S, S.T @ q


@lmoe.recurrence
def poles(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, u: lmoe.Head):
    S = g.abs().sqrt().sigmoid() * S + torch.outer(k.abs() ** u, torch.log(v.abs()) / g)
    return S, u * (S.T @ q) / q.norm()


@pytest.mark.parametrize("recurrence", [unit_keys, poles], ids=lambda r: r.name)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_past_the_end_are_no_poles(recurrence, packed):
    """They are read as zeros: a key divided by its own norm gave NaN everywhere, gradients of heads included."""
    inputs, states = arguments(recurrence, T=20)
    options = {"cu_seqlens": torch.tensor([0, 4, 20], dtype=torch.int32)} if packed else {}
    if packed:
        states = [x.expand(2, *x.shape[1:]).clone() for x in states]
    wide = {n: x.double() for n, x in inputs.items()}, [x.double() for x in states]
    kernels = recurrence.with_options(implementation="triton", chunk_size=16)
    assert_close(
        differentiated(kernels, inputs, states, **options),
        differentiated(recurrence.reference, *wide, **options),
    )

"""Bad calls: each gets one error, before any work, that names the value, the argument and a fix.

The same checks run on fake tensors, so a compiled model reports them too.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from dataclasses import replace

import numpy
import pytest
import torch
from calls import arguments, gated, state
from kinds import ROWS

import lmoe_compiler as lmoe
from lmoe_compiler import State, Token, errors, implementation, kernels, layout
from lmoe_compiler.config import Environment, Options, environment
from lmoe_compiler.dims import K as K_
from lmoe_compiler.dims import V as V_

Q, K, V, G, U = range(5)


def call(**changed):
    """A call of `gated` in which some arguments are replaced; integers stand for inputs."""
    named = {name: changed.pop(name) for name in list(changed) if name in OPTIONS}
    inputs = {name: x for name, x in zip("qkvgu", arguments(), strict=True)} | changed
    return gated(**inputs, **named)


OPTIONS = ("initial_state", "return_state", "cu_seqlens")


def packed(offsets, **changed):
    one = dict(zip("qkvgu", arguments(B=1, T=7), strict=True))
    return gated(**one | changed, cu_seqlens=offsets)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


q, k, v, g, u = arguments()
BAD_CALLS = {
    "rank": (
        lambda: call(q=q[0]),
        errors.ShapeMismatch,
        r"q has 3 dimensions, shape \[5, 2, 3\](.|\n)*Token\[K\](.|\n)*\[B, T, H, K\](.|\n)*unsqueeze",
    ),
    "state": (lambda: call(initial_state=0), errors.InvalidArgument, "got int for 'initial_state'"),
    "rank of a gate": (lambda: call(g=g[..., None]), errors.ShapeMismatch, r"g has 4 dimensions"),
    "heads": (
        lambda: call(q=torch.cat([q, q[:, :, :1]], 2)),
        errors.HeadCountMismatch,
        "q has 3 heads but k has 4(.|\n)*integer factor",
    ),
    "tokens": (
        lambda: call(k=k[:, :3]),
        errors.ShapeMismatch,
        "k has T = 3 but q has T = 5(.|\n)*same number of tokens",
    ),
    "batch": (lambda: call(v=v[:1]), errors.ShapeMismatch, "v has B = 1 but q has B = 2"),
    "dim": (
        lambda: call(k=k[..., :2]),
        errors.ShapeMismatch,
        "k has K = 2 but q has K = 3(.|\n)*calls.py",
    ),
    "dtype": (lambda: call(q=q.long()), errors.DtypeMismatch, r"q is torch\.int64"),
    "mix of dtypes": (
        lambda: call(v=v.float()),
        errors.DtypeMismatch,
        r"v is torch\.float32 but q is torch\.float64(.|\n)*v\.to\(q\.dtype\)",
    ),
    "dtype of a gate": (
        lambda: call(g=g.half()),
        errors.DtypeMismatch,
        r"g is torch\.float16 but q is torch\.float64(.|\n)*g\.float\(\)",
    ),
    "device": (
        lambda: call(k=k.to("meta")),
        errors.DeviceMismatch,
        r"k is on meta but q is on cpu(.|\n)*k\.to\(q\.device\)",
    ),
    "unknown name": (
        lambda: call(beta=g),
        errors.InvalidArgument,
        "gated got an unknown argument 'beta'(.|\n)*q, k, v, g, u",
    ),
    "missing": (lambda: gated(q, k, v, g), errors.InvalidArgument, "misses the argument 'u'"),
    "too many": (lambda: gated(q, k, v, g, u, u), errors.InvalidArgument, "got 6 positional"),
    "twice": (lambda: gated(q, k, v, g, u, q=q), errors.InvalidArgument, "got 'q' twice"),
    "no tensor": (
        lambda: call(q=numpy.zeros((2, 5, 2, 3))),
        errors.InvalidArgument,
        "got ndarray for 'q'",
    ),
    "state shape": (
        lambda: call(initial_state=state().mT),
        errors.InvalidState,
        r"S of initial_state has shape \[2, 4, 2, 3\](.|\n)*\[2, 4, 3, 2\](.|\n)*torch\.zeros\(2, 4, 3, 2",
    ),
    "state rank": (
        lambda: call(initial_state=state()[0]),
        errors.InvalidState,
        r"S of initial_state has shape \[4, 3, 2\]",
    ),
    "state dtype": (
        lambda: call(initial_state=state().float()),
        errors.InvalidState,
        r"S of initial_state is torch\.float32(.|\n)*to\(torch\.float64\)",
    ),
    "state count": (
        lambda: call(initial_state=(state(), state())),
        errors.InvalidState,
        r"initial_state has 2 tensors(.|\n)*gated has 1 states: S\[K, V\]",
    ),
    "state of documents": (
        lambda: gated(*arguments(B=1, T=7), cu_seqlens=offsets(0, 3, 7), initial_state=state(1)),
        errors.InvalidState,
        r"number of documents(.|\n)*torch\.zeros\(2, 4, 3, 2",
    ),
    "offsets' dtype": (
        lambda: packed(offsets(0, 3, 7, dtype=torch.int64)),
        errors.InvalidCuSeqlens,
        r"cu_seqlens is torch\.int64(.|\n)*to\(torch\.int32\)",
    ),
    "offsets' shape": (
        lambda: packed(offsets(0, 3, 7)[None]),
        errors.InvalidCuSeqlens,
        r"cu_seqlens has shape \[1, 3\](.|\n)*\[N \+ 1\]",
    ),
    "offsets with a batch": (
        lambda: call(cu_seqlens=offsets(0, 3, 5)),
        errors.InvalidCuSeqlens,
        "a batch of 2(.|\n)*B = 1",
    ),
    "offsets start": (
        lambda: packed(offsets(1, 3, 7)),
        errors.InvalidCuSeqlens,
        r"cu_seqlens = \[1, 3, 7\] with T = 7",
    ),
    "offsets end": (
        lambda: packed(offsets(0, 3, 6)),
        errors.InvalidCuSeqlens,
        r"cu_seqlens = \[0, 3, 6\] with T = 7(.|\n)*end at T",
    ),
    "offsets decrease": (
        lambda: packed(offsets(0, 5, 3, 7)),
        errors.InvalidCuSeqlens,
        r"cu_seqlens = \[0, 5, 3, 7\](.|\n)*never decrease",
    ),
    "offsets are a list": (
        lambda: packed([0, 3, 7]),
        errors.InvalidArgument,
        "got list for 'cu_seqlens'",
    ),
    "step with T": (
        lambda: gated.step(q, k, v, g, u),
        errors.ShapeMismatch,
        r"q has 4 dimensions(.|\n)*\[B, H, K\]",
    ),
    "bound": (
        lambda: gated.with_options(debug=True)(q, k, v, g - 6, u),
        errors.BoundViolated,
        r"g has values in \[-6\.\d+, -6\.\d*\](.|\n)*\[-5, 0\]",
    ),
    "triton without a GPU": (
        lambda: gated.with_options(implementation="triton")(*arguments(dtype=torch.float32)),
        errors.ImplementationUnavailable,
        'implementation="triton" cannot run gated here(.|\n)*(CUDA|not installed)(.|\n)*"auto"',
    ),
    "source without kernels": (
        lambda: gated.source(*arguments()),
        errors.ImplementationUnavailable,
        "no generated kernels",
    ),
    "option": (
        lambda: gated.with_options(chunksize=64),
        errors.InvalidOption,
        "no option 'chunksize'(.|\n)*implementation, chunk_size, debug",
    ),
    "implementation": (
        lambda: gated.with_options(implementation="cuda"),
        errors.InvalidOption,
        "'cuda' does not exist(.|\n)*auto, triton, torch, reference",
    ),
    "chunk size": (
        lambda: gated.with_options(chunk_size=0),
        errors.InvalidOption,
        "chunk_size=0 is not a positive integer",
    ),
    "debug": (lambda: gated.with_options(debug=1), errors.InvalidOption, "debug=1 is not a bool"),
    "variable": (
        lambda: Environment.read({"LMOE_DEBG": "fx"}),
        errors.InvalidOption,
        "no environment variable LMOE_DEBG(.|\n)*LMOE_DEBUG",
    ),
    "stage": (
        lambda: Environment.read({"LMOE_DEBUG": "fx,ptx"}),
        errors.InvalidOption,
        "LMOE_DEBUG=fx,ptx: there is no stage 'ptx'(.|\n)*chunk",
    ),
    "flag": (
        lambda: Environment.read({"LMOE_VERIFY": "yes"}),
        errors.InvalidOption,
        "LMOE_VERIFY=yes is neither 0 nor 1",
    ),
}


@pytest.mark.parametrize(("bad", "error", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(bad, error, text, monkeypatch):
    def no_work(*_):
        raise AssertionError("work began before the check")

    if error not in (errors.BoundViolated, errors.ImplementationUnavailable):
        monkeypatch.setattr(kernels, "choose", no_work)
    with pytest.raises(error) as caught:
        bad()
    assert re.search(text, str(caught.value)), str(caught.value)
    assert caught.value.what
    assert caught.value.try_ or "variable" in caught.value.what


def test_good_values_pass():
    assert Environment.read({"LMOE_DEBUG": "ir, fx", "LMOE_VERIFY": "1"}).debug == {"ir", "fx"}
    assert Environment.read({"LMOE_DEBUG": "all"}).debug >= {"triton", "chunk"}
    options = Options(implementation="torch", chunk_size=32, debug=True)
    assert Options.parse(options.text) == options
    assert Options.parse("") == Options()


def test_gates_may_stay_in_float32_and_fewer_heads_are_fine():
    inputs = arguments(dtype=torch.bfloat16)
    assert gated(*inputs[:3], *(x.float() for x in inputs[3:])).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", ["tokens", "heads", "mix of dtypes", "state shape"])
def test_compiled_models_report_the_same(bad):
    call_, error, text = BAD_CALLS[bad]
    with pytest.raises(Exception, match=f"{error.__name__}: ") as caught:
        torch.compile(call_, backend="eager", fullgraph=True)()
    assert re.search(text.split("(.|")[0], str(caught.value))


def test_an_error_prints_its_parts():
    error = errors.ShapeMismatch("what", where="where", why="why", try_="one\ntwo")
    assert str(error) == "what\n  where: where\n  why:   why\n  try:   one\n         two"


@pytest.fixture
def variables(monkeypatch):
    """Set LMOE_* variables for one test."""

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        environment.cache_clear()

    yield put
    monkeypatch.undo()
    environment.cache_clear()


def test_verify_finds_a_wrong_lowering(variables, monkeypatch):
    variables(LMOE_VERIFY="1")
    gated(*arguments())
    run = kernels.choose

    def wrong(*args):
        found = run(*args)
        return lambda *call: (found(*call)[0] + 1e-6, *found(*call)[1:])

    monkeypatch.setattr(kernels, "choose", wrong)
    with pytest.raises(errors.WrongResult, match=r"the output of gated has a relative error of \d"):
        gated(*arguments())


def test_debug_prints_stages_of_a_recurrence_once(variables, capsys):
    variables(LMOE_DEBUG="ir,chunk")
    fresh = replace(gated, options=Options(debug=True))
    fresh(*arguments())
    fresh(*arguments())
    printed = capsys.readouterr().err
    assert printed.count("-- ir: gated, recurrence IR ") == 1
    assert printed.count("-- chunk: gated, chunk program ") == 1
    assert "analysis" not in printed


def test_auto_falls_back_and_says_so_once():
    """Kernels have no float64; on a GPU such a call runs with torch, after one warning with the reason."""
    on_gpu = [layout.Spec(x.shape, x.dtype, torch.device("cuda")) for x in arguments()]
    implementation._say_once.cache_clear()
    with pytest.warns(errors.FallbackWarning, match=r"gated runs with torch(.|\n)*float64"):
        chosen = implementation.choose("scan", gated.ir, on_gpu, Options())
    assert chosen.__module__ == implementation.TORCH
    with warnings.catch_warnings(action="error"):
        implementation.choose("scan", gated.ir, on_gpu, Options())
    with pytest.raises(errors.ImplementationUnavailable, match="float64"):
        implementation.choose("scan", gated.ir, on_gpu, Options(implementation="triton"))


def test_vmap_over_offsets_is_refused():
    inputs = arguments(B=1, T=7)
    packings = torch.stack([offsets(0, 3, 7), offsets(0, 5, 7)])
    with pytest.raises(errors.UnsupportedTransform, match="cu_seqlens of gated"):
        torch.func.vmap(lambda c: gated(*inputs, cu_seqlens=c))(packings)


@pytest.mark.parametrize("made", [gated, lmoe.parse(gated.text())], ids=["step", "text"])
def test_a_recurrence_is_pickled_with_its_options(made):
    restored = pickle.loads(pickle.dumps(made.with_options(chunk_size=8)))
    assert (restored.text(), restored.options) == (made.text(), Options(chunk_size=8))
    assert copy.deepcopy(made) is made


def test_a_recurrence_that_no_name_leads_to_is_refused_when_it_is_pickled():
    """And not when it is loaded, which may be after days of training."""

    def made():
        @lmoe.recurrence
        def local(S: State[K_, V_], q: Token[K_], k: Token[K_], v: Token[V_]):
            S = S + torch.outer(k, v)
            return S, S.T @ q

        return local

    with pytest.raises(pickle.PicklingError, match="at the top of a module"):
        pickle.dumps(made())
    other = lmoe.recurrence(gated.definition)
    with pytest.raises(pickle.PicklingError, match="is not this recurrence"):
        pickle.dumps(other)
    text = lmoe.parse(str(other.ir))
    assert pickle.loads(pickle.dumps(text)).text() == text.text()


def test_a_recurrence_prints_its_declarations():
    assert repr(gated) == "<recurrence gated: S[K, V]; q[K], k[K], v[V], g, u[K]>"
    assert "chunk_size=8" in repr(gated.with_options(chunk_size=8))


def test_any_name_that_python_takes_is_an_input():
    @lmoe.recurrence
    def odd(S: State[K_, V_], self: Token[K_], r: Token[K_], größe: Token[V_]):
        S = S + torch.outer(r, größe)
        return S, S.T @ self

    q, k, v, *_ = arguments()
    assert lmoe.parse(str(odd.ir)).ir == odd.ir
    torch.testing.assert_close(odd(q, r=k, größe=v), odd.reference(self=q, r=k, größe=v))
    assert odd.step(self=q[:, 0], r=k[:, 0], größe=v[:, 0])[0].shape == v[:, 0].shape


def test_no_sequences_give_no_outputs():
    inputs = [x[:0] if x.dim() > 2 else x for x in arguments()]
    output, final = gated(*inputs, return_state=True)
    assert output.shape[0] == final.shape[0] == 0


def test_the_reference_checks_shapes_too():
    q, k, v, g, u = arguments()
    for r in (gated.reference, gated.with_options(implementation="reference")):
        with pytest.raises(errors.ShapeMismatch, match="v has T"):
            r(q, k, v[:, :3], g, u)


def test_what_a_step_makes_itself_is_made_where_its_inputs_are():
    """`torch.eye(n)` in a step, on a device that is not the default one."""
    recurrence = ROWS["delta_product_multiplied_out"].recurrence
    sizes, lead = {"K": 3, "V": 4, "N": 2}, {"token": (2, 5, 2), "head": (2,)}
    shapes = [(*lead[v.kind], *(sizes[a] for a in v.axes)) for v in recurrence.inputs]
    output = recurrence.reference(*(torch.empty(shape, device="meta") for shape in shapes))
    assert (output.device.type, output.shape) == ("meta", (2, 5, 2, 4))

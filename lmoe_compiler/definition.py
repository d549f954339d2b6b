"""Stop 1 of the walk: `@lmoe.recurrence` turns a step function for one token into a Recurrence.

Reads the signature (names, State/Token/Head, dims), keeps the function as its own reference, and gives the program
that trace.py and analysis/ prove from it. What a call does is in call.py.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from operator import attrgetter
from pickle import PicklingError
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints, overload

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from lmoe_compiler import call, checks, stages
from lmoe_compiler.analysis import analyse, check
from lmoe_compiler.analysis.report import Proved
from lmoe_compiler.config import Options
from lmoe_compiler.dims import Dim, Head, State, Token
from lmoe_compiler.errors import BadBound, BadSignature, UnknownAnnotation
from lmoe_compiler.ir import interpret
from lmoe_compiler.ir.nodes import Bound, Loc, Program, Var
from lmoe_compiler.ir.parse import parse as parse_text
from lmoe_compiler.ir.sequence import over_tokens
from lmoe_compiler.ir.spec import RESERVED_DIMS, RESERVED_NAMES, verify
from lmoe_compiler.ir.text import one_line, print_program
from lmoe_compiler.operations import another
from lmoe_compiler.trace import default_float, differentiates, trace

Bounds = Mapping[str, tuple[float, float]]
KINDS: dict[object, Literal["state", "token", "head"]] = {
    State: "state",
    Token: "token",
    Head: "head",
}
EXAMPLE = """from lmoe_compiler.dims import K, V

@lmoe.recurrence
def linear_attention(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, S.T @ q"""


# Not equal by its fields: torch 2.11 asks for the hash of one that a traced `with_options` has yet to fill in.
@dataclass(frozen=True, eq=False, repr=False)
class Recurrence:
    """A recurrence over sequences. `definition` is the user's step function (None if it was given as IR).

    states, inputs: the declared names, in the order of the signature.
    """

    name: str
    states: tuple[Var, ...]
    inputs: tuple[Var, ...]
    bounds: tuple[Bound, ...] = ()
    static_dims: tuple[str, ...] = ()
    definition: Callable[..., tuple[Tensor, ...]] | None = None
    given: Program | None = None
    options: Options = field(default_factory=Options)
    # What `with_options` was called on: it keeps the proofs, and it is there before torch.compile traces.
    origin: Recurrence | None = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """o [B, T, H, ...] of tokens [B, T, H, ...] and heads [H, ...]; call.py has the whole contract."""
        return call.scan(self, *args, **kwargs)

    def step(self, /, *args: Any, **kwargs: Any) -> Any:
        """One decode step: inputs [B, H, ...], `state=` [B, H, ...] -> (o, next state).

        With `inplace=True` the state tensors are overwritten with the next state and returned: what a decode loop
        wants, and what a CUDA graph can replay. There is no gradient through it.
        """
        return call.step(self, *args, **kwargs)

    def with_options(self, **changes: Any) -> Recurrence:
        """The same recurrence, run with other options."""
        return replace(self, options=self.options.with_(changes), origin=self.origin or self)

    def program(self, **sizes: int) -> Program:
        """The proved program; static dims need their length: `r.program(N=3)`."""
        if self.given is not None:
            return self.given
        missing = [dim for dim in self.static_dims if dim not in sizes]
        if missing:
            raise BadSignature(
                f"{self.name} needs the length of its static dim {missing[0]}",
                why="the step loops over it, so each length is a program of its own",
                try_=f"r.program({', '.join(f'{dim}=2' for dim in self.static_dims)})",
            )
        assert self.definition is not None
        static = tuple((dim, sizes[dim]) for dim in self.static_dims)
        given = (self.name, self.definition, self.states, self.inputs, self.bounds, static)
        # In a thread of its own, because dispatch modes, autocast, torch.func's levels and the default device
        # of whoever makes the first call are the calling thread's, and not part of the definition.
        # The mode of torch.export is the process's.
        with ThreadPoolExecutor(1) as apart, disable_proxy_modes_tracing():
            return apart.submit(_proved, *given).result()

    @cached_property
    def ir(self) -> Program:
        """The program; of a recurrence with static dims, the one where each has length 2."""
        return self.program(**dict.fromkeys(self.static_dims, 2))

    def text(self, **sizes: int) -> str:
        """The printed program on one line: the first argument of the ops in library.py."""
        key = tuple(sizes.items())
        if key not in self._texts:
            program = self.program(**sizes)
            stages.announce(program)
            self._texts[key] = one_line(print_program(program))
        return self._texts[key]

    @cached_property
    def _texts(self) -> dict[tuple[tuple[str, int], ...], str]:
        return {}

    @property
    def transition(self) -> Proved:
        """What the analysis proved: `.kind`, `.states`, `.form`; `str()` of it is the report."""
        return Proved(self.ir)

    def explain(self, /, *args: Any, **kwargs: Any) -> str:
        """Every stage of this recurrence as text, for these arguments if given."""
        return call.explain(self, *args, **kwargs)

    def source(self, /, *args: Any, **kwargs: Any) -> str:
        """The generated kernels for these arguments, as text."""
        return call.source(self, *args, **kwargs)

    def reference(
        self,
        /,
        *args: Tensor,
        initial_state: Tensor | Sequence[Tensor] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **named: Tensor,
    ) -> Any:
        """The definition itself, looped over T and vmapped over B and H; any dtype, differentiable."""
        inputs = self.bind(args, named)
        if not torch.compiler.is_compiling():
            checks.check_shapes(self.program(**call.static_sizes(self, inputs)), inputs)
        single = len(self.states) == 1
        states = [initial_state] if isinstance(initial_state, Tensor) else initial_state
        output, finals = self.run_reference(inputs, states, cu_seqlens)
        if not return_state:
            return output
        return output, finals[0] if single else tuple(finals)

    def run_reference(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor] | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`reference` with inputs and states as lists; output in the first token's dtype."""
        first = next(i for i, v in enumerate(self.inputs) if v.kind == "token")
        dtype = torch.float32
        for x in (*inputs, *(states or ())):
            dtype = torch.promote_types(dtype, x.dtype)
        wide = [x.to(dtype) for x in inputs]
        old = None if states is None else [x.to(dtype) for x in states]
        if self.definition is None:
            assert self.given is not None
            output, finals = interpret.run(self.given, wide, old, cu_seqlens)
        else:
            step = _batched(self.definition, self.inputs)
            # What the step makes itself is made where the inputs are; Dynamo enters no device.
            device = nullcontext() if torch.compiler.is_compiling() else inputs[first].device
            with default_float(dtype), device:
                output, finals = over_tokens(step, self.states, self.inputs, wide, old, cu_seqlens)
        return output.to(inputs[first].dtype), finals

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a function is, by its name; a recurrence that was given as IR, by its text."""
        if self.definition is None:
            return _restore, ("", self.text(), self.options)
        module, name = self.definition.__module__, self.definition.__qualname__
        try:
            found = attrgetter(name)(sys.modules[module])
        except (AttributeError, KeyError):
            found = None
        if found is not (self.origin or self):
            raise PicklingError(
                f"{self.name} cannot be pickled: {module}.{name} is not this recurrence. Define it with @recurrence "
                f"under that name at the top of a module, or pickle lmoe.parse(str({self.name}.ir))."
            )
        return _restore, (module, name, self.options)

    def __repr__(self) -> str:
        """The declarations, as in the IR's text: `<recurrence gla: S[K, V]; q[K], k[K], v[V], g[K]>`."""
        states, inputs = (
            ", ".join(map(str, variables)) for variables in (self.states, self.inputs)
        )
        return f"<recurrence {self.name}: {states}; {inputs}{self.options.text and f'; {self.options.text}'}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Recurrence:
        return self

    def bind(self, args: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        """Positional and named inputs in the signature's order."""
        return call.bind(self, args, named)


def _restore(module: str, name: str, options: Options) -> Recurrence:
    """The recurrence of that name, or of that text."""
    found = attrgetter(name)(importlib.import_module(module)) if module else parse(name)
    assert isinstance(found, Recurrence), found
    return found if found.options == options else found.with_options(**options.changes)


# Dynamo calls `text` while tracing and takes its result as a constant: torch.compiler.assume_constant_result without
# the import of torch._dynamo that comes with it.
Recurrence.text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _batched(
    definition: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Var]
) -> Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], Tensor]]:
    """The step of one token of one head, over [B, H].

    One level of vmap over both: on CUDA torch 2.11's `logsigmoid` does not run under two.
    """
    over_both = torch.func.vmap(definition)

    def step(now: Sequence[Tensor], token: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        lead = now[0].shape[:2]
        rows = [
            x if var.kind == "token" else x.expand(lead[0], *x.shape)
            for var, x in zip(inputs, token, strict=True)
        ]
        *new, output = over_both(*(x.flatten(0, 1) for x in (*now, *rows)))
        return [x.unflatten(0, lead) for x in new], output.unflatten(0, lead)

    return step


@cache
def _proved(
    name: str,
    definition: Callable[..., Any],
    states: tuple[Var, ...],
    inputs: tuple[Var, ...],
    bounds: tuple[Bound, ...],
    static: tuple[tuple[str, int], ...],
) -> Program:
    traced = trace(name, definition, states, inputs, static)
    return check(traced, verify(analyse(traced, bounds)))


@overload
def recurrence(step: Callable[..., Any], /, *, bounds: Bounds | None = None) -> Recurrence: ...
@overload
def recurrence(
    step: None = None, /, *, bounds: Bounds | None = None
) -> Callable[[Callable[..., Any]], Recurrence]: ...
def recurrence(
    step: Callable[..., Any] | None = None, /, *, bounds: Bounds | None = None
) -> Recurrence | Callable[[Callable[..., Any]], Recurrence]:
    """Make a recurrence of a step function `(states..., inputs...) -> (next states..., output)`.

    The arguments are annotated `State[K, V]`, `Token[K]`, `Token` (a number per token), `Head[K]`, `Head`.
    bounds: what is known of inputs, `{"g": (-5, 0)}`; a debug mode checks it.
    """
    scope = sys._getframe(1).f_locals
    made = partial(_recurrence, bounds=bounds or {}, scope=dict(scope))
    return made if step is None else made(step)


def parse(text: str) -> Recurrence:
    """A recurrence from IR text, callable like a decorated one."""
    return from_program(verify(parse_text(text)))


def from_program(program: Program) -> Recurrence:
    """A recurrence from a program that was built by hand."""
    verify(program)
    return Recurrence(program.name, program.states, program.inputs, program.bounds, given=program)


def _recurrence(
    step: Callable[..., Any], *, bounds: Bounds, scope: Mapping[str, Any]
) -> Recurrence:
    _refuse_others(step)
    loc = line_of(step)
    hints = _hints(step, scope, loc)
    dims: dict[str, type[Dim]] = {}
    declared = [
        _var(step, parameter, hints, dims, loc)
        for parameter in inspect.signature(step).parameters.values()
    ]
    states = tuple(v for v in declared if v.kind == "state")
    inputs = tuple(v for v in declared if v.kind != "state")
    if declared[: len(states)] != list(states) or not states:
        _bad(
            loc,
            "states come first, and there is at least one",
            f"got {step.__name__}({', '.join(v.name for v in declared)})",
        )
    if all(v.kind != "token" for v in inputs):
        _bad(loc, "there is no Token argument", "the sequence comes in by tokens")
    known = _bounds(bounds, inputs, loc)
    static = tuple(name for name, dim in dims.items() if dim.static)
    made = Recurrence(step.__name__, states, inputs, known, static, step)
    # Mistakes are raised here, where the step is written, and so is a program that does not do what the step does.
    if not differentiates(step.__code__):
        assert made.ir
    return made


def _refuse_others(step: object) -> None:
    """Raise BadSignature for what is not a plain Python function."""
    plain = inspect.isfunction(step) or inspect.ismethod(step)
    asks = inspect.iscoroutinefunction(step) or inspect.isgeneratorfunction(step)
    if plain and not asks:
        return
    kind = f"a {type(step).__name__}"
    if asks:
        kind = "a function with `async` or `yield`"
    elif isinstance(step, Recurrence):
        kind = f"{step.name}, which is a recurrence already"
    raise BadSignature(
        f"recurrence() got {kind}",
        why="a step is a plain function (def) or a method of an object",
        try_=EXAMPLE,
    )


def line_of(step: Callable[..., Any]) -> Loc:
    code = step.__code__
    return Loc(code.co_filename, code.co_firstlineno)


def _hints(step: Callable[..., Any], scope: Mapping[str, Any], loc: Loc) -> dict[str, Any]:
    """Annotations with strings resolved in the scope of the decorator and in the step's closure."""
    closure = inspect.getclosurevars(step).nonlocals
    try:
        return get_type_hints(step, localns={**scope, **closure})
    except NameError as error:
        raise UnknownAnnotation(
            f"annotation of {step.__name__}: {error}", where=str(loc),
            why="the annotation names something that is not visible where the step is defined",
            try_=EXAMPLE,
        ) from None  # fmt: skip


def _var(
    step: Callable[..., Any],
    parameter: inspect.Parameter,
    hints: Mapping[str, Any],
    dims: dict[str, type[Dim]],
    loc: Loc,
) -> Var:
    name = parameter.name
    if (
        parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
        or parameter.default is not parameter.empty
    ):
        _bad(
            loc,
            f"argument {name!r} is not a plain one: {_unusual(parameter)}",
            "inputs are tensors that every call passes, by position or by name",
        )
    hint = hints.get(name)
    kind = KINDS.get(get_origin(hint) or hint)
    axes = get_args(hint)
    if kind is None or not all(isinstance(a, type) and issubclass(a, Dim) for a in axes):
        given = "has no annotation" if hint is None else f"is annotated {hint}"
        raise UnknownAnnotation(
            f"{step.__name__}: argument {name!r} {given}", where=str(loc),
            why="every argument is State[...], Token[...], Token, Head[...] or Head, of classes derived from lmoe.Dim",
            try_=EXAMPLE,
        )  # fmt: skip
    if kind != "state" and name in RESERVED_NAMES:
        _bad(
            loc,
            f"an input is called {name!r}",
            f"calls have {', '.join(RESERVED_NAMES)} of their own",
        )
    for dim in axes:
        if dim.__name__ in RESERVED_DIMS:
            _bad(loc, f"a dim is called {dim.__name__}", RESERVED_DIMS[dim.__name__])
        if dims.setdefault(dim.__name__, dim) is not dim:
            _bad(
                loc,
                f"two different dims are called {dim.__name__}",
                "a dim's name is its axis's name",
            )
    names: list[str] = []
    for dim in axes:
        names.append(another(dim.__name__, names))
    return Var(name, kind, tuple(names), loc)


def _unusual(parameter: inspect.Parameter) -> str:
    if parameter.default is not parameter.empty:
        return f"it has the default {parameter.default!r}"
    return f"it is {parameter.kind.description}"


def _bounds(bounds: Bounds, inputs: Sequence[Var], loc: Loc) -> tuple[Bound, ...]:
    for name, bound in bounds.items():
        pair = isinstance(bound, (tuple, list)) and len(bound) == 2
        if all(name != v.name for v in inputs) or not pair or not bound[0] <= bound[1]:
            raise BadBound(
                f"bounds={{{name!r}: {bound}}}", where=str(loc),
                why=f"a bound is (low, high) with low <= high, of an input: {', '.join(v.name for v in inputs)}",
                try_=f'@lmoe.recurrence(bounds={{"{inputs[-1].name}": (-5, 0)}})',
            )  # fmt: skip
    return tuple(Bound(name, float(low), float(high)) for name, (low, high) in bounds.items())


def _bad(loc: Loc, what: str, why: str) -> NoReturn:
    raise BadSignature(what, where=str(loc), why=why, try_=EXAMPLE)

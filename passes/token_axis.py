"""Which values of a Dynamo graph carry the token axis T, and what each node does along it.

T is a symbol, so an axis carries it if its size is an expression in T (B*T after flattening). Every
node is run once more on its fake operands; the ATen ops below it are classified, so a spelling in
the model needs no rule of its own:

    token-wise   row t of the result depends on row t of the operands only: stays as it is on a
                 shard
    marked       an op of ours that mixes tokens; a pass gives it its state, halo or keys
    shift        pad(x, (0, 0, n, -n)) along T: every token gets the one n before it (halo.py)
    sum, mean    a reduction over tokens: becomes one over all ranks (losses.py)
    position     arange(T): shifted by the shard's offset
    count        a number made of T that meets a tensor: the global count

Anything else mixes tokens in a way that no pass knows, and is refused by name. Where sequences are
whole on every rank (`cut=False`: other ranks hold other rows of the batch) tokens may mix, as long as
their axis stays; what makes a number of all tokens has to be a sum, a mean or a loss as before. In:
the graph of torch.compile. Out: `Tokens`. Next: sequence_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_compiler.errors import MixesTokens, StaticSequence
from lmoe_compiler.passes.splice import fake_values, run, where

MARKED = frozenset({"scan", "short_conv", "attention", "experts"})
LOSSES = frozenset({torch.nn.functional.cross_entropy})

_SHAPE = frozenset(
    "permute transpose t unsqueeze squeeze expand clone _to_copy detach alias copy_ "
    "lift_fresh_copy empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full empty zeros "
    "ones full scalar_tensor bernoulli bernoulli_ rand_like randn_like native_dropout embedding "
    "_assert_tensor_metadata".split()
)
_WITHOUT_VALUES = frozenset(
    "empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full empty zeros ones "
    "full scalar_tensor sym_size _assert_tensor_metadata".split()
)
_POINTWISE = frozenset({"floor_divide", "remainder", "fmod"})  # torch leaves these untagged
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias"})
_ALONG = frozenset(
    "sum mean amax amin max min argmax argmin any all prod var std var_mean logsumexp topk sort "
    "linalg_vector_norm _softmax _log_softmax softmax log_softmax cumsum cumprod logcumsumexp "
    "gather scatter scatter_add index_select index_add cat stack split split_with_sizes slice select "
    "narrow flip roll unbind glu repeat_interleave unfold constant_pad_nd searchsorted".split()
)
_PRODUCTS = {"mm": (1, 0), "addmm": (1, 0), "bmm": (2, 1), "baddbmm": (2, 1), "mv": (1, 0)}
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "rms_norm"})


@dataclass
class Tokens:
    """What was found: the symbol T, and per kind the nodes in graph order."""

    symbol: sympy.Symbol
    source: fx.Node  # an input with T as its dimension `dim`
    dim: int
    marked: list[fx.Node] = field(default_factory=list)
    losses: list[fx.Node] = field(default_factory=list)
    reductions: list[fx.Node] = field(default_factory=list)
    positions: list[fx.Node] = field(default_factory=list)
    counts: list[fx.Node] = field(default_factory=list)
    shifts: dict[fx.Node, int] = field(default_factory=dict)  # and by how many tokens

    def in_(self, value: object) -> bool:
        """Whether a value has T in a size, or is a number made of it."""
        return bool(axes_with(value, self.symbol))


def axes_with(value: object, symbol: sympy.Symbol) -> list[int]:
    """Dimensions of a tensor that carry the symbol; [0] for a number that does."""
    if isinstance(value, Tensor):
        return [d for d, size in enumerate(value.shape) if _has(size, symbol)]
    if isinstance(value, tuple | list):
        return sorted({d for item in value for d in axes_with(item, symbol)})
    return [0] if _has(value, symbol) else []


def expression(size: object) -> sympy.Expr | None:
    """The symbolic size, or None for a plain number."""
    node = getattr(size, "node", None)
    return None if node is None else node.expr


def _has(size: object, symbol: sympy.Symbol) -> bool:
    expr = expression(size)
    return expr is not None and symbol in expr.free_symbols


def operator(node: fx.Node) -> str | None:
    """The name of an op of ours ("scan"), else None."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, name = str(target._qualified_op_name).split("::")
        return name if space == "lmoe" else None
    return None


def documents_of(node: fx.Node) -> object:
    """The `cu_seqlens` argument of a marked op, None where there is none."""
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    names = [argument.name for argument in packet.default._schema.arguments]
    if "cu_seqlens" not in names:
        return None
    place = names.index("cu_seqlens")
    return node.args[place] if place < len(node.args) else node.kwargs.get("cu_seqlens")


def analyse(gm: fx.GraphModule, sequence_dim: int, cut: bool = True) -> Tokens:
    """Classify every node; raises MixesTokens at the first that no rule covers. `cut`: whether a
    sequence is spread over ranks, not only the batch.
    """
    tokens = _find_sequence(gm, sequence_dim)
    for node in gm.graph.nodes:
        # What passes have put in is theirs to know.
        if node.op not in ("call_function", "call_method") or "lmoe" in node.meta:
            continue
        operands = [n.meta.get("example_value") for n in node.all_input_nodes]
        if operator(node) in MARKED:
            tokens.marked.append(node)
            node.meta["lmoe_documents"] = documents_of(node) is not None
        elif not any(tokens.in_(x) for x in operands):
            continue
        elif node.target in LOSSES:
            tokens.losses.append(node)
        else:
            with fake_values(gm):
                _classify(node, tokens, cut)
    return tokens


def _find_sequence(gm: fx.GraphModule, dim: int) -> Tokens:
    static = None
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op != "placeholder" or not isinstance(value, Tensor) or _is_parameter(node):
            continue
        if value.dim() <= dim:
            continue
        expr = expression(value.shape[dim])
        if isinstance(expr, sympy.Symbol):
            return Tokens(expr, node, dim)
        static = static or node
    raise StaticSequence(
        f"no input has a symbolic size in dimension {dim}",
        where=f"input {static.name} of shape {tuple(static.meta['example_value'].shape)}"
        if static
        else "",
        why="passes tell the token axis from others by its symbol",
        try_=f"lmoe.compile(model, ..., sequence_dim={dim})",
    )


def _is_parameter(node: fx.Node) -> bool:
    return (
        isinstance(node.meta.get("example_value"), torch.nn.Parameter) or "parameters" in node.name
    )


def _classify(node: fx.Node, tokens: Tokens, cut: bool) -> None:
    watch = (_Watch if cut else _WatchRows)(tokens.symbol)
    with watch, torch.no_grad():
        run(node)
    if watch.problem:
        raise MixesTokens(
            f"{_name(node)} mixes tokens, and no pass knows how",
            where=where(node),
            why=watch.problem,
            try_="mix tokens by a recurrence, by torch.ops.lmoe.attention or short_conv, or shift them by\n"
            "models.short_convolution.token_shift(x) or F.pad(x, (0, 0, n, -n)): passes know these",
        )
    if watch.shift:
        tokens.shifts[node] = watch.shift
    for kind, nodes in (
        ("sum", tokens.reductions),
        ("position", tokens.positions),
        ("count", tokens.counts),
    ):
        if kind in watch.found:
            nodes.append(node)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


class _Watch(TorchDispatchMode):
    """Classifies the ATen ops that run under it."""

    def __init__(self, symbol: sympy.Symbol) -> None:
        super().__init__()
        self.symbol, self.found = symbol, set[str]()
        self.problems: list[tuple[Any, str]] = []  # with the result that has it
        self.shift, self.calls = 0, 0

    @property
    def problem(self) -> str:
        return next((why for _, why in self.problems), "")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if func.overloadpacket is torch.ops.aten._assert_async:
            # F.one_hot checks its ids: what a rank knows of its own tokens ends here.
            self.problems = [(x, why) for x, why in self.problems if x is not args[0]]
        elif why := self._problem(func, args, kwargs or {}, out):
            self.problems.append((out, why))
        return out

    def _problem(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> str:
        space, name = func.overloadpacket._qualified_op_name.split("::")
        tensors = list(_tensors(args))
        if space == "prim":
            return ""
        if not any(axes_with(x, self.symbol) for x in (*args, *kwargs.values(), out)):
            return ""
        if name == "arange":
            self.found.add("position")
            return ""
        if any(self._pairs(x) for x in _tensors((out,))):
            return f"{func} makes a value for every pair of tokens"
        if torch.Tag.pointwise in func.tags or name in _POINTWISE:
            if any(axes_with(x, self.symbol) for x in args if not isinstance(x, Tensor | list)):
                self.found.add("count")
            return ""
        if name in _SHAPE:
            return ""
        return self._structured(name, func, args, kwargs, tensors, out)

    def _structured(
        self, name: str, func: Any, args: Any, kwargs: Any, tensors: Any, out: Any
    ) -> str:
        if name in _VIEWS:
            # Rows that came back from experts have a size of their own, which is known to be T here only.
            same = self._behind(tensors[0]) in (None, self._behind(out))
            return "" if same else f"{func} moves tokens into another axis"
        if name in _PRODUCTS:
            left, right = tensors[-2:]
            a, b = _PRODUCTS[name]
            contracted = a in axes_with(left, self.symbol) or b in axes_with(right, self.symbol)
            return f"{func} sums over tokens" if contracted else ""
        if name in _NORMS:
            first = tensors[0].dim() - len(args[1])
            over = any(d >= first for d in axes_with(tensors[0], self.symbol))
            return f"{func} normalises over tokens" if over else ""
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            axes = [d for d, i in enumerate(args[1]) if i is not None]
            picked = set(axes) & set(axes_with(tensors[0], self.symbol))
            return f"{func} picks rows of other tokens" if picked else ""
        if name in _ALONG:
            return self._along(name, func, args, kwargs, tensors, out)
        return f"there is no rule for {func}"

    def _along(self, name: str, func: Any, args: Any, kwargs: Any, tensors: Any, out: Any) -> str:
        axes = _dims(func, args, kwargs, tensors)
        # Values are looked up in the first operand of searchsorted; the second may be tokens.
        operands = tensors[:1] if name == "searchsorted" else tensors
        if not set(axes) & {d for x in operands for d in axes_with(x, self.symbol)}:
            return ""
        if name in ("sum", "mean"):
            self.found.add("sum")
            return ""
        if name == "slice" and _same_size(out, tensors[0], axes[0]):
            return ""
        if name == "constant_pad_nd" and self.calls == 1 and not any(args[2:]):
            self.shift = _shift(args[1], tensors[0].dim() - axes_with(out, self.symbol)[0])
            if self.shift:
                return ""
        return f"{func} runs along the token axis"

    def _pairs(self, x: Tensor) -> bool:
        sizes = [expression(x.shape[d]) for d in axes_with(x, self.symbol)]
        degree = sum(
            sympy.degree(e, self.symbol)
            if e.is_polynomial(self.symbol)
            else 1  # T // n counts once
            for e in sizes
            if e is not None
        )
        return bool(degree > 1)

    def _behind(self, x: Tensor) -> object:
        """How many numbers lie behind one token, from its axis on; the same in any honest
        reshaping.
        """
        axes = axes_with(x, self.symbol)
        if not axes:
            return None
        behind: Any = 1
        for size in x.shape[axes[-1] + 1 :]:
            behind = behind * size
        return behind


class _WatchRows(_Watch):
    """The same where sequences are whole: only what leaves no token axis concerns other ranks."""

    def _problem(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> str:
        space, name = func.overloadpacket._qualified_op_name.split("::")
        pointwise = torch.Tag.pointwise in func.tags or name in _POINTWISE
        numbers = [x for x in args if not isinstance(x, Tensor | list)]
        if pointwise and any(axes_with(x, self.symbol) for x in numbers):
            self.found.add("count")
        operands = [x for x in _tensors(args) if axes_with(x, self.symbol)]
        results = list(_tensors((out,)))
        if space == "prim" or name in _WITHOUT_VALUES or not operands or not results:
            return ""
        if any(axes_with(x, self.symbol) for x in results):
            return ""
        if name in ("sum", "mean"):
            self.found.add("sum")
            return ""
        return f"{func} makes one value of all tokens, and other ranks have other rows"


def _shift(pad: Sequence[int], behind: int) -> int:
    """n where the pads are n and -n on the axis of that place from the end, and 0 elsewhere; else 0."""
    pairs = {place: pair for place, pair in enumerate(zip(pad[::2], pad[1::2], strict=True), 1)}
    first, last = pairs.pop(behind, (0, 0))
    others = any(a or b for a, b in pairs.values())
    return 0 if others or first <= 0 or first != -last else int(first)


def _same_size(a: Tensor, b: Tensor, dim: int) -> bool:
    left, right = expression(a.shape[dim]), expression(b.shape[dim])
    return left is not None and right is not None and sympy.simplify(left - right) == 0


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _dims(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> list[int]:
    """The dimensions that an ATen op runs along; all of them where it names none."""
    rank = max(x.dim() for x in tensors)
    if func.overloadpacket is torch.ops.aten.constant_pad_nd:
        return [rank - 1 - i // 2 for i, n in enumerate(args[1]) if n != 0]
    if func.overloadpacket is torch.ops.aten.searchsorted:
        return list(range(tensors[0].dim()))
    given: Any = None
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dim", "dims"):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if given is None and position >= len(args) and argument.name not in kwargs:
                given = argument.default_value
    if given is None or given == []:
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)]

"""Stop 8 of the walk: the `torch.compile` backend. Dynamo's graph -> our passes -> AOTAutograd -> Inductor.

    torch.compile(model, backend="lmoe", options={"inner": "aot_eager"})      # found by entry point
    lmoe.compile(model, mesh=mesh, sequence_parallel="sp")                    # the same with names

Recurrences and expert blocks arrive as single nodes; that is the mark that passes look for. Next: passes/__init__.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import fx
from torch.nn import Module
from torch.torch_version import TorchVersion

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.cuts import cuts_of
from lmoe_compiler.debug import show
from lmoe_compiler.errors import LmoeError, RanksDisagree
from lmoe_compiler.few_tokens import follow_tokens, real_tokens
from lmoe_compiler.parallel import check_cuts
from lmoe_compiler.passes import after_aot, after_autograd, pipeline
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.base import GraphRecord, PassPipeline, Record, readable
from lmoe_compiler.passes.match import find
from lmoe_compiler.runtime.agreement import give_up
from lmoe_compiler.runtime.mesh import lookup_only

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=Module)
# Inductor moves producers to their users and reorders for memory: what we put between a collective's start and its wait
# would run after the wait.
KEEP_ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False}
# A rank may have no token. A kernel that tiles two axes, one of them empty, divides by zero before torch 2.13.
ONE_TILED_AXIS = {"triton.max_tiles": 1} if TorchVersion(torch.__version__) < "2.13" else {}
Inner = Callable[[fx.GraphModule, Sequence[Any], CompileOptions, GraphRecord], Any]


def lmoe_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph of `torch.compile(..., backend="lmoe")`."""
    chosen = CompileOptions.of({"mode": mode, **(options or {})})
    record: Record = chosen.record or Record()
    graph = GraphRecord(record.texts, programs=_programs(gm))
    record.graphs.append(graph)
    show("fx", "graph of the model", lambda: readable(gm))
    with lookup_only():
        passes, axes = pipeline(chosen), Axes.of(chosen)
    try:
        passes.run(gm, graph)
    except RanksDisagree:
        raise
    except LmoeError as error:
        for axis in axes.agreeing:
            give_up(error, axis)
        raise
    inner = INNER_COMPILERS[chosen.inner]
    compiled: Callable[..., Any] = inner(gm, example_inputs, chosen, graph)
    return real_tokens(compiled, gm, chosen.sequence_dim) if axes.agreeing else compiled


def _programs(gm: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """The recurrences of a graph: (text, options), each once."""
    calls = find(gm, torch.ops.lmoe.scan, torch.ops.lmoe.step)
    return tuple(dict.fromkeys((str(node.args[0]), str(node.args[-1])) for node in calls))


def _inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: CompileOptions,
    graph: GraphRecord,
) -> Any:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    mode = list_mode_options(chosen.mode) if chosen.mode else {}
    own: dict[str, Any] = KEEP_ORDER if chosen.token_axes else {}
    if chosen.token_axes and not chosen.even_tokens:
        own = own | ONE_TILED_AXIS
    patches = {**mode, **own, **chosen.inductor}
    for place, passes in (
        ("joint_custom_pre_pass", after_autograd(chosen)),
        ("post_grad_custom_pre_pass", after_aot(chosen)),
    ):
        if passes:
            patches[place] = _for_inductor(PassPipeline(passes), graph)
    # In the key of torch's cache our ops are names; what is behind a name may have changed since.
    tag = f"{torch.compiler.config.cache_key_tag} lmoe {_sources()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(gm, example_inputs, config_patches=patches)


@cache
def _sources() -> str:
    """A digest of all our code."""
    digest = hashlib.sha256()
    for name in ("", ".models", ".passes", ".runtime"):
        spec = find_spec(f"lmoe_compiler{name}")
        assert spec is not None
        for place in spec.submodule_search_locations or ():
            for file in sorted(Path(place).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _for_inductor(passes: PassPipeline, graph: GraphRecord) -> Any:
    """The passes as Inductor runs them before its own; its caches ask for the uuid."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Passes(CustomGraphPass):
        def __call__(self, aten: fx.Graph) -> None:
            assert aten.owning_module is not None
            passes.run(aten.owning_module, graph)

        def uuid(self) -> str:
            return passes.uuid()

    return Passes()


def _aot_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: CompileOptions,
    graph: GraphRecord,
) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def lowered(direction: str, aten: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        PassPipeline(after_aot(chosen)).run(aten, graph)
        if graph.texts:
            graph.lowered.append((direction, readable(aten)))
        show("fx", f"{direction} after AOTAutograd", lambda: readable(aten))
        return make_boxed_func(aten.forward)

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        PassPipeline(after_autograd(chosen)).run(joint, graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    compiler = aot_autograd(
        fw_compiler=partial(lowered, "forward"),
        bw_compiler=partial(lowered, "backward"),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return compiler(gm, example_inputs)


def _eager(gm: fx.GraphModule, *_: Any) -> Any:
    return gm.forward


INNER_COMPILERS: dict[str, Inner] = {
    "inductor": _inductor,
    "aot_eager": _aot_eager,
    "eager": _eager,
}


@overload
def compile(model: M, /, **options: Any) -> M: ...
@overload
def compile(model: Callable[P, R], /, **options: Any) -> Callable[P, R]: ...
@overload
def compile(
    model: None = None, /, **options: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def compile(
    model: Any = None,
    /,
    *,
    fullgraph: bool | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """`torch.compile` with our backend, for a function or a module; also as a decorator, with or without arguments.

    fullgraph, dynamic: as in torch.compile; a model that is spread over ranks has to be one graph.
    options: those of config.CompileOptions (inner, disable, mesh, sequence_parallel, expert_parallel, expert_capacity,
    ...).
    """
    if model is None:
        return partial(compile, fullgraph=fullgraph, dynamic=dynamic, **options)
    if isinstance(model, Module):
        options["cuts"] = cuts_of(model)
    chosen = CompileOptions.of(options)
    spread = bool(chosen.token_axes or chosen.tensor_parallel)
    check_cuts(chosen)
    if spread:
        # Process groups are made here, on all ranks in one order, never in the middle of a compilation.
        pipeline(chosen)
    compiled = torch.compile(
        model,
        backend=lmoe_backend,
        options=options,
        fullgraph=spread if fullgraph is None else fullgraph,
        dynamic=dynamic,
    )
    return follow_tokens(compiled, chosen.sequence_dim) if spread else compiled

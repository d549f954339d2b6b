"""What a repeated call hands to the CUDA driver: order, grids and arguments of kernels, as the driver reads them."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import CASES, Sizes, make_inputs

from lmoe_compiler.bench import host
from lmoe_compiler.codegen import compiled, driver, launch, launcher
from lmoe_compiler.codegen.workspace import WORKSPACE
from lmoe_compiler.definition import Recurrence

pytest.importorskip("triton")


@dataclass
class Recorder(host.Driver):
    """Nodes by number, each after the one that it names; a launch records (function, grid, arguments) in that order."""

    nodes: list[list[int]] = field(default_factory=list)
    given: dict[int, tuple[int, int, list[int]]] = field(default_factory=dict)
    launched: list[list[tuple[int, int, list[int]]]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    arguments: dict[int, int] = field(default_factory=dict)

    def cuGraphAddKernelNode_v2(
        self, new: Any, graph: Any, before: Any, count: Any, node: Any
    ) -> int:
        own = self.nodes[-1] if count.value else self.nodes.append([]) or self.nodes[-1]
        if count.value:
            assert before._obj.value == own[-1], "kernels run one after another"
        new._obj.value = 100 * len(self.nodes) + len(own) + 1
        own.append(new._obj.value)
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = len(self.nodes)
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, executable: int, place: int, address: int) -> int:
        node = driver.Node.from_address(address)
        count = self.arguments[node.function] + 2
        pointers = (ctypes.c_void_p * count).from_address(node.parameters)
        values = [ctypes.c_uint64.from_address(p).value for p in pointers]
        assert place in self.nodes[executable - 1]
        assert values[-2:] == [0, 0], "no scratch memory"
        self.given[place] = (node.function, node.grid_x, values[:-2])
        return 0

    def cuGraphLaunch(self, executable: int, stream: int) -> int:
        self.launched.append([self.given.pop(place) for place in self.nodes[executable - 1]])
        self.streams.append(stream)
        return 0

    def cuGraphExecDestroy(self, handle: Any) -> int:
        self.freed.append(handle.value)
        return 0


def kernels_of(name: str) -> tuple[Recurrence, list[torch.Tensor]]:
    case = next(c for c in CASES if c.name == name)
    inputs, _ = make_inputs(case, Sizes(B=1, T=80, H=2, K=16, V=16), torch.float32)
    return case.recurrence.with_options(implementation="triton"), list(inputs.values())


@pytest.fixture
def recorder(monkeypatch):
    """Every launcher's kernel is a function of its own."""
    found, functions = Recorder(), iter(range(1, 1000))

    def compile_(self, grid, args, device, keep):
        self.compiled[device] = host.Compiled()
        self.compiled[device].function = number = next(functions)
        found.arguments[number] = len(args)

    with host.no_launches():
        monkeypatch.setattr(driver, "driver", lambda: found)
        monkeypatch.setattr(launcher.Launcher, "compile", compile_)
        yield found


@pytest.mark.parametrize("name", ["gated_delta_rule", "retention", "gla"])
def test_kernels_get_their_arguments_in_order(name, recorder, monkeypatch):
    """Of a training step called twice: inputs, results, places in the workspace, sums; parts of a head parameter's
    gradient (retention) are added up after the kernels that leave them."""
    recurrence, inputs = kernels_of(name)
    leaves = [x.requires_grad_() for x in inputs]
    made: list[torch.Tensor] = []
    plain = launch.allocate

    def allocate(*args: Any) -> torch.Tensor:
        made.append(plain(*args))
        return made[-1]

    d_output = torch.ones_like(recurrence(*inputs))

    def train() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(recurrence(*leaves), leaves, d_output)

    assert not recorder.launched, "the first call is Triton's"
    train()
    recorder.launched.clear()
    monkeypatch.setattr(launch, "allocate", allocate)
    train()
    alive = {x.data_ptr(): x for x in (*leaves, d_output, *made)}
    for entry in compiled._calls.values():
        prepared, plan = entry.prepared, entry.executable.plan
        own = [recorder.launched.pop(0) for _ in prepared.ready[None].graphs]
        calls = [call for graph in own for call in graph]
        assert [c[0] for c in calls] == [
            one.launcher.compiled[None].function for one in prepared.launches
        ]
        assert [c[1] for c in calls] == [one.grid for one in prepared.launches]
        breaks = [bool(one.sums) for one in prepared.launches]
        assert len(own) == sum(breaks) + (not breaks[-1])
        given, results = len(entry.executable.given), len(prepared.own)
        for (_, _, values), one in zip(calls, prepared.launches, strict=True):
            addresses, lengths = values[: len(one.slots)], values[len(one.slots) :]
            assert tuple(n & 0xFFFFFFFF for n in lengths) == one.lengths
            for slot, address in zip(one.slots, addresses, strict=True):
                if slot < given + results:
                    assert address in alive, (plan.direction, slot)
                elif slot < given + results + len(prepared.shared):
                    room, at = prepared.places[slot - given - results]
                    if room == WORKSPACE:
                        assert alive[address - at].numel() == prepared.bytes
    assert not recorder.launched
    assert not recorder.given


def test_graphs_go_with_what_was_prepared(recorder):
    recurrence, inputs = kernels_of("linear_attention")
    for _ in range(3):
        recurrence(*inputs)
    assert len(recorder.launched) == 2
    assert not recorder.freed
    compiled.forget()
    gc.collect()
    assert recorder.freed == [1]


def test_an_error_of_the_driver_is_said_in_its_words(recorder, monkeypatch):
    recurrence, inputs = kernels_of("linear_attention")
    recurrence(*inputs)

    def says(self, code, text):
        text._obj.value = b"an illegal memory access was encountered"
        return 0

    monkeypatch.setattr(Recorder, "cuGraphLaunch", lambda *_: 700)
    monkeypatch.setattr(Recorder, "cuGetErrorString", says, raising=False)
    with pytest.raises(RuntimeError, match=r"illegal memory access was encountered \(700\)"):
        recurrence(*inputs)


def test_a_kernel_with_other_parameters_is_refused(recorder, monkeypatch):
    """A Triton that passes something else than it did would be told by the driver's count of parameters."""
    monkeypatch.setattr(
        Recorder,
        "cuFuncGetParamInfo",
        lambda self, function, index, *_: index.value > 2,
        raising=False,
    )
    recurrence, inputs = kernels_of("linear_attention")
    with pytest.raises(RuntimeError, match=r"parameters of \[0, 0, 0\] bytes"):
        recurrence(*inputs)

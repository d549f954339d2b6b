"""What the CUDA driver is given: what Triton was given by the first call, as the driver reads it, in the same order."""

from __future__ import annotations

import ctypes
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import CASES, Sizes, make_inputs

from lmoe_compiler.bench import host
from lmoe_compiler.codegen import compiled, driver, launch, launcher, tuned
from lmoe_compiler.codegen.plan import Choice, Kernel, Tuning
from lmoe_compiler.errors import FallbackWarning

pytest.importorskip("triton")

STREAM = 77
HALF = 114 * 1024
"""Half of an SM's shared memory."""
SECTIONS = Choice(chunk=32, section=512, prepare=True, products=True, default=Tuning(16, 16))


@dataclass(frozen=True)
class Launched:
    """One kernel: its function, grid, threads, bytes of shared memory, addresses and lengths."""

    function: int
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    arguments: tuple[int, ...]


@dataclass
class Recorder(host.Driver):
    """Nodes by graph, each with those `before` it; `given` is what they were last pointed at."""

    nodes: list[list[int]] = field(default_factory=list)
    given: dict[int, Launched] = field(default_factory=dict)
    launched: list[Launched] = field(default_factory=list)
    graphs: int = 0
    before: dict[int, set[int]] = field(default_factory=dict)
    pointed: dict[int, Launched] = field(default_factory=dict)
    by_triton: list[Launched] = field(default_factory=list)
    freed: list[tuple[str, int]] = field(default_factory=list)
    parameters: dict[int, list[int]] = field(default_factory=dict)
    kernels: dict[int, Kernel] = field(default_factory=dict)
    captured: list[int] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    code: int = 0
    status: int = 1
    refuses: bool = False
    priority: dict[int, int] = field(default_factory=dict)
    most_shared: dict[int, int] = field(default_factory=dict)

    def call(self, run: Callable[[], object]) -> object:
        """Its tensors lie where those of the call before did."""
        self.taken.clear()
        return run()

    def cuGraphCreate(self, graph: Any, flags: int) -> int:
        self.nodes.append([])
        graph._obj.value = len(self.nodes)
        return 0

    def cuGraphAddKernelNode_v2(
        self, new: Any, graph: Any, before: Any, count: Any, node: Any
    ) -> int:
        own = self.nodes[graph.value - 1]
        assert len(before) == count.value
        assert set(before) <= set(own)
        new._obj.value = 1000 * graph.value + len(own)
        self.before[new._obj.value] = set(before)
        self.pointed[new._obj.value] = self.read(ctypes.addressof(node._obj))
        own.append(new._obj.value)
        return 0

    def cuCtxGetStreamPriorityRange(self, least: Any, most: Any) -> int:
        least._obj.value, most._obj.value = 0, -5
        return 0

    def cuGraphKernelNodeSetAttribute(self, node: Any, attribute: int, value: Any) -> int:
        assert attribute == 8
        self.priority[node.value] = value._obj[0]
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        assert attribute == 8
        if self.refuses:
            return driver.INVALID_VALUE
        self.most_shared[function.value] = value
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        nodes = self.nodes[graph.value - 1]
        assert flags.value == (8 if any(self.priority.get(n) for n in nodes) else 0)
        executable._obj.value = 100 + graph.value
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, executable: int, place: int, address: int) -> int:
        assert place in self.nodes[executable - 101]
        self.given[place] = self.read(address)
        return 0

    def read(self, address: int) -> Launched:
        """What a node would launch: it may ask for more shared memory than its kernel needs."""
        function, *sizes = self.words(address)
        grid, threads, shared = tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6]
        kernel = self.kernels[function]
        apart = kernel.name == "adjoint" and not kernel.span and not self.refuses
        assert shared == (HALF if apart else function)
        assert self.most_shared.get(function) == (HALF if apart else None)
        pointers = ctypes.c_uint64.from_address(address + 40).value
        rest = (ctypes.c_uint64 * 3).from_address(address + 48)
        assert list(rest) == [0, 0, 0], "extra, kernel, context"
        read = [
            (ctypes.c_uint64 if size == 8 else ctypes.c_uint32)
            .from_address(ctypes.c_uint64.from_address(pointers + 8 * i).value)
            .value
            for i, size in enumerate(self.parameters[function])
        ]
        assert read[-2:] == [0, 0], "scratch memory"
        return Launched(function, grid, threads, function, tuple(read[:-2]))

    @staticmethod
    def words(address: int) -> tuple[int, ...]:
        """The function, then grid, block and shared memory, as cuda.h has them."""
        rest = (ctypes.c_uint32 * 7).from_address(address + 8)
        return (ctypes.c_uint64.from_address(address).value, *rest)

    def cuGraphLaunch(self, executable: int, stream: int) -> int:
        assert stream == STREAM
        if self.code:
            return self.code
        self.graphs += 1
        self.launched += [self.given.pop(place) for place in self.nodes[executable - 101]]
        return 0

    def cuStreamGetCaptureInfo_v2(
        self, stream: Any, status: Any, number: Any, graph: Any, before: Any, count: Any
    ) -> int:
        """The user's graph is number 999; its last node so far is what comes next to wait for."""
        assert stream.value == STREAM
        status._obj.value = self.status
        self.last = (ctypes.c_void_p * 1)(self.captured[-1] if self.captured else 5)
        graph._obj.value, count._obj.value = 999, 1
        before._obj.contents = self.last
        return 0

    def cuGraphAddChildGraphNode(
        self, new: Any, graph: Any, before: Any, count: Any, child: Any
    ) -> int:
        assert (graph.value, count.value, before[0]) == (999, 1, self.last[0])
        self.launched += [self.pointed[place] for place in self.nodes[child.value - 1]]
        new._obj.value = 5000 + child.value
        return 0

    def cuStreamUpdateCaptureDependencies(
        self, stream: Any, nodes: Any, count: Any, flags: Any
    ) -> int:
        assert (stream.value, count.value, flags.value) == (STREAM, 1, 1)
        self.captured.append(nodes._obj.value)
        return 0

    def cuGraphExecDestroy(self, handle: Any) -> int:
        self.freed.append(("executable", handle.value))
        return 0

    def cuGraphDestroy(self, handle: Any) -> int:
        self.freed.append(("graph", handle.value))
        return 0

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        size._obj.value = self.parameters[function.value][index.value]
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"an illegal memory access was encountered"
        return 0


@pytest.fixture
def recorder(monkeypatch) -> Iterator[Recorder]:
    """Every kernel has a function of its own."""
    found, functions = Recorder(), {}
    pool: dict[tuple[str, int], torch.Tensor] = {}

    def pooled(name: str, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def take(*args: Any) -> torch.Tensor:
            key = name, found.taken.get(name, 0)
            found.taken[name] = key[1] + 1
            return pool.setdefault(key, make(*args))

        return take

    def compile_(self, grid, args, device, keep):
        number = functions.setdefault(id(self), len(functions) + 1)
        read = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)
        found.parameters[number] = [8 if isinstance(x, torch.Tensor) else 4 for x in args] + [8, 8]
        warps = self.kernel.tuning.num_warps
        found.kernels[number] = self.kernel
        found.by_triton.append(Launched(number, (grid, 1, 1), (32 * warps, 1, 1), number, read))
        if keep:
            self.compiled[device] = host.Compiled()
            self.compiled[device].function = number
            self.compiled[device].packed_metadata = (warps, 1, number)

    with host.no_launches():
        monkeypatch.setattr(launch, "current_stream", lambda device: STREAM)
        monkeypatch.setattr(launch, "allocate", pooled("allocate", launch.allocate))
        monkeypatch.setattr(driver, "driver", lambda: found)
        monkeypatch.setattr(launcher.Launcher, "compile", compile_)
        yield found


def training(name: str, T: int, size: int) -> Callable[[], object]:
    case = next(c for c in CASES if c.name == name)
    inputs, _ = make_inputs(case, Sizes(B=1, T=T, H=2, K=size, V=size), torch.float32)
    recurrence = case.recurrence.with_options(implementation="triton")
    leaves = [x.requires_grad_() for x in inputs.values()]
    with torch.no_grad():
        d_output = torch.ones_like(recurrence(*leaves))

    def train() -> object:
        return torch.autograd.grad(recurrence(*leaves), leaves, d_output)

    return train


def check_graph(recorder, prepared):
    """The node of every launch waits for those that it has to, and has priority if it is apart."""
    places = [place for place, _ in prepared.ready[None].graph.updates]
    for place, one in zip(places, prepared.launches, strict=True):
        assert recorder.before[place] == {places[i] for i in one.after}
        assert recorder.priority.get(place) == (-5 if one.apart else None)


@pytest.mark.parametrize(
    ("name", "T", "size", "choice"),
    [
        ("gated_delta_rule", 80, 16, None),
        ("gla", 80, 16, None),
        ("retention", 80, 16, None),
        ("gated_delta_rule", 1100, 64, SECTIONS),
        ("retention", 1100, 64, SECTIONS),  # later kernels add up what tiles leave
    ],
)
def test_the_driver_gets_what_triton_got(recorder, name, T, size, choice):
    """In order: grid, threads, shared memory, every address and length; a graph for each direction."""
    with tuned.forced("backward", choice) if choice else nullcontext():
        train = training(name, T, size)
        recorder.by_triton.clear()
        compiled.forget()
        recorder.call(train)
    first = list(recorder.by_triton)
    assert first
    assert not recorder.launched
    for _ in range(3):
        recorder.launched.clear()
        recorder.graphs = 0
        recorder.call(train)
        assert recorder.launched == first
        assert recorder.by_triton == first, "nothing more by Triton"
        assert not recorder.given
        assert recorder.graphs == 2
    for entry in compiled._calls.values():
        check_graph(recorder, entry.prepared)


def test_unaligned_and_observed_calls_are_launched_by_triton(recorder, monkeypatch):
    """A profiler's hook, a tensor at an odd address; afterwards it is the graph's turn again."""
    train = training("linear_attention", 80, 16)
    for _ in range(2):
        recorder.call(train)
    assert recorder.launched
    recorder.launched.clear()
    recorder.by_triton.clear()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_observed", lambda: True)
        recorder.call(train)
    assert recorder.by_triton
    assert not recorder.launched
    recorder.by_triton.clear()
    recorder.call(train)
    assert recorder.launched
    assert not recorder.by_triton
    recorder.launched.clear()
    case = next(c for c in CASES if c.name == "linear_attention")
    inputs, _ = make_inputs(case, Sizes(B=1, T=80, H=2, K=16, V=16), torch.float32)
    odd = torch.empty(inputs["q"].numel() + 1)[1:].view_as(inputs["q"])
    case.recurrence.with_options(implementation="triton")(odd, inputs["k"], inputs["v"])
    assert recorder.by_triton
    assert not recorder.launched


def test_a_capture_gets_the_same_graphs(recorder, monkeypatch):
    """As nodes of the caller's graph, each after all that was captured before."""
    with tuned.forced("backward", SECTIONS):
        train = training("retention", 1100, 64)
        for _ in range(2):
            recorder.launched.clear()
            recorder.graphs = 0
            recorder.call(train)
        wanted, graphs = list(recorder.launched), recorder.graphs
        made = len(recorder.nodes)
        monkeypatch.setattr(launch, "capturing", lambda device: True)
        for _ in range(2):
            recorder.launched.clear()
            recorder.captured.clear()
            recorder.call(train)
            assert recorder.launched == wanted
            assert len(recorder.captured) == graphs == 2
            assert recorder.graphs == graphs, "none launched"
        assert sorted(recorder.freed) == [("graph", made + 1 + i) for i in range(2 * graphs)]
        recorder.status = 2
        with pytest.raises(RuntimeError, match="capture of your CUDA graph was made invalid"):
            recorder.call(train)
        assert len(recorder.freed) == 2 * graphs + 1


def test_calls_of_many_threads_do_not_mix(recorder):
    """Each call's addresses reach its own kernels, though all calls share one array."""
    case = next(c for c in CASES if c.name == "linear_attention")
    recurrence = case.recurrence.with_options(implementation="triton")
    inputs, _ = make_inputs(case, Sizes(B=1, T=80, H=2, K=16, V=16), torch.float32)
    given = [[x.clone() for x in inputs.values()] for _ in range(4)]
    for xs in given[:2]:
        recurrence(*xs)
    recorder.launched.clear()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda xs: [recurrence(*xs) for _ in range(100)], given))
    finally:
        sys.setswitchinterval(before)
    owner = {x.data_ptr(): i for i, xs in enumerate(given) for x in xs}
    owners = [{owner[a] for a in one.arguments if a in owner} for one in recorder.launched]
    assert all(len(found) == 1 for found in owners)
    assert all(sum(found == {i} for found in owners) >= 100 for i in range(4))


def test_graphs_go_with_what_was_prepared(recorder):
    train = training("linear_attention", 80, 16)
    for _ in range(3):
        recorder.call(train)
    assert not recorder.freed
    compiled.forget()
    gc.collect()
    assert sorted(recorder.freed) == [
        ("executable", 101), ("executable", 102), ("graph", 1), ("graph", 2)
    ]  # fmt: skip


def test_a_device_with_less_shared_memory_runs_kernels_as_they_are(recorder):
    """Where it refuses half of what the first device has."""
    recorder.refuses = True
    train = training("linear_attention", 80, 16)
    for _ in range(2):
        recorder.call(train)
    assert recorder.launched


def test_an_error_of_the_driver_is_said_in_its_words_and_leaves_no_lock(recorder):
    train = training("linear_attention", 80, 16)
    for _ in range(2):
        recorder.call(train)
    recorder.code = 700
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"illegal memory access was encountered \(700\)"):
            recorder.call(train)
    assert all(not e.prepared.ready[None].lock.locked() for e in compiled._calls.values())


@pytest.mark.parametrize("change", ["parameters", "scratch"])
def test_kernels_with_parameters_of_tritons_own_are_left_to_triton(recorder, monkeypatch, change):
    """As its instrumentation adds; it is said once."""
    launch._say_once.cache_clear()
    if change == "scratch":
        monkeypatch.setattr(host.Compiled.metadata, "profile_scratch_size", 8)
    else:
        monkeypatch.setattr(Recorder, "cuFuncGetParamInfo", lambda *_: driver.INVALID_VALUE)
    with pytest.warns(FallbackWarning, match="one by one by Triton"):
        train = training("linear_attention", 80, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            recorder.call(train)
    assert not recorder.launched
    assert len(recorder.by_triton) > 6


def test_what_a_node_is_made_of():
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h, CUDA 12 and 13."""
    offsets = {name: getattr(driver.Node, name).offset for name, _ in driver.Node._fields_}
    assert ctypes.sizeof(driver.Node) == 72
    assert offsets == {
        "function": 0, "grid_x": 8, "grid_y": 12, "grid_z": 16, "block_x": 20, "block_y": 24, "block_z": 28,
        "shared": 32, "parameters": 40, "extra": 48, "kernel": 56, "context": 64,
    }  # fmt: skip

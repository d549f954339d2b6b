"""Launches by the CUDA driver: the kernels of a call are nodes of one graph, whose arguments lie in one array.

A call writes its addresses into the array, points every node at it again and launches the graph: on an H200's machine
21 us for 12 kernels, 70 for 12 launches by the driver (9 for one by Triton's launcher), and the device waits less
between kernels. Kernels that touch nothing of one another run side by side (concurrent.py); into a caller's own graph
goes the same graph. What Triton would pass is known: parameters in the order of the kernel's signature, then two
addresses of scratch memory, which kernels of ours do not have.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Sequence
from ctypes import byref, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from threading import Lock, local
from typing import TYPE_CHECKING, Any

from lmoe_compiler.codegen.cost import device

if TYPE_CHECKING:
    from lmoe_compiler.codegen.prepared import Launch

INVALID_VALUE = 1
MAX_DYNAMIC_SHARED, PRIORITY = 8, 8
USE_NODE_PRIORITY, SET_CAPTURE_DEPENDENCIES = 8, 1
CAPTURING = 1
"""Numbers of cuda.h: an error, attributes of a function and of a node, flags of two calls, a status."""
_thread = local()


def enter(device: int | None) -> None:
    """A thread that has done nothing on a device has no context: it gets the one that torch uses."""
    entered: set[int | None] = _thread.__dict__.setdefault("devices", {None})
    if device not in entered:
        context, library = c_void_p(), driver()
        check(library.cuCtxGetCurrent(byref(context)))
        if not context:
            check(library.cuDevicePrimaryCtxRetain(byref(context), device))
            check(library.cuCtxSetCurrent(context))
        entered.add(device)


class Node(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS of cuda.h."""

    _fields_ = [
        ("function", c_void_p),
        *((name, c_uint) for name in "grid_x grid_y grid_z block_x block_y block_z shared".split()),
        *((name, c_void_p) for name in ("parameters", "extra", "kernel", "context")),
    ]


class Graph:
    """Kernels, each with the places of those `after` which it runs; else they run side by side.

    apart     kernels whose programs get SMs before those of others do, and share none with one another

    Launches of one graph run one after another, on whatever streams.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.after: list[Sequence[int]] = []
        self.apart: list[bool] = []
        self.executable: int | None = None
        # Of every kernel: its place in the graph, and the address of its Node.
        self.updates: list[tuple[int | None, int]] = []

    def fill(self, graph: c_void_p) -> list[int | None]:
        """Gives a graph of the driver's the nodes as they are pointed now: their places in it."""
        library = driver()
        places: list[int | None] = []
        for node, after, apart in zip(self.nodes, self.after, self.apart, strict=True):
            new, before = c_void_p(), (c_void_p * len(after))(*(places[i] for i in after))
            count = c_size_t(len(after))
            check(library.cuGraphAddKernelNode_v2(byref(new), graph, before, count, byref(node)))
            if apart:
                check(library.cuGraphKernelNodeSetAttribute(new, PRIORITY, highest_priority()))
            places.append(new.value)
        return places

    def instantiate(self) -> None:
        graph, executable, library = c_void_p(), c_void_p(), driver()
        check(library.cuGraphCreate(byref(graph), 0))
        self.free_with_me(library.cuGraphDestroy, graph)
        places = self.fill(graph)
        # With this flag nodes have priorities of their own, and do not take the stream's.
        flags = c_uint64(USE_NODE_PRIORITY if any(self.apart) else 0)
        check(library.cuGraphInstantiateWithFlags(byref(executable), graph, flags))
        self.free_with_me(library.cuGraphExecDestroy, executable)
        self.updates = list(zip(places, map(ctypes.addressof, self.nodes), strict=True))
        self.executable = executable.value

    def free_with_me(self, free: Callable[[c_void_p], int], handle: c_void_p) -> None:
        """At exit the driver takes everything back itself."""
        weakref.finalize(self, free, handle).atexit = False

    def launch(self, stream: int) -> None:
        if self.nodes:
            if self.executable is None:
                self.instantiate()
            library = driver()
            update = library.cuGraphExecKernelNodeSetParams_v2
            for place, node in self.updates:
                if code := update(self.executable, place, node):
                    check(code)
            if code := library.cuGraphLaunch(self.executable, stream):
                check(code)

    def capture(self, stream: int) -> None:
        """Into the graph that a stream is capturing: a node of that graph, which has this one in it."""
        if not self.nodes:
            return
        graph, library, on = c_void_p(), driver(), c_void_p(stream)
        status, number, whole = ctypes.c_int(), c_uint64(), c_void_p()
        before, count, node = ctypes.POINTER(c_void_p)(), c_size_t(), c_void_p()
        check(library.cuGraphCreate(byref(graph), 0))
        try:
            self.fill(graph)
            asked = (byref(x) for x in (status, number, whole, before, count))
            check(library.cuStreamGetCaptureInfo_v2(on, *asked))
            if status.value != CAPTURING:
                raise RuntimeError(
                    "the capture of your CUDA graph was made invalid before this call of a recurrence: something"
                    " captured earlier waits for the device, or uses a stream that is not captured"
                )
            check(library.cuGraphAddChildGraphNode(byref(node), whole, before, count, graph))
            given = byref(node), c_size_t(1), c_uint(SET_CAPTURE_DEPENDENCIES)
            check(library.cuStreamUpdateCaptureDependencies(on, *given))
        finally:
            library.cuGraphDestroy(graph)


class Launches:
    """What launches calls of one extent on one device.

    kernels   of each launch: the compiled kernel, and what it is given (prepared.Launch)
    slots     how many addresses a call has; `fill(values, 0, *addresses)` writes them into the array
    lock      is held from then to the launch, which copies what it is given: calls share the array
    """

    def __init__(self, kernels: Sequence[tuple[Any, Launch]], slots: int) -> None:
        lengths = [n for _, one in kernels for n in one.lengths]
        end = slots + len(lengths)
        # Two zeros at the end are the addresses of scratch memory.
        self.values = (c_uint64 * (end + 2))()
        for i, n in enumerate(lengths, slots):
            self.values[i] = n
        self.fill = struct.Struct(f"={slots}Q").pack_into
        self.lock = Lock()
        self.parameters: list[ctypes.Array[c_void_p]] = []
        self.graph = Graph()
        at = slots
        for compiled, one in kernels:
            places = [*one.slots, *range(at, at + len(one.lengths)), end, end + 1]
            at += len(one.lengths)
            self.graph.nodes.append(self.node(compiled, one, places))
            self.graph.after.append(one.after)
            self.graph.apart.append(one.apart)

    def node(self, compiled: Any, one: Launch, places: Sequence[int]) -> Node:
        start, size = ctypes.addressof(self.values), ctypes.sizeof(c_uint64)
        parameters = (c_void_p * len(places))(*(start + size * i for i in places))
        self.parameters.append(parameters)
        warps, _, shared = compiled.packed_metadata[:3]
        if one.apart and shared < (half := device().shared // 2):
            # Two programs that ask for half of an SM, and a kilobyte each that the driver takes, do not fit. (A device
            # may refuse: of several GPUs one may have less.)
            function = c_void_p(compiled.function)
            if not driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, half):
                shared = half
        address = ctypes.addressof(parameters)
        return Node(compiled.function, one.grid, 1, 1, 32 * warps, 1, 1, shared, address)


def highest_priority() -> Any:
    """As the value of a node's attribute."""
    least, most = ctypes.c_int(), ctypes.c_int()
    check(driver().cuCtxGetStreamPriorityRange(byref(least), byref(most)))
    return byref((ctypes.c_int * 16)(most.value))


@cache
def driver() -> Any:
    """Functions that neither wait nor call back keep Python's lock: releasing it takes longer than they do."""
    library: Any = ctypes.CDLL("libcuda.so.1")
    quick = ctypes.PyDLL("libcuda.so.1")
    library.cuGraphExecKernelNodeSetParams_v2 = quick.cuGraphExecKernelNodeSetParams_v2
    library.cuGraphExecKernelNodeSetParams_v2.argtypes = [c_void_p] * 3
    library.cuGraphLaunch.argtypes = [c_void_p] * 2
    return library


def check(code: int) -> None:
    """Raises RuntimeError with the driver's words for an error."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, byref(text))
        said = (text.value or b"unknown error").decode()
        raise RuntimeError(f"the CUDA driver refused a launch: {said} ({code})")


def launchable(compiled: Any, one: Launch) -> bool:
    """Whether a compiled kernel has the parameters that `Launches` gives it: one that Triton instruments has others.

    Nothing is asked about a parameter that should not be there: tools that watch the driver would report an error.
    """
    meta, library = compiled.metadata, driver()
    scratch = meta.global_scratch_size or meta.profile_scratch_size
    if scratch or meta.num_ctas != 1 or meta.launch_pdl:
        return False
    if not hasattr(library, "cuFuncGetParamInfo"):  # before CUDA 12.4
        return True
    function, offset, size = c_void_p(compiled.function), c_size_t(), c_size_t()
    for index, expected in enumerate([8] * len(one.slots) + [4] * len(one.lengths) + [8, 8]):
        asked = function, c_size_t(index), byref(offset), byref(size)
        code = library.cuFuncGetParamInfo(*asked)
        if code != INVALID_VALUE:
            check(code)
        if code or size.value != expected:
            return False
    return True

"""Launches by the CUDA driver: the arguments of all kernels of a call lie in one array, and a launch is one call.

Triton's own launcher takes the arguments of every launch apart again. What it would pass is known here: parameters in
the order of the kernel's signature, then two addresses of scratch memory, which kernels of ours do not have.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_uint, c_uint64, c_void_p
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lmoe_compiler.codegen.prepare import Launch

INVALID_CONTEXT = 201
Call = tuple[int, int, int]


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *((name, c_uint) for name in "grid_x grid_y grid_z block_x block_y block_z shared".split()),
        *((name, c_void_p) for name in ("stream", "attributes")),
        ("attribute_count", c_uint),
    ]


class Launches:
    """What launches calls of one extent on one device.

    kernels   of each launch: the compiled kernel (None for an empty grid), and what it is given (prepare.Launch)
    slots     how many addresses a call has
    lock      is held from `begin` to the last launch: calls share the array
    """

    def __init__(self, kernels: Sequence[tuple[Any, Launch]], slots: int) -> None:
        lengths = [n for _, one in kernels for n in one.lengths]
        end = slots + len(lengths)
        # Two zeros at the end are the addresses of scratch memory.
        self.values = (c_uint64 * (end + 2))()
        self.values[slots:end] = lengths
        self.fill = struct.Struct(f"={slots}Q").pack_into
        self.lock = Lock()
        self.stream = 0
        self.configs: list[Config] = []
        self.parameters: list[ctypes.Array[c_void_p]] = []
        self.calls: list[Call | None] = []
        start, size = ctypes.addressof(self.values), ctypes.sizeof(c_uint64)
        at = slots
        for compiled, one in kernels:
            places = [*one.slots, *range(at, at + len(one.lengths)), end, end + 1]
            at += len(one.lengths)
            if compiled is None or not one.grid:
                self.calls.append(None)
                continue
            check_parameters(compiled, len(one.slots), len(one.lengths))
            warps, _, shared = compiled.packed_metadata[:3]
            config = Config(one.grid, 1, 1, 32 * warps, 1, 1, shared, 0, None, 0)
            parameters = (c_void_p * len(places))(*(start + size * i for i in places))
            self.configs.append(config)
            self.parameters.append(parameters)
            self.calls.append(
                (ctypes.addressof(config), compiled.function, ctypes.addressof(parameters))
            )

    def begin(self, addresses: Sequence[int], stream: int) -> None:
        """Take a call's addresses."""
        if stream != self.stream:
            for config in self.configs:
                config.stream = stream
            self.stream = stream
        self.fill(self.values, 0, *addresses)

    def launch(self, call: Call, device: int) -> None:
        """One of `calls`; its kernel's arguments are copied before this returns."""
        code = driver().cuLaunchKernelEx(*call, None)
        if code == INVALID_CONTEXT:
            # This thread has had no work for the device yet.
            torch.cuda.set_device(device)
            code = driver().cuLaunchKernelEx(*call, None)
        if code:
            text = ctypes.c_char_p()
            driver().cuGetErrorString(code, ctypes.byref(text))
            said = (text.value or b"unknown error").decode()
            raise RuntimeError(f"the CUDA driver refused a launch: {said} ({code})")


@cache
def driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [c_void_p] * 4
    return library


def check_parameters(compiled: Any, addresses: int, lengths: int) -> None:
    """Raises RuntimeError if a compiled kernel has other parameters than `Launches` gives it."""
    meta, library = compiled.metadata, driver()
    scratch = meta.global_scratch_size or meta.profile_scratch_size
    expected = [8] * addresses + [4] * lengths + [8, 8]
    sizes = expected
    if hasattr(library, "cuFuncGetParamInfo"):  # CUDA 12.4
        offset, size, sizes = ctypes.c_size_t(), ctypes.c_size_t(), []
        ask = library.cuFuncGetParamInfo
        ask.argtypes = [c_void_p, ctypes.c_size_t, c_void_p, c_void_p]
        while not ask(compiled.function, len(sizes), ctypes.byref(offset), ctypes.byref(size)):
            sizes.append(size.value)
    if scratch or meta.num_ctas != 1 or meta.launch_pdl or sizes != expected:
        raise RuntimeError(
            f"Triton compiled {meta.name} with parameters of {sizes} bytes and {scratch} bytes of scratch memory, "
            f"and lmoe_compiler launches kernels with {expected} and none: it knows Triton 3.6 to 3.7.1, "
            "without instrumentation"
        )

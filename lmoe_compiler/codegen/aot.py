"""Compile a Triton kernel for sm_90 on a machine without a GPU and read what it will cost there.

Registers, stack and spills come from the assembler, shared memory from Triton's metadata, the
number of wgmma and cp.async instructions from the PTX. Not usable under TRITON_INTERPRET: that
variable replaces the compiler when triton is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe_compiler.codegen.names import identifier
from lmoe_compiler.codegen.plan import LENGTHS, Kernel

SHARED_MEMORY_LIMIT = 232448
"""Bytes of shared memory that one block can have on an H100 or H200."""

SPILL_BUDGET = 64
"""Bytes of spill stores that a kernel of the shipped table may have."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. Spills and stack are bytes a thread, shared is bytes a block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    threads: int
    wgmma: int
    mma: int
    cp_async: int

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_MEMORY_LIMIT and self.spill_stores <= SPILL_BUDGET

    @property
    def blocks_per_sm(self) -> int:
        """Resident blocks on one SM: 64 K registers, 228 KiB of shared memory, 2048 threads."""
        by_registers = 65536 // (self.threads * -(-self.registers // 8) * 8)
        by_shared = 233472 // (self.shared + 1024)
        return min(by_registers, by_shared, 2048 // self.threads, 32)

    def __str__(self) -> str:
        return (
            f"regs {self.registers:3d}  spill {self.spill_stores:5d}/{self.spill_loads:5d} B  "
            f"shared {self.shared / 1024:6.1f} KiB  blocks/SM {self.blocks_per_sm}  "
            f"wgmma {self.wgmma:3d}  mma {self.mma:3d}  cp.async {self.cp_async:3d}"
        )


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    arch: int = 90,
    aligned: Iterable[str] | None = None,
) -> Any:
    """The compiled kernel (its `.asm` holds ttgir, ptx, cubin). `types`: parameter -> "*bf16", "i32", ...

    `aligned` are the parameters divisible by 16, by default every pointer, as torch allocates them.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    if aligned is None:
        aligned = [n for n, t in signature.items() if t.startswith("*")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any, arch: int = 90) -> Resources:
    """Assemble the kernel's PTX once more, verbosely, and read the report."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        cubin.write_bytes(compiled.asm["cubin"])
        assemble = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name=sm_{arch}a",
            source,
            "-o",
            Path(folder) / "out",
        ]
        report = _run(assemble).stderr
        usage = _run([tools / "cuobjdump", "-res-usage", cubin]).stdout
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills, f"no spill report from ptxas:\n{report}"
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        shared=int(compiled.metadata.shared),
        threads=32 * int(compiled.metadata.num_warps),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        cp_async=ptx.count("cp.async.c"),
    )


def plan_resources(plan: Any) -> dict[str, Resources]:
    """Resources of every kernel of a plan, by kernel name. Imports triton."""
    from lmoe_compiler.codegen.launch import Executable

    found = {}
    for launcher in Executable(plan, [], (), (), {}).launchers:
        types = argument_types(launcher.function.arg_names, launcher.kernel, plan.dtype)
        compiled = compile_kernel(launcher.function, types, launcher.constants, **launcher.options)
        found[launcher.kernel.name] = resources(compiled)
    return found


def argument_types(names: Iterable[str], kernel: Kernel, dtype: str) -> dict[str, str]:
    """Triton's type of each parameter: lengths, offsets, values by their dtype, everything else as the inputs are."""
    full = {identifier(v.name) for v in (*kernel.read, *kernel.written) if v.dtype == "fp32"}
    types = {name: "*fp32" if name in full else f"*{dtype}" for name in names}
    types |= dict.fromkeys(LENGTHS, "i32") | {"cu_seqlens": "*i32"}
    return {name: types[name] for name in names}


def _run(command: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in:\n{text}"
    return int(found[1])

"""Runs the integer part of a PTX kernel, for all threads of one program: which global addresses it touches.

Enough of PTX for the arithmetic of addresses and loops. Numbers from memory, and all that follows from them, are None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

LOW = np.uint64(0xFFFFFFFF)
STEPS = 400_000
SKIPPED = (".loc", ".reg", ".file", ".section", ".pragma", "//")


def touched(text: str, arguments: Sequence[int], program: int, threads: int) -> dict[str, set[int]]:
    """Addresses of 16 bytes that program `program` of a kernel stores to and loads from, by "stores" and "loads".

    `arguments` are those of the kernel's first parameters. Raises Unknown where control flow depends on memory.
    """
    kernel = Kernel(text, [*arguments, *[0] * 8], threads)
    kernel.registers |= {
        "%tid.x": np.arange(threads, dtype=np.uint64),
        "%ctaid.x": kernel.all(program),
    }
    kernel.run()
    return {kind: {address // 16 for address in found} for kind, found in kernel.found.items()}


class Unknown(Exception):
    """What this cannot follow."""


@dataclass
class Kernel:
    text: str
    arguments: Sequence[int]
    threads: int
    registers: dict[str, ndarray | None] = field(default_factory=dict)
    found: dict[str, set[int]] = field(default_factory=lambda: {"stores": set(), "loads": set()})

    def run(self) -> None:
        body = self.text[self.text.index(".visible") :]
        lines, labels = [], {}
        for raw in body[body.index("{") + 1 : body.index("\n}")].splitlines():
            line = raw.strip()
            if label := re.match(r"(\$\w+):", line):
                labels[label[1]] = len(lines)
            elif not line.startswith(SKIPPED):
                lines += [part.strip() for part in line.split("//")[0].split(";") if part.strip()]
        at = 0
        for _ in range(STEPS):
            mask, op, operands = self.parsed(lines[at])
            at += 1
            if op == "ret":
                return
            if op.startswith("bra"):
                if mask is None or mask.any() != mask.all():
                    raise Unknown(lines[at - 1])
                at = labels[operands[0]] if mask.all() else at
            elif op.startswith(("st.global", "ld.global", "cp.async.cg", "cp.async.ca")):
                self.touch(op, operands, mask)
            elif "." in op and not op.startswith(
                ("st.", "ldmatrix", "stmatrix", "wgmma", "bar", "fence", "cp.")
            ):
                self.assign(op, operands, mask)
        raise Unknown(f"more than {STEPS} steps")

    def parsed(self, line: str) -> tuple[ndarray | None, str, list[str]]:
        """Which threads run it (None: not known), the operation, its operands."""
        mask = np.ones(self.threads, bool)
        if guard := re.match(r"@(!?)(%p\d+)\s+(.*)", line):
            value, line = self.registers.get(guard[2]), guard[3]
            mask = None if value is None else (value == 0 if guard[1] else value != 0)
        op, *rest = line.split(None, 1)
        return mask, op, [x.strip() for x in re.split(r",(?![^{\[]*[}\]])", *rest)] if rest else []

    def touch(self, op: str, operands: Sequence[str], mask: ndarray | None) -> None:
        """Copies to shared memory name the bytes that they copy: none where that is 0."""
        place = [x for x in operands if x.startswith("[")][op.startswith("cp")]
        base, _, offset = place.strip("[] ").partition("+")
        address, size = (
            self.value(base),
            self.value(operands[-1]) if op.startswith("cp") else self.all(16),
        )
        if address is None or size is None or mask is None:
            raise Unknown(op)
        kind = "stores" if op.startswith("st") else "loads"
        moved = address[mask & (size != 0)] + np.uint64(int(offset or 0))
        self.found[kind] |= {int(x) for x in moved}

    def assign(self, op: str, operands: Sequence[str], mask: ndarray | None) -> None:
        name, *sources = operands
        if op.startswith("ld.param"):
            number = int(sources[0].rstrip("]").rsplit("_", 1)[1])
            self.registers[name] = self.all(self.arguments[number])
            return
        values = [self.value(x) for x in sources]
        result = None
        if all(x is not None for x in values) and mask is not None:
            result = compute(op.split("."), values)  # type: ignore[arg-type]
        old = self.registers.get(name)
        if result is not None and old is not None:
            result = np.where(mask, result, old)
        self.registers[name] = result

    def value(self, text: str) -> ndarray | None:
        text = "0" if text.strip() == "global_smem" else text.strip()
        return (
            self.all(int(text, 0))
            if re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)", text)
            else self.registers.get(text)
        )

    def all(self, number: int) -> ndarray:
        return np.full(self.threads, number % 2**64, np.uint64)


def compute(op: Sequence[str], x: Sequence[ndarray]) -> ndarray | None:
    """One operation on integers of 32 or 64 bits, or predicates; None for any other."""
    name, kind = op[0], op[-1]
    key = f"{name}.{op[1]}" if name == "setp" else name
    narrow, signed = kind.endswith("32"), kind.startswith("s")
    if name == "selp":
        return np.where(x[2] != 0, x[0], x[1])
    if kind[0] not in "subp":  # s32, u32, b32, pred: not f32
        return None
    if name == "cvt":
        wide = number(x[0], signed, narrow).view(np.uint64)
        return None if op[-2][0] not in "su" else wide & LOW if op[-2].endswith("32") else wide
    if name in ("mul", "mad") and op[1] == "wide":
        a, b, *more = (v if i == 2 else number(v, signed, True) for i, v in enumerate(x))
        return (a * b).view(np.uint64) + (more[0] if more else np.uint64(0))
    if key not in OPERATIONS:
        return None
    result = OPERATIONS[key](*(number(v, signed, narrow) for v in x))
    result = result.astype(np.int64).view(np.uint64)
    return result & LOW if narrow and name != "setp" else result


def number(x: ndarray, signed: bool, narrow: bool) -> ndarray:
    """As Python would see it; addresses and lengths are far from 2^63, so that wide ones are signed in any case."""
    if not narrow:
        return x.view(np.int64)
    low = (x & LOW).astype(np.uint32)
    return (low.view(np.int32) if signed else low).astype(np.int64)


def divided(a: ndarray, b: ndarray) -> ndarray:
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b))


OPERATIONS: dict[str, Callable[..., ndarray]] = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "bfe": lambda a, start, length: (a >> start) & ((1 << length) - 1),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
    "div": divided,
    "rem": lambda a, b: a - divided(a, b) * b,
    "setp.eq": np.equal,
    "setp.ne": np.not_equal,
    "setp.lt": np.less,
    "setp.le": np.less_equal,
    "setp.gt": np.greater,
    "setp.ge": np.greater_equal,
}


def bases(names: Sequence[str], lengths: Mapping[str, int]) -> list[int]:
    """Arguments of a kernel: lengths as given, tensors 2^40 bytes from each other by the order of their names."""
    order = sorted(set(names) - set(lengths))
    return [lengths[n] if n in lengths else (1 + order.index(n)) << 40 for n in names]

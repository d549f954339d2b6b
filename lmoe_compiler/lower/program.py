"""The chunk program: the body of a recurrence for ONE chunk of C tokens, scanned over chunks.

(S_in, tokens) -> (S_out, o).

Same nodes as the recurrence IR (ir/nodes.py), with the row axis `t` on every token and `s` for source rows.
Leaves are `input` nodes:
  a token  `q`      axes (t, K)        its rows of this chunk; rows past the end repeat a row of the sequence or
                                       hold zeros, and must not make a token-local expression infinite
  a head   `u`      axes (K,)          per-head parameter
  a state  `S`      axes (K, V)        the state at the chunk's entry
  `valid`           axes (t,)          1 for a real token, 0 for padding after the end (always declared)
and in an adjoint also
  `d.o`             axes of the output gradient of the output, zero in padding rows
  `d.S`             axes of the state  gradient of the chunk's exit state
Reads needed by the output are inlined. An expression that lacks an axis of what it stands for is the same along it.
Next: chunk.py builds it, adjoint.py differentiates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmoe_compiler.ir.nodes import Node, Program, Var

VALID = "valid"


@dataclass(frozen=True)
class ChunkProgram:
    """Forward: `next_states[i]` is the exit value of `program.states[i]`; `output` has axis t.

    `roles` names values that a planner may want in memory: "scores READ J" [t, s] (group J read by READ), and for a
    state with feedback "matrix S" (strictly lower, of `solve`), "rhs S" and "solution S" (U, or Y of one group).
    """

    program: Program
    next_states: tuple[Node, ...]
    output: Node
    roles: Mapping[str, Node] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ChunkAdjoint:
    """Backward of one chunk, given entry states, tokens, `d.o` and `d.S`.

    `input_grads[i]` is the gradient of `program.inputs[i]`: for a token with axis t, for a head already
    summed over this chunk's rows. `state_grads[i]` is the gradient of the entry value of `program.states[i]`.
    """

    forward: ChunkProgram
    input_grads: tuple[Node, ...]
    state_grads: tuple[Node, ...]


def gradient_name(var: Var | str) -> str:
    return f"d.{var if isinstance(var, str) else var.name}"

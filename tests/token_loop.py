"""A third implementation, for tests: the program interpreted token by token, differentiated by torch.

It is the oracle of ops and passes, and it saves tensors for its backward, which the op family has to carry.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmoe_compiler import layout
from lmoe_compiler.ir.interpret import Value, evaluate
from lmoe_compiler.ir.nodes import Next, Read


def _widen(x, position, heads):
    return x.repeat_interleave(heads // x.shape[position], position)


def _token(program, values, states, sizes):
    """One token: values [B, H, *axes] by name, states [B, H, *axes] -> output and next states."""
    env = {var.node: Value(values[var.name], var.axes) for var in program.inputs}
    env |= {var.node: Value(states[var.name], var.axes) for var in program.states}

    def value(node):
        return evaluate([node], env, sizes)[0]

    def state(name):
        var = next(v for v in program.states if v.name == name)
        return var, Value(states[name], var.axes)

    for item in program.body:
        if isinstance(item, Read):
            var, s = state(item.state)
            if item.vector is None:
                result = s
            else:
                vector = value(item.vector)
                axes = tuple(a for a in var.axes if a not in item.axes)
                full = (*item.axes, *axes)
                x = s.to(full) * vector.to(full)
                result = Value(x.flatten(x.dim() - len(axes)).sum(-1), item.axes)
            env[item.node] = result
            continue
        if isinstance(item, Next):
            new = [
                value(v).to(state(n)[0].axes) for n, v in zip(item.states, item.values, strict=True)
            ]
            for name, x in zip(item.states, new, strict=True):
                states[name] = x.expand(states[name].shape)
                env[state(name)[0].node] = Value(states[name], state(name)[0].axes)
            continue
        var, before = state(item.state)
        x = before.tensor
        for decay in item.decays:
            x = value(decay.factor).to(var.axes) * x
        new = x
        for write in item.writes:
            new = new + value(write.key).to(var.axes) * value(write.value).to(var.axes)
        for feedback in item.feedbacks:
            seen = before.tensor if feedback.point == "before" else x
            axis = var.axes.index(feedback.read.axes[0]) - len(var.axes)
            read = (value(feedback.read).to(var.axes) * seen).sum(axis, keepdim=True)
            new = new + value(feedback.key).to(var.axes) * value(feedback.scale).to(var.axes) * read
        states[item.state] = new
        env[var.node] = Value(new, var.axes)
    return value(program.output).to(program.output.axes)


def _run(program, inputs, states, cu_seqlens):
    """float64 inside; differentiable."""
    sizes = layout.measure(program, inputs, states or (), cu_seqlens)
    starts = [0] if cu_seqlens is None else cu_seqlens.tolist()[:-1]
    wide = {}
    for var, x in zip(program.inputs, inputs, strict=True):
        position = layout.leading(var, step=False).index("H")
        wide[var.name] = _widen(x.double(), position, sizes.heads)
    start = {
        var.name: inputs[0].new_zeros(sizes.state(var), dtype=torch.float64)
        if states is None
        else states[i].double()
        for i, var in enumerate(program.states)
    }
    documents = (
        [(0, sizes.length)]
        if cu_seqlens is None
        else list(zip(starts, cu_seqlens.tolist()[1:], strict=True))
    )
    outputs, finals = [], []
    for n, (low, high) in enumerate(documents):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        now = {name: x[rows] for name, x in start.items()}
        for t in range(low, high):
            values = {
                var.name: wide[var.name][:, t] if var.kind == "token" else wide[var.name]
                for var in program.inputs
            }
            outputs.append(
                _token(program, values, now, sizes.dims).expand(
                    sizes.output(program)[:1] + sizes.output(program)[2:]
                )
            )
        finals.append(now)
    shape = sizes.output(program)
    output = torch.stack(outputs, 1) if outputs else inputs[0].new_zeros(shape).double()
    ends = [torch.cat([f[var.name] for f in finals]) for var in program.states]
    return output.to(sizes.dtype), [x.to(sizes.accumulate) for x in ends]


def _grad(results, d_results, wanted):
    pairs = [
        (r, d) for r, d in zip(results, d_results, strict=True) if d is not None and r.requires_grad
    ]
    found = (
        torch.autograd.grad([r for r, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True)
        if pairs
        else [None] * len(wanted)
    )
    return [
        torch.zeros_like(x) if g is None else g.contiguous()
        for x, g in zip(wanted, found, strict=True)
    ]


class _AutogradOn:
    """Autograd inside the body of an op (reference/platform.md section 4)."""

    def __enter__(self):
        keys = torch._C.DispatchKey
        self.guards = [
            torch._C._SetExcludeDispatchKeyGuard(k, False)
            for k in (keys.AutogradFunctionality, keys.ADInplaceOrView)
        ]
        for guard in self.guards:
            guard.__enter__()
        self.grad = torch.enable_grad()
        self.grad.__enter__()

    def __exit__(self, *error):
        self.grad.__exit__(*error)
        for guard in reversed(self.guards):
            guard.__exit__(*error)


@dataclass
class TokenLoop:
    calls: list[str] = field(default_factory=list)

    def saved(self, program, inputs, states, cu_seqlens, options):
        return [inputs[0].new_empty(inputs[0].shape)]

    def scan(self, program, inputs, states, cu_seqlens, options):
        self.calls.append("scan")
        with torch.no_grad():
            output, ends = _run(program, inputs, states, cu_seqlens)
        return (
            output.contiguous(),
            [x.clone() for x in ends],
            [inputs[0].clone(memory_format=torch.contiguous_format)],
        )

    def scan_backward(
        self, program, inputs, states, cu_seqlens, saved, d_output, d_states, options
    ):
        self.calls.append("scan_backward")
        assert torch.equal(saved[0], inputs[0])
        with _AutogradOn():
            leaves = [x.detach().contiguous().requires_grad_() for x in (*inputs, *(states or ()))]
            given = leaves[len(inputs) :] if states else None
            output, ends = _run(program, leaves[: len(inputs)], given, cu_seqlens)
            grads = _grad([output, *ends], [d_output, *d_states], leaves)
        return grads[: len(inputs)], grads[len(inputs) :] if states else None

    def step(self, program, inputs, states, options):
        self.calls.append("step")
        rows = [
            x.unsqueeze(1) if v.kind == "token" else x
            for v, x in zip(program.inputs, inputs, strict=True)
        ]
        with torch.no_grad():
            output, ends = _run(program, rows, states, None)
        return output[:, 0].contiguous(), ends

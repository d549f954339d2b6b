"""What the passes do to a hybrid model, for a rank of a group that does not exist.

    python examples/parallel_graph.py --ranks 8

Prints the report of every pass (schedules with bytes and times, what is rewritten), then the
collectives of the compiled forward and backward in their order, with what runs between them.
"""

from __future__ import annotations

import argparse
import re

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import lmoe_compiler as lmoe
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes.base import Record

SHOWN = re.compile(r"= torch\.ops\.((?:_c10d_functional|lmoe)\.\w+)\.default")
REPEATED = re.compile(r"((?:  .*\n){1,2}?)\1+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    ranks = parser.parse_args().ranks
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))

    config = ModelConfig(num_layers=2, layer_pattern="LN", hidden_size=32, expert_size=16)
    model = LinearMoEForCausalLM(config)
    record = Record(texts=True)
    compiled = lmoe.compile(
        model,
        mesh=mesh,
        sequence_parallel="sp",
        inner="aot_eager",
        record=record,
    )
    tokens = torch.zeros((1, 16), dtype=torch.int64)  # this rank's 16 of 16 * ranks tokens
    compiled(tokens, labels=tokens)

    (graph,) = record.graphs
    for done in graph.passes:
        print(done.report)
    for direction, text in graph.lowered:
        print(f"\n{direction}: collectives, and the ops of ours between them")
        names = "".join(f"  {name}\n" for name in SHOWN.findall(text))
        print(REPEATED.sub(count, names), end="")
    dist.destroy_process_group()


def count(found: re.Match[str]) -> str:
    """The lines that repeat, once, and how often."""
    times = len(found[0]) // len(found[1])
    return f"{found[1].rstrip()}    ({times} times)\n"


if __name__ == "__main__":
    main()

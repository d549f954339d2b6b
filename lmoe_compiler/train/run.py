"""`lmoe train`: flags to a configuration, a run from nothing or from a checkpoint, and what it
leaves behind.

    config.toml       the configuration, as `--config` reads it
    metrics.jsonl     every step and evaluation; tensorboard/ has the same
    step-00001234/    checkpoints
    curves.png  sample.txt  result.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lmoe_compiler.config import environment
from lmoe_compiler.errors import ArchitectureMismatch, InvalidTraining
from lmoe_compiler.models.generation import stream
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.train import checkpoint
from lmoe_compiler.train.baselines import baselines
from lmoe_compiler.train.config import (
    TrainConfig,
    add_flags,
    from_dict,
    from_flags,
    to_dict,
    to_toml,
)
from lmoe_compiler.train.data import Corpus, prepare
from lmoe_compiler.train.display import Display, Silent, make_display, result_table
from lmoe_compiler.train.loop import Trainer
from lmoe_compiler.train.machine import compile_model, pick_compiler, pick_device, pick_threads
from lmoe_compiler.train.plot import draw, read_metrics
from lmoe_compiler.train.ranks import Ranks, join

_PROMPT_BYTES = 64


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lmoe train",
        usage="lmoe train [options]",
        description="Train a Linear-MoE language model on text, compiled through our backend.",
        epilog="Without --data it reads the Python standard library's sources. "
        'Example: lmoe train --data "books/**/*.txt" --minutes 30. On several processes or GPUs: '
        "torchrun --nproc-per-node 4 -m lmoe_compiler.cli train --sp 2 --ep 2 --dp 2",
    )
    add_flags(parser)
    arguments = parser.parse_args(argv)
    if not arguments.resume:
        return train(from_flags(TrainConfig(), arguments))
    folder = checkpoint.newest(Path(arguments.resume))
    saved = from_dict(checkpoint.read_manifest(folder)["config"])
    # The ranks are those of the launch, not those that saved.
    anew = dataclasses.replace(saved, sp=1, ep=1, dp=0)
    config = dataclasses.replace(from_flags(anew, arguments), out=str(folder.parent))
    check_same_architecture(saved, config, folder)
    return train(config, folder)


def fresh_folder(out: Path) -> Path:
    """`out`, or `out-2` and so on when it holds a run already, made: no run is written over."""
    candidate, number = out, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = out.with_name(f"{out.name}-{number}")
    candidate.mkdir(parents=True, exist_ok=True)
    return candidate


def check_same_architecture(saved: TrainConfig, config: TrainConfig, folder: Path) -> None:
    """A checkpoint's weights fit one model: every difference is listed."""
    before, now = to_dict(saved)["model"], to_dict(config)["model"]
    before["tokenizer"], now["tokenizer"] = saved.tokenizer, config.tokenizer
    for model in (before, now):
        # A file of one's own may have moved.
        model["mixers"] = {k: v.rpartition(":")[2] for k, v in model["mixers"].items()}
    different = [name for name in before if before[name] != now[name]]
    if different:
        raise ArchitectureMismatch(
            f"{folder} holds another model",
            where="\n".join(
                f"{name}: checkpoint {before[name]!r}, asked for {now[name]!r}"
                for name in different
            ),
            why="a checkpoint's weights fit the model that wrote it",
            try_=f"lmoe train --resume {folder.parent}  # without options of the model",
        )


def train(config: TrainConfig, resume: Path | None = None) -> int:
    """One whole run in `config.out`, on the ranks that torchrun started; continues from the
    checkpoint `resume`.
    """
    # Equal runs must have equal losses, bit for bit; what torch cannot promise, it only warns of.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    begin = time.monotonic()
    for other in config.compare:
        if not (Path(other) / "metrics.jsonl").is_file():
            raise InvalidTraining(
                f"--compare {other}: not the folder of a run",
                why="the curves are drawn from its metrics.jsonl",
                try_="--compare runs/default",
            )
    with join(config) as ranks:
        if resume is None:
            # Chosen and made before another rank looks.
            out = ranks.by_first(lambda: fresh_folder(Path(config.out)))
            config = dataclasses.replace(config, out=str(out))
        status = _train(config, resume, ranks)
    if ranks.first and not status:
        print(
            f"\n{time.monotonic() - begin:.0f} s in all; {config.out} has curves.png, sample.txt, checkpoints"
        )
        print(f"more text: lmoe generate {config.out} --prompt 'def '")
    return status


def _train(config: TrainConfig, resume: Path | None, ranks: Ranks) -> int:
    run = Path(config.out)

    def read() -> Corpus:
        return prepare(
            config.data, config.tokenizer, config.held_out,
            environment().cache_dir.expanduser() / "text", config.sequence_length,
        )  # fmt: skip

    ranks.by_first(read)
    corpus = read()
    model_config = dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model_config)
    torch.manual_seed(config.seed)
    model = LinearMoEForCausalLM(model_config).to(pick_device(config.device))
    config = dataclasses.replace(config, threads=pick_threads(config, model))
    torch.set_num_threads(config.threads)
    display: Display = Silent()
    beaten: dict[str, float] = {}
    if ranks.first:
        (run / "config.toml").write_text(to_toml(to_dict(config)))
        beaten = fitted_baselines(corpus, config.final_tokens)
        print(introduction(config, model, corpus, ranks), flush=True)
        display = make_display(beaten)
    ranks.spread(model)
    compiled = compile_model(
        model, config.compiler, expert_capacity=config.expert_capacity or None, **ranks.options
    )
    trainer = Trainer(config, model, compiled, corpus, display, ranks)
    try:
        if resume is not None:
            trainer.restore(resume)
            display.say(f"resumed at step {trainer.clock.step}")
        bits = trainer.train()
    except KeyboardInterrupt:
        display.say(f"stopped and saved; lmoe train --resume {run} continues")
        return 130
    finally:
        display.close()
    whole = ranks.whole(model)
    if ranks.first:
        _leave(trainer, whole, bits, beaten)
    return 0


def _leave(
    trainer: Trainer, model: LinearMoEForCausalLM, bits: float, beaten: dict[str, float]
) -> None:
    """What a finished run leaves and prints."""
    config = trainer.config
    sample = write_sample(trainer, model)
    draw_runs(config, beaten)
    used = [config.model.mixers[letter] for letter in sorted(set(config.model.layer_pattern))]
    name = " ".join([config.model.layer_pattern, *map(str, used)])
    result = {"bits_per_byte": bits, "baselines": beaten, **vars(trainer.clock)}
    (trainer.run / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\n{sample}\n\n{result_table(name, bits, beaten)}")


def introduction(
    config: TrainConfig, model: LinearMoEForCausalLM, corpus: Corpus, ranks: Ranks
) -> str:
    """What is trained on what, before it starts."""
    total = sum(p.numel() for p in model.parameters())
    sparse = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("gate_up", "down")))
    m = config.model
    active = total - sparse + (sparse * m.top_k // m.num_experts if m.num_experts else 0)
    layers = " ".join(str(m.mixers[letter]) for letter in m.letters)
    facts = corpus.facts
    length = f"{config.steps} steps" if config.steps else f"{config.minutes:g} minutes"
    factor = config.expert_capacity
    places = f", places for {factor:g} of a balanced load" if factor else ""
    grid = f", {ranks.size} ranks: sp {config.sp}, ep {config.ep}, dp {ranks.size // config.sp}"
    return "\n".join(
        [
            f"model   {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active; {layers}",
            f"        {m.num_experts} experts, {m.top_k} a token, "
            f"shared expert {m.shared_expert_size or 'none'}{places if m.num_experts else ''}",
            f"text    {facts['files']:,} files, {facts['train_bytes'] / 1e6:.1f} MB to train on, "
            f"{facts['held_out_bytes'] / 1e6:.1f} MB held out",
            f"run     {length}, {config.accumulate * config.batch_size} x {config.sequence_length} "
            f"tokens a step, {config.dtype}, compiler {pick_compiler(config.compiler)}",
            f"        threads {config.threads}{grid if ranks.size > 1 else ''}, in {config.out}",
        ]
    )


def fitted_baselines(corpus: Corpus, limit: int) -> dict[str, float]:
    """The baselines on the text that the last evaluation reads; kept beside the corpus."""
    kept = corpus.folder / f"baselines-{limit}.json"
    if kept.exists():
        result: dict[str, float] = json.loads(kept.read_text())
        return result
    result = baselines(corpus.text("train"), corpus.held_out_text(limit))
    kept.write_text(json.dumps(result))
    return result


def write_sample(trainer: Trainer, model: LinearMoEForCausalLM) -> str:
    """The model's continuation of the first held-out text."""
    corpus, config, model = trainer.corpus, trainer.config, model.eval()
    prompt = bytes(corpus.text("held_out")[:_PROMPT_BYTES])
    tokens = corpus.tokenizer.encode(prompt)
    new = [
        int(token[0])
        for token in stream(model, [tokens], config.sample_tokens, temperature=0.9, top_p=0.95)
    ]
    text = corpus.tokenizer.decode([*tokens, *new])
    (trainer.run / "sample.txt").write_text(text)
    return "\n".join(["a sample", *(f"  | {line}" for line in text.splitlines())])


def draw_runs(config: TrainConfig, beaten: dict[str, float]) -> None:
    runs = {Path(run).name: read_metrics(Path(run)) for run in (config.out, *config.compare)}
    draw(runs, beaten, Path(config.out) / "curves.png")

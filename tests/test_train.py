"""Training: configuration, resume, kills, non-finite numbers, and what a run prints and leaves."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lmoe_compiler import cli
from lmoe_compiler.errors import (
    ArchitectureMismatch,
    DamagedCheckpoint,
    InvalidModel,
    InvalidTraining,
    NonFiniteLoss,
)
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.models.mixer_table import mixer_spec
from lmoe_compiler.train import checkpoint, diagnose, generate, run
from lmoe_compiler.train.config import (
    TrainConfig,
    add_flags,
    from_dict,
    from_flags,
    override,
    read_toml,
    to_dict,
    to_toml,
)
from lmoe_compiler.train.display import (
    Evaluation,
    PlainDisplay,
    Step,
    clock,
    load_bars,
    result_table,
    sparkline,
)
from lmoe_compiler.train.loop import learning_rate
from lmoe_compiler.train.machine import pick_device, pick_threads

SMALL = (
    "--hidden-size 16 --num-layers 2 --pattern LN --num-heads 2 --num-kv-heads 1 --head-dim 8 "
    "--linear-heads 2 --key-dim 4 --value-dim 8 --num-experts 4 --expert-size 8 "
    "--shared-expert-size 8 --sequence-length 16 --batch-size 2 --evaluation-tokens 64 "
    "--final-tokens 128 --sample-tokens 8 --compiler none"
).split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        lines = (f"def f{number}_{n}(x):\n    return x + {n}\n" for n in range(20))
        (folder / f"{number}.py").write_text("".join(lines))
    return folder


def flags(text: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(text), "--held-out", "0.2", "--out", str(out), *SMALL, *more]


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, whatever ranks wrote it."""
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in found.items()}
    checkpoint.load(folder, state)
    return state


# -- configuration -------------------------------------------------------------------------------


def parse(*argv: str, base: TrainConfig | None = None) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(base or TrainConfig(), parser.parse_args(argv))


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('batch_size = 3\nseed = 5\nminutes = 2\n[model]\nmixers = { L = "gla" }\n')
    config = parse("--config", str(path), "--seed", "7", "--hidden-size", "32", "--top-k", "1")
    assert (config.batch_size, config.seed, config.minutes) == (3, 7, 2.0)
    assert (config.model.hidden_size, config.model.top_k) == (32, 1)
    assert config.model.mixers == {"L": "gla", "N": "attention"}
    assert config.clip == TrainConfig().clip


def test_pattern_sets_the_number_of_layers():
    assert parse("--pattern", "NNNN").model.letters == "NNNN"
    assert parse("--pattern", "LLN").model.letters == "LLNLLN"
    assert parse("--pattern", "LN", "--num-layers", "6").model.letters == "LNLNLN"
    assert parse("--mixer", "kda").model.mixers["L"] == "kda"


def test_configuration_survives_toml_and_checkpoints(tmp_path):
    config = parse("--data", "a b", 'c"d', "--mixer", "gla", "--tie-embeddings", "true")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(to_dict(config)))
    assert override(TrainConfig(), read_toml(path), "file") == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 2}, "no option 'batchsize'"),
        ({"batch_size": "2"}, "is not of type int"),
        ({"dtype": "fp16"}, "dtype='fp16' does not exist"),
        ({"compiler": "nvcc"}, "compiler='nvcc' does not exist"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"held_out": 1.5}, "held_out=1.5"),
        ({"expert_capacity": -1.0}, "neither 0 nor a positive number"),
        ({"expert_capacity": 1.0, "compiler": "none"}, "without a compiler"),
        ({"minutes": 0}, "nothing to do"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is not a positive number"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"warmup": 100.0}, "a share of the run, not a number of steps"),
        ({"out": ""}, "out='' is empty"),
        ({"out": __file__}, "is a file"),
        ({"model": {"layers": 3}}, "no option 'layers'"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(InvalidTraining, match=message):
        override(TrainConfig(), change, "test")


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "bad.toml").write_text("seed = = 3")
    with pytest.raises(InvalidTraining, match="is not TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(InvalidTraining, match="cannot read"):
        read_toml(tmp_path / "none.toml")


def test_learning_rate_rises_then_falls_on_a_cosine():
    config = TrainConfig(learning_rate=1.0, warmup=0.1, final_rate=0.2)
    assert learning_rate(config, 0.0) > 0
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.6)
    assert learning_rate(config, 1.0) == pytest.approx(0.2)


# -- whole runs ----------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *flags(text, out, "--steps", "60", "--learning-rate", "0.02")]) == 0
    printed = capsys.readouterr().out
    for name in (
        "unigram",
        "bigram",
        "trigram",
        "zlib",
        "LN gated_delta_rule attention",
        "a sample",
    ):
        assert name in printed
    for name in ("config.toml", "metrics.jsonl", "curves.png", "sample.txt", "result.json"):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").iterdir())
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 60
    assert result["bits_per_byte"] < result["baselines"]["unigram"]
    assert sum(losses(out)[-5:]) < 0.7 * sum(losses(out)[:5])
    assert len(checkpoint.checkpoints(out)) == 2
    # the same command does not write over it
    assert cli.main(["train", *flags(text, out, "--steps", "1")]) == 0
    assert (tmp_path / "run-2" / "result.json").exists()
    # and decoding continues from it
    capsys.readouterr()
    assert cli.main(["generate", str(out), "--prompt", "def ", "--tokens", "5"]) == 0
    # (A line may end anywhere in what is generated.)
    assert any(line.startswith("def ") for line in capsys.readouterr().out.splitlines())


def test_what_a_capacity_drops_is_shown_and_logged(text, tmp_path, capsys):
    """With places for all nothing is, and losses are those of the exact model; with few, most is."""

    def train(name: str, *more: str) -> tuple[list[float], list[list[float]], str]:
        same = ("--steps", "3", "--evaluations", "1", "--compiler", "eager")
        assert cli.main(["train", *flags(text, tmp_path / name, *same, *more)]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if "loss" in record]
        shares = [record["dropped"] for record in records if "dropped" in record]
        return [record["loss"] for record in records], shares, capsys.readouterr().out

    exact, none, _ = train("exact")
    roomy, zeros, _ = train("roomy", "--expert-capacity", "4")
    tight, shares, printed = train("tight", "--expert-capacity", "0.25")
    assert roomy == pytest.approx(exact, rel=1e-5)
    assert tight[1:] != pytest.approx(exact[1:], rel=1e-5)
    assert none == []
    assert zeros == [[0.0, 0.0]] * 3
    # Four experts have places for a quarter of all rows, and perhaps not all are taken.
    assert all(0.75 <= share < 1 for row in shares for share in row)
    assert f"dropped {max(shares[-1]):.1%} at most" in printed
    assert "places for 0.25 of a balanced load" in printed


def test_resume_continues_with_bitwise_the_same_losses(text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    same = ("--steps", "8", "--accumulate", "2", "--evaluations", "4", "--keep", "9")
    run.main(flags(text, whole, *same))
    run.main(flags(text, cut, *same))
    # forget everything after the checkpoint of step 4, as if the machine had died there
    for folder in checkpoint.checkpoints(cut)[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run.main(["--resume", str(cut)])
    assert losses(cut) == losses(whole)
    first, second = (tensors(checkpoint.newest(path)) for path in (whole, cut))
    assert {name.split(".")[0] for name in first} == {"model", "optimiser"}
    for name, value in first.items():
        assert torch.equal(second[name], value), name


OWN = """
import torch, torch.nn.functional as F
import lmoe_compiler as lmoe
from lmoe_compiler import Head, State, Token
from lmoe_compiler.dims import K, V
from lmoe_compiler.models.mixer_table import Learned, MixerSpec, Projected

class M(lmoe.Dim): "slots"

@lmoe.recurrence
def gated(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, u: Head[K]):
    o = q @ (S + torch.outer(u * k, v))
    S = g.sigmoid() * S + torch.outer(k, v)
    return S, o

@lmoe.recurrence
def slots(S: State[M, V], q: Token[M], k: Token[M], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, S.T @ q

@lmoe.recurrence
def keys(h: State[K], x: Token[K]):
    h = 0.9 * h + x
    return h, h

made = MixerSpec(gated, {
    "q": Projected(), "k": Projected((F.silu,), conv=True), "v": Projected(), "g": Projected(bias=3.0),
    "u": Learned(torch.zeros)})
"""


def test_a_variant_of_your_own_is_trained_resumed_and_generates_from_anywhere(
    text, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert run.main(flags(text, out, "--steps", "2", "--mixer", "mine.py:made")) == 0
    monkeypatch.chdir(text)
    out = out.rename(tmp_path / "moved")
    assert run.main(["--resume", str(out), "--steps", "3"]) == 0
    assert len(losses(out)) == 3
    assert generate.main([str(out), "--prompt", "def ", "--tokens", "3"]) == 0
    assert cli.main(["explain", f"{tmp_path / 'mine.py'}:made"]) == 0
    assert "read r[V] = q' S" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated", r'"g": Projected\(\(torch.sigmoid,\)\), "u": Learned'),
        ("slots", "how long the dim M"),
        ("keys", r"output of recurrence keys is \[K\], not \[V\]"),
        ("missing", "no recurrence or MixerSpec 'missing'"),
        ("M", "it is a type"),
    ],
)
def test_a_variant_of_your_own_that_makes_no_layer_says_what_it_lacks(name, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    config = dataclasses.replace(ModelConfig(), mixers={"L": f"{path}:{name}", "N": "attention"})
    with pytest.raises(InvalidModel, match=message):
        LinearMoEForCausalLM(config)
    with pytest.raises(InvalidModel, match="there is no file or module"):
        mixer_spec(f"{tmp_path / 'nowhere.py'}:{name}")


def test_curves_to_compare_are_looked_for_before_the_run(text, tmp_path):
    with pytest.raises(InvalidTraining, match="not the folder of a run"):
        run.main(flags(text, tmp_path / "out", "--steps", "1", "--compare", str(text)))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(InvalidTraining, match="torch sees no GPU"):
        pick_device("cuda")


def test_resume_refuses_another_architecture(text, tmp_path):
    out = tmp_path / "run"
    run.main(flags(text, out, "--steps", "1"))
    with pytest.raises(ArchitectureMismatch) as caught:
        run.main(["--resume", str(out), "--hidden-size", "32", "--mixer", "gla"])
    message = str(caught.value)
    assert "hidden_size: checkpoint 16, asked for 32" in message
    assert "mixers: checkpoint {'L': 'gated_delta_rule'" in message
    assert "num_heads" not in message


def test_stopping_by_hand_saves(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    seen = []

    def interrupt(self, step):
        seen.append(step)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PlainDisplay, "step", interrupt)
    assert run.main(flags(text, out, "--steps", "9")) == 130
    assert checkpoint.newest(out).name == "step-00000003"
    assert f"stopped and saved; lmoe train --resume {out} continues" in capsys.readouterr().out


def test_bfloat16_and_the_clock(text, tmp_path):
    out = tmp_path / "run"
    assert run.main(flags(text, out, "--minutes", "0.03", "--dtype", "bf16")) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["step"] >= 1
    assert result["seconds"] < 20


# -- non-finite numbers --------------------------------------------------------------------------


def test_non_finite_loss_stops_and_names_the_module(text, tmp_path, monkeypatch):
    """A layer that divides by zero at step 3: the error names it, and step 2's checkpoint stays."""
    from lmoe_compiler.models.moe import SwiGLU

    forward, calls = SwiGLU.forward, []

    def broken(self, x):
        calls.append(1)
        y = forward(self, x)
        # two layers, one throw-away pass before the first step, no evaluation between
        return y / 0 if len(calls) > 2 * 4 else y

    monkeypatch.setattr(SwiGLU, "forward", broken)
    out = tmp_path / "run"
    more = ("--steps", "8", "--evaluations", "1")
    with pytest.raises(NonFiniteLoss) as caught:
        run.main(flags(text, out, *more))
    message = str(caught.value)
    assert "the loss is nan at step 4" in message
    assert "module layers.0.mlp.shared (SwiGLU) gave the first output that is not finite" in message
    assert "last good checkpoint: none yet" in message


def test_non_finite_weights_and_gradients_are_named(text, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert "every module's output is finite" in diagnose.first_non_finite(model, torch.ones(1, 2))
    (model(torch.full((1, 2), 1e30)).sum() * 1e30).backward()
    assert "gradient of 1.weight" in diagnose.first_non_finite_gradient(model)
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    assert "parameter 1.bias" in diagnose.first_non_finite(model, torch.ones(1, 2))


def test_non_finite_gradient_keeps_the_last_checkpoint(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    clip = nn.utils.clip_grad_norm_
    calls = []

    def overflow(parameters, limit):
        calls.append(1)
        return clip(parameters, limit) * (float("inf") if len(calls) == 6 else 1)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(NonFiniteLoss, match=r"last good checkpoint: .*step-00000004"):
        run.main(flags(text, out, "--steps", "8", "--evaluations", "4"))
    tensors(checkpoint.newest(out))


# -- checkpoints ---------------------------------------------------------------------------------


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    """Every system call of a save is tried as the last one of the process."""
    moments = 0
    while True:
        out = tmp_path / str(moments)
        out.mkdir()
        checkpoint.save(out, 1, {"x": torch.ones(3)}, {}, keep=1)
        child = os.fork()
        if not child:
            _save_until(out, moments)
        _, status = os.waitpid(child, 0)
        step = checkpoint.read_manifest(checkpoint.newest(out))["step"]
        assert torch.equal(tensors(checkpoint.newest(out))["x"], torch.full((3,), float(step)))
        checkpoint.remove_unfinished(out)
        if not os.WIFSIGNALED(status):
            break
        moments += 1
    assert moments >= 8
    assert step == 2
    assert [p.name for p in out.iterdir()] == ["step-00000002"]


def _save_until(out: Path, moments: int) -> None:
    """In a child process: save checkpoint 2, killed before its system call number `moments`."""
    left = [moments]

    def counted(call):
        def killed_when_due(*args, **kwargs):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **kwargs)

        return killed_when_due

    for name in ("mkdir", "open", "fsync", "rename", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    Path.open = counted(Path.open)  # type: ignore[method-assign]
    checkpoint.save(out, 2, {"x": torch.full((3,), 2.0)}, {}, keep=1)
    os._exit(0)


@pytest.mark.slow
def test_kill_9_of_a_real_run_then_resume(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lmoe_compiler.cli", "train"]
    more = ("--steps", "100000", "--evaluations", "50000", "--compiler", "none")
    process = subprocess.Popen([*command, *flags(text, out, *more)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoint.checkpoints(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = checkpoint.read_manifest(checkpoint.newest(out))["step"]
    assert before >= 4
    assert run.main(["--resume", str(out), "--steps", str(before + 3)]) == 0
    recorded = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in recorded if "loss" in r] == list(range(1, before + 4))


def test_damaged_checkpoints_are_named_with_the_one_before(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": torch.ones(99)}, {}, keep=2)
    path = checkpoint.newest(tmp_path) / "__0_0.distcp"
    payload = bytearray(path.read_bytes())
    payload[200] ^= 1
    path.write_bytes(payload)
    state = {"x": torch.zeros(99)}
    with pytest.raises(DamagedCheckpoint, match="SHA-256") as caught:
        checkpoint.load(checkpoint.newest(tmp_path), state)
    assert not state["x"].any()
    assert f"--resume {tmp_path / 'step-00000001'}" in str(caught.value)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"cannot read __0_0\.distcp"):
        checkpoint.load(checkpoint.newest(tmp_path), state)
    with pytest.raises(DamagedCheckpoint, match=r"holds other tensors: .*y"):
        checkpoint.load(tmp_path / "step-00000001", {"y": torch.zeros(99)})
    (path.parent / "manifest.json").write_text("{")
    with pytest.raises(DamagedCheckpoint, match=r"cannot read manifest\.json"):
        checkpoint.load(path.parent, state)
    with pytest.raises(DamagedCheckpoint, match="has no checkpoint"):
        checkpoint.newest(tmp_path / "elsewhere")


# -- what a person sees --------------------------------------------------------------------------


def a_step(number: int, progress: float, *dropped: float) -> Step:
    load = [[0.5, 0.25, 0.25, 0.0]]
    return Step(number, progress, 2.5, 1e-3, 0.7, number * 512, 1234.0, 30.0, load, dropped)


def test_plain_display():
    out = io.StringIO()
    display = PlainDisplay(out, every=3600)
    for number in range(1, 5):
        display.step(a_step(number, number / 4))
    display.evaluation(Evaluation(4, 2048, 31.0, 2.125))
    lines = out.getvalue().splitlines()
    # the first, the last, the evaluation: not one line a step
    assert len(lines) == 3
    assert "25%  loss 2.5000" in lines[0]
    assert "busiest expert 2.0x  1:30 left" in lines[0]
    assert lines[2] == "step      4  held-out 2.1250 bits per byte"


def test_live_display_shows_all_of_it():
    console = pytest.importorskip("rich.console")
    from lmoe_compiler.train.display import LiveDisplay

    display = LiveDisplay({"trigram": 2.5})
    display.step(a_step(40, 0.5, 0.0125))
    display.evaluation(Evaluation(40, 20480, 31.0, 2.125))
    out = io.StringIO()
    console.Console(file=out, width=100).print(display._render())
    display.close()
    for part in (
        "2.5000",
        "2.1250 bits per byte",
        "trigram 2.50",
        "1,234 tokens/s",
        "0:30",
        "█▄▄",
        "dropped 1.25%",
    ):
        assert part in out.getvalue(), part


def test_threads_are_chosen_by_speed_for_runs_by_the_clock_only(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    now, chosen = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)

    class Busy(nn.Module):
        """Takes 3 s with one thread, and with two as long as it is told."""

        def __init__(self, two: float) -> None:
            super().__init__()
            self.embed, self.two = nn.Embedding(1, 1), two

        def forward(self, ids: torch.Tensor) -> None:
            now[0] += self.two if chosen[-1] == 2 else 3.0

    assert pick_threads(TrainConfig(), Busy(1.6)) == 2
    assert pick_threads(TrainConfig(), Busy(9.0)) == 1
    assert pick_threads(TrainConfig(steps=3), Busy(9.0)) == 2
    assert pick_threads(TrainConfig(threads=4), Busy(9.0)) == 4


def test_small_drawings():
    assert sparkline([1, 2, 3, 4], 4) == "▁▃▆█"
    assert len(sparkline(list(range(1000)), 20)) == 20
    assert load_bars([0.25] * 4) == "▄▄▄▄"
    assert load_bars([1.0, 0.0]) == "█ "
    assert (clock(59.4), clock(61), clock(3723)) == ("0:59", "1:01", "1:02:03")
    table = result_table("ours", 2.0, {"zlib": 2.2, "trigram": 2.5}).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["ours", "zlib", "trigram"]


# -- the command ---------------------------------------------------------------------------------


def test_every_command_has_help(capsys):
    for command in ("train", "generate", "explain"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        assert f"lmoe {command}" in capsys.readouterr().out
    assert cli.main(["bench"]) == 0
    assert "lmoe bench" in capsys.readouterr().out


def test_explain_shows_a_recurrence_and_a_model(capsys):
    assert cli.main(["explain", "gla"]) == 0
    assert "recurrence gla" in capsys.readouterr().out
    assert cli.main(["explain", "model", "--pattern", "LN", "--mixer", "gla"]) == 0
    printed = capsys.readouterr().out
    for part in ("recurrence gla", "lmoe.experts", "lmoe.grouped_mm", "backward"):
        assert part in printed, part


def test_help_and_mistakes(capsys):
    assert cli.main([]) == 0
    assert "lmoe train" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err
    assert cli.main(["train", "--pattern", "LX"]) == 1
    assert "letter 'X' at position 1" in capsys.readouterr().err
    assert cli.main(["train", "--top-k", "9"]) == 1
    assert "top_k=9 of num_experts=8" in capsys.readouterr().err
    assert cli.main(["generate", "nowhere"]) == 1
    assert "has no checkpoint" in capsys.readouterr().err

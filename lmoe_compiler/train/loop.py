"""The training loop: batches in, steps, evaluations, checkpoints, and at the end a picture and a
sample.

Everything random is a function of (seed, step), so a resumed run continues with bitwise the same
losses on CPU. A run is measured in `progress`, 0 to 1: steps of `steps`, or seconds of `minutes`. On
many ranks (ranks.py) every rank draws the whole batch, takes its part, and goes by the first one's
clock.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_compiler.models.linear_moe import CausalLMOutput, LinearMoEForCausalLM
from lmoe_compiler.train import checkpoint, diagnose
from lmoe_compiler.train.config import TrainConfig, to_dict
from lmoe_compiler.train.data import Corpus, windows
from lmoe_compiler.train.display import Display, Evaluation, Silent, Step
from lmoe_compiler.train.logs import Logs
from lmoe_compiler.train.ranks import Ranks

CompiledModel = Any


@dataclass
class Clock:
    """How far a run is: what a checkpoint keeps beside weights and optimiser."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluations: int = 0


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up, then a cosine down to `final_rate` of the peak."""
    if progress < config.warmup:
        # Never 0: the first step of a run must not be lost.
        return config.learning_rate * max(progress / config.warmup, 0.01)
    phase = (progress - config.warmup) / (1 - config.warmup)
    share = config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * phase))
    return config.learning_rate * share


def make_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only matrices decay, not norms, gates and embeddings."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [p for n, p in trained.items() if p.ndim >= 2 and "embed" not in n]
    chosen = {id(p) for p in decayed}
    others = [p for p in trained.values() if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


@contextmanager
def stop_when_asked() -> Iterator[list[int]]:
    """Ctrl-C or a termination signal ends the run after its step, so that a whole one is saved.

    Yields a list that stays empty until then. A second Ctrl-C interrupts at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """One model, its optimiser and the run's folder."""

    def __init__(
        self,
        config: TrainConfig,
        model: LinearMoEForCausalLM,
        compiled: CompiledModel,
        corpus: Corpus,
        display: Display,
        ranks: Ranks,
    ) -> None:
        self.config, self.model, self.compiled = config, model, compiled
        self.corpus, self.display, self.ranks = corpus, display, ranks
        self.optimiser = make_optimiser(model, config)
        self.clock = Clock()
        self.run = Path(config.out)
        self.device = model.embed.weight.device
        self._speed = 0.0
        self._compile_seconds = 0.0

    # -- one run ---------------------------------------------------------------------------------

    def train(self) -> float:
        """Train to the end; the final held-out bits per byte."""
        logs: Logs | Silent = Silent()
        if self.ranks.first:
            checkpoint.remove_unfinished(self.run)
            logs = Logs(self.run, self.clock.step)
        stop = False
        try:
            self._compile()
            with stop_when_asked() as asked:
                while self.progress < 1 and not stop:
                    self._step(logs)
                    self._evaluate_if_due(logs)
                    stop = self.ranks.any(bool(asked))
            if stop:
                self.save()
                raise KeyboardInterrupt
            self.save()
            bits = self.bits_per_byte(self.config.final_tokens, overlap=True)
        finally:
            logs.close()
        return bits

    @property
    def progress(self) -> float:
        if self.config.steps:
            return min(1.0, self.clock.step / self.config.steps)
        budget = max(1.0, 60 * self.config.minutes - self._compile_seconds)
        return min(1.0, self.clock.seconds / budget)

    def _compile(self) -> None:
        """A backward pass that is thrown away, so that compiling is not part of the schedule."""
        begin = time.monotonic()
        loss = self._loss(*self._batch(0)).loss
        assert loss is not None
        loss.backward()
        self.optimiser.zero_grad()
        self._compile_seconds = self.ranks.of_first(time.monotonic() - begin)

    def _step(self, logs: Logs | Silent) -> None:
        begin = time.monotonic()
        rate = learning_rate(self.config, self.progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, load, dropped = self._gradients()
        norm = self.ranks.clip_gradients(self.model, self.config.clip)
        if not torch.isfinite(norm):
            where = diagnose.first_non_finite_gradient(self.model)
            self._stop(f"the gradient's norm is {float(norm)}", where)
        self.optimiser.step()
        self.optimiser.zero_grad()
        config, clock = self.config, self.clock
        tokens = config.accumulate * config.batch_size * config.sequence_length
        seconds = self.ranks.of_first(time.monotonic() - begin)
        clock.step, clock.tokens, clock.seconds = (
            clock.step + 1,
            clock.tokens + tokens,
            clock.seconds + seconds,
        )
        speed = tokens / seconds
        self._speed = 0.95 * self._speed + 0.05 * speed if self._speed else speed
        step = Step(
            step=clock.step,
            progress=self.progress,
            loss=loss,
            learning_rate=rate,
            gradient_norm=float(norm),
            tokens=clock.tokens,
            tokens_per_second=self._speed,
            seconds=clock.seconds,
            load=(load / load.sum(-1, keepdim=True)).tolist(),
            dropped=(dropped.sum(-1) / load.sum(-1)).tolist() if config.expert_capacity else (),
        )
        logs.step(step)
        self.display.step(step)

    def _gradients(self) -> tuple[float, Tensor, Tensor]:
        """Accumulated gradients of one step; its mean cross entropy, experts' loads and what they drop."""
        total, loads = 0.0, []
        for micro in range(self.config.accumulate):
            batch = self._batch(micro)
            output = self._loss(*batch)
            assert output.loss is not None
            assert output.cross_entropy is not None
            if not torch.isfinite(output.loss):
                with self._precision():
                    where = diagnose.first_non_finite(self.ranks.whole(self.model), *batch)
                self._stop(f"the loss is {float(output.loss.detach())}", where)
            (output.loss / self.config.accumulate).backward()
            total += float(output.cross_entropy.detach()) / self.config.accumulate
            loads.append(torch.stack([output.expert_load, output.expert_dropped]))
        self.ranks.sum_gradients(self.model)
        load, dropped = torch.stack(loads).sum(0)
        return total, load, dropped

    def _batch(self, micro: int) -> tuple[Tensor, Tensor]:
        config = self.config
        seed = (config.seed, self.clock.step, micro)
        inputs, labels = self.corpus.batch(config.batch_size, config.sequence_length, seed)
        return inputs.to(self.device), labels.to(self.device)

    def _loss(self, inputs: Tensor, labels: Tensor) -> CausalLMOutput:
        inputs, labels = (self.ranks.mine(x).contiguous() for x in (inputs, labels))
        with self._precision():
            output: CausalLMOutput = self.compiled(inputs, labels)
        return output

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.dtype == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _stop(self, what: str, where: str) -> None:
        saved = checkpoint.checkpoints(self.run)
        raise diagnose.non_finite(what, self.clock.step + 1, where, str(saved[-1]) if saved else "")

    # -- held-out text ---------------------------------------------------------------------------

    def _evaluate_if_due(self, logs: Logs | Silent) -> None:
        due = int(self.progress * self.config.evaluations)
        if due > self.clock.evaluations:
            self.clock.evaluations = due
            self._evaluate(logs)
            if self.progress < 1:
                self.save()

    def _evaluate(self, logs: Logs | Silent) -> None:
        begin = time.monotonic()
        bits = self.bits_per_byte(self.config.evaluation_tokens, overlap=False)
        self.clock.seconds += self.ranks.of_first(time.monotonic() - begin)
        clock = self.clock
        evaluation = Evaluation(clock.step, clock.tokens, clock.seconds, bits)
        logs.evaluation(evaluation)
        self.display.evaluation(evaluation)

    @torch.no_grad()
    def bits_per_byte(self, limit: int, overlap: bool) -> float:
        """Of `limit` held-out tokens. `overlap`: each has at least half a window before it."""
        length = self.config.sequence_length
        stride = length // 2 if overlap else length
        nats, count, first = 0.0, 0, True
        for inputs, labels in self._held_out_batches(length, stride, limit):
            each = self._nats(inputs, labels)
            nats += float(each[:, length - stride :].double().sum())
            count += each[:, length - stride :].numel()
            if first and overlap:
                nats += float(each[0, : length - stride].double().sum())
                count += length - stride
            first = False
        return nats / count / math.log(2) / self.corpus.bytes_per_token("held_out")

    def _nats(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each token [B, T]; the same on all ranks."""
        model, rows = self.model, len(inputs)
        if self.ranks.size > 1 or self.config.expert_capacity:
            # Cut up, only the compiled model is right; rows of nothing make a whole batch. They stand behind the
            # others, so they take no places from them.
            model, missing = self.compiled, self.config.batch_size - rows
            inputs, labels = (F.pad(x, (0, 0, 0, missing)) for x in (inputs, labels))
        with self._precision():
            logits = model(self.ranks.mine(inputs).contiguous()).logits.float()
        own = self.ranks.mine(labels)
        each = F.cross_entropy(logits.transpose(1, 2), own, reduction="none")
        return self.ranks.assemble(each, labels.shape)[:rows]

    def _held_out_batches(
        self, length: int, stride: int, limit: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        rows: list[tuple[Tensor, Tensor]] = []
        for window in windows(self.corpus.held_out_tokens(limit), length, stride):
            rows.append(window)
            if len(rows) == self.config.batch_size:
                yield self._stack(rows)
                rows = []
        if rows:
            yield self._stack(rows)

    def _stack(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, labels = zip(*rows, strict=True)
        return torch.stack(inputs).to(self.device), torch.stack(labels).to(self.device)

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self) -> Path:
        facts = {
            "clock": vars(self.clock),
            "config": to_dict(self.config),
            "corpus": self.corpus.key,
        }
        step, keep = self.clock.step, self.config.keep
        return checkpoint.save(self.run, step, self._state(), facts, keep, self.ranks)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever ranks it was saved by."""
        checkpoint.load(folder, self._state(), self.ranks)
        self.clock = Clock(**checkpoint.read_manifest(folder)["clock"])

    def _state(self) -> dict[str, Any]:
        return checkpoint.state_of(self.model, self.optimiser, self.ranks)

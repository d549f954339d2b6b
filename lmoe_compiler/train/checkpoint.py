"""Checkpoints that are either whole or not there, and that any number of ranks can read.

    step-00000120/manifest.json            sizes and SHA-256 of the files, configuration, progress: readable
    step-00000120/.metadata, __0_0.distcp  model and optimiser, by torch.distributed.checkpoint: a file a rank

A folder is written under another name, synced to disk, then renamed by the first rank, so a kill or a power cut at any
moment leaves the previous checkpoint as the newest. The state is a nested dictionary of tensors: plain ones are the
same on all ranks, a DTensor is a rank's part of a global one. It is loaded in place, whatever its layout was when it
was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lmoe_compiler.errors import DamagedCheckpoint
from lmoe_compiler.train.ranks import Ranks

_MANIFEST, _UNFINISHED = "manifest.json", "unfinished-"
_ALONE = Ranks()


def state_of(
    model: nn.Module, optimiser: torch.optim.Optimizer, ranks: Ranks = _ALONE
) -> dict[str, Any]:
    """The tensors of both, by parameter. They share the memory of those in use."""
    moments: Any = get_optimizer_state_dict(model, optimiser)["state"]
    return {
        "model": ranks.as_global(model.state_dict()),
        "optimiser": {
            name: {kind: ranks.as_global({name: x})[name] for kind, x in of_one.items()}
            for name, of_one in moments.items()
        },
    }


def save(
    run: Path,
    step: int,
    state: dict[str, Any],
    facts: dict[str, Any],
    keep: int,
    ranks: Ranks = _ALONE,
) -> Path:
    """Write `state` as checkpoint `step` of a run, then drop all but the newest `keep`. On every rank."""
    folder = run / f"step-{step:08d}"

    def begin() -> Path:
        unfinished = run / f"{_UNFINISHED}{step:08d}-{os.getpid()}"
        unfinished.mkdir(parents=True)
        return unfinished

    unfinished = ranks.by_first(begin)
    _quietly(dcp.save, state, checkpoint_id=unfinished)
    written = sorted(path for path in unfinished.iterdir() if _owner(path) == ranks.index)
    digests = ranks.all({path.name: _digest(path) for path in written})

    def finish() -> None:
        files = {name: digest for part in digests for name, digest in part.items()}
        manifest = {"step": step, **facts, "files": files}
        _write(unfinished / _MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync(unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(unfinished, folder)
        _sync(run)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)

    ranks.by_first(finish)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(run.glob("step-*"))


def remove_unfinished(run: Path) -> None:
    """What a killed process left behind."""
    for folder in run.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder)


def newest(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest of the run that it is."""
    if (path / _MANIFEST).exists() or path.name.startswith("step-"):
        return path
    found = checkpoints(path)
    if not found:
        raise DamagedCheckpoint(
            f"{path} has no checkpoint",
            why="a run folder holds step-00000000 and so on",
            try_=f"lmoe train --out {path}",
        )
    return found[-1]


def load(folder: Path, state: dict[str, Any], ranks: Ranks = _ALONE) -> None:
    """Fill the tensors of `state` from a checkpoint, after its checksums were found right. On every rank."""
    files = read_manifest(folder)["files"]
    # Each rank reads some of the files, and all hear of every fault.
    faults = ranks.all(
        [_fault(folder, n, files[n]) for n in list(files)[ranks.index :: ranks.size]]
    )
    for fault in filter(None, (fault for part in faults for fault in part)):
        raise _damaged(folder, fault)
    try:
        _quietly(dcp.load, state, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        why = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise _damaged(folder, f"it holds other tensors: {why}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"cannot read {_MANIFEST}: {error}") from error
    if "files" not in manifest:
        raise _damaged(folder, f"{_MANIFEST} names no files: an earlier version wrote it")
    return manifest


def _owner(path: Path) -> int:
    """The rank that wrote a file: __3_0.distcp is rank 3's, .metadata the first one's."""
    number = path.name.removeprefix("__").partition("_")[0]
    return int(number) if number.isdigit() else 0


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _fault(folder: Path, name: str, written: dict[str, Any]) -> str:
    """What is wrong with a file; empty if nothing is."""
    try:
        found = _digest(folder / name)
    except OSError as error:
        return f"cannot read {name}: {error.strerror}"
    if found == written:
        return ""
    return (
        f"{name} has {found['bytes']} bytes and SHA-256 {found['sha256'][:12]}..., "
        f"written were {written['bytes']} and {written['sha256'][:12]}..."
    )


def _damaged(folder: Path, why: str) -> DamagedCheckpoint:
    others = [str(other) for other in reversed(checkpoints(folder.parent)) if other != folder]
    return DamagedCheckpoint(
        f"checkpoint {folder} is damaged",
        why=why,
        try_=f"--resume {others[0]}" if others else "start again without --resume",
    )


def _quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Without being told that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        function(*args, **kwargs)


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

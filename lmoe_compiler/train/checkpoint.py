"""Checkpoints that are either whole or not there: a folder is written under another name, then
renamed.

    step-00000120/manifest.json   sizes, SHA-256, configuration, measurements: readable
    step-00000120/state.pt        model, optimiser, progress (torch.save)

Every file and folder is synced to disk before the rename, so a kill or a power cut at any moment
leaves the previous checkpoint as the newest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lmoe_compiler.errors import DamagedCheckpoint

_STATE, _MANIFEST, _UNFINISHED = "state.pt", "manifest.json", "unfinished-"


def save(run: Path, step: int, state: dict[str, Any], facts: dict[str, Any], keep: int) -> Path:
    """Write `state` as checkpoint `step` of a run, then drop all but the newest `keep`."""
    folder = run / f"step-{step:08d}"
    unfinished = run / f"{_UNFINISHED}{step:08d}-{os.getpid()}"
    unfinished.mkdir(parents=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest()
    manifest = {"step": step, "bytes": len(payload), "sha256": digest, **facts}
    _write(unfinished / _STATE, payload)
    _write(unfinished / _MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(unfinished, folder)
    _sync(run)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
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


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the manifest of a checkpoint, after its checksum was found right."""
    manifest = read_manifest(folder)
    try:
        payload = (folder / _STATE).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"cannot read {_STATE}: {error.strerror}") from error
    digest = hashlib.sha256(payload).hexdigest()
    if digest != manifest["sha256"]:
        raise _damaged(
            folder,
            f"{_STATE} has {len(payload)} bytes and SHA-256 {digest[:12]}..., "
            f"written were {manifest['bytes']} and {manifest['sha256'][:12]}...",
        )
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state, manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"cannot read {_MANIFEST}: {error}") from error
    return manifest


def _damaged(folder: Path, why: str) -> DamagedCheckpoint:
    others = [str(other) for other in reversed(checkpoints(folder.parent)) if other != folder]
    return DamagedCheckpoint(
        f"checkpoint {folder} is damaged",
        why=why,
        try_=f"--resume {others[0]}" if others else "start again without --resume",
    )


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

"""From text on this machine to memory-mapped tokens, split by file into training and held-out text.

In: files, folders and globs (or nothing: the Python standard library's sources). Out: a `Corpus`
in a folder named by the hash of everything that went into it, so the work is done once. A
document ends with the end-of-document token; for bytes that is byte 0, which text does not
contain.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmoe_compiler.errors import InvalidData

_LAYOUT = "1"
_SMALLEST_TAIL = 0.1
# Evaluations read pieces of this many tokens, spread over the held-out text.
_PIECE = 4096
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_NO_SOURCES = frozenset({"site-packages", "dist-packages", "__pycache__"})


# -- tokens --------------------------------------------------------------------------------------


class ByteTokenizer:
    """One token a byte; byte 0 ends a document."""

    vocab_size, end, key, dtype = 256, 0, "bytes", np.dtype(np.uint8)

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace").replace("\0", "\n")


class JsonTokenizer:
    """A `tokenizer.json` read by the tokenizers library."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        try:
            text = Path(path).read_text(encoding="utf-8")
            self._tokenizer: Any = Tokenizer.from_str(text)
        except OSError as error:
            raise InvalidData(f"cannot read tokenizer {path}: {error.strerror}") from error
        except Exception as error:
            raise InvalidData(
                f"{path} is not a tokenizer.json: {error}",
                why="it is read by tokenizers.Tokenizer.from_file",
                try_="leave --tokenizer out to train on bytes",
            ) from error
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        known = (self._tokenizer.token_to_id(token) for token in _END_TOKENS)
        self.end: int | None = next((number for number in known if number is not None), None)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: bytes) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text.decode("utf-8", errors="replace")).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(token) for token in tokens])
        return text


def load_tokenizer(path: str) -> ByteTokenizer | JsonTokenizer:
    return JsonTokenizer(path) if path else ByteTokenizer()


# -- files ---------------------------------------------------------------------------------------


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Every file that the patterns name, each once, in the order of its path."""
    if not patterns:
        root = Path(sysconfig.get_path("stdlib"))
        return sorted(p for p in root.rglob("*.py") if not _NO_SOURCES & set(p.parts))
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)]
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not matches:
            what = "no file in this folder" if path.is_dir() else "no such file"
            raise InvalidData(
                f"--data {pattern}: {what}",
                why="a folder is read with everything below it; a glob may use **",
                try_='--data notes.txt "books/**/*.txt"',
            )
        found.update(matches)
    return sorted(found)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_documents(files: Iterable[Path], named: bool) -> tuple[list[tuple[str, bytes]], int]:
    """(hash, text) of every different text, and how many files were left out because they are not
    text.

    `named`: the user chose these files, so one that cannot be read is an error.
    """
    documents: dict[str, bytes] = {}
    skipped = 0
    for path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            if named:
                raise InvalidData(
                    f"cannot read {path}: {error.strerror}", where="--data"
                ) from error
            skipped += 1
            continue
        if not _is_text(text):
            skipped += 1
        elif text:
            documents.setdefault(hashlib.sha256(text).hexdigest(), text)
    return sorted(documents.items()), skipped


def _is_text(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in text


def split_documents(
    documents: Sequence[tuple[str, bytes]], share: float
) -> tuple[list[bytes], list[bytes]]:
    """Held out are the files whose hash falls below `share`: adding a file moves no other.

    With too few files for that, the last tenth of each is held out instead.
    """
    limit = share * 2**32
    train = [text for key, text in documents if int(key[:8], 16) >= limit]
    held_out = [text for key, text in documents if int(key[:8], 16) < limit]
    if train and held_out:
        return train, held_out
    tail = max(share, _SMALLEST_TAIL)
    cuts = [(text, len(text) - round(len(text) * tail)) for _, text in documents]
    return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]


# -- the corpus ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Memory-mapped text and tokens of both splits; `key` changes when anything in them does."""

    folder: Path
    key: str
    tokenizer: ByteTokenizer | JsonTokenizer
    facts: dict[str, int]

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def text(self, split: str) -> NDArray[np.uint8]:
        return self._map(f"{split}.text", np.dtype(np.uint8))

    def tokens(self, split: str) -> NDArray[Any]:
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.text(split)
        return self._map(f"{split}.tokens", self.tokenizer.dtype)

    def bytes_per_token(self, split: str) -> float:
        return len(self.text(split)) / len(self.tokens(split))

    def batch(self, rows: int, length: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Random windows of training text, inputs and next tokens, each [rows, length].

        A pure function of `seed`: (run's seed, step, micro-batch), so a resumed run sees the same.
        """
        tokens = self.tokens("train")
        starts = np.random.default_rng(list(seed)).integers(0, len(tokens) - length, size=rows)
        return _shifted(np.stack([tokens[s : s + length + 1] for s in starts]))

    def held_out_tokens(self, limit: int) -> NDArray[Any]:
        """At most `limit` held-out tokens: pieces from all over the text, joined in order."""
        return _spread(self.tokens("held_out"), limit)

    def held_out_text(self, limit: int) -> NDArray[np.uint8]:
        """The held-out bytes that baselines read: as much text as `held_out_tokens(limit)`."""
        return _spread(self.text("held_out"), round(limit * self.bytes_per_token("held_out")))


def _spread(values: NDArray[Any], limit: int) -> NDArray[Any]:
    if len(values) <= limit:
        return values
    pieces = -(-limit // _PIECE)
    starts = np.linspace(0, len(values) - limit // pieces, pieces).astype(np.int64)
    return np.concatenate([values[start : start + limit // pieces] for start in starts])


def windows(tokens: NDArray[Any], length: int, stride: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Inputs and next tokens of every window, in order, each `stride` tokens after the last."""
    for start in range(0, len(tokens) - length, stride):
        yield _shifted(tokens[start : start + length + 1])


def _shifted(tokens: NDArray[Any]) -> tuple[Tensor, Tensor]:
    wide = torch.from_numpy(tokens.astype(np.int64))
    return wide[..., :-1], wide[..., 1:]


def prepare(
    patterns: Sequence[str], tokenizer_path: str, held_out: float, cache: Path, at_least: int
) -> Corpus:
    """Read, split and tokenise once; every split must have more than `at_least` tokens."""
    documents, skipped = read_documents(find_files(patterns), named=bool(patterns))
    if not documents:
        raise InvalidData(
            f"no text in {', '.join(patterns) or 'the Python standard library'}",
            where="--data",
            why=f"files that are not UTF-8 text: {skipped}; the others are empty",
            try_='--data "folder/**/*.txt"',
        )
    tokenizer = load_tokenizer(tokenizer_path)
    hashes = "".join(key for key, _ in documents)
    key = hashlib.sha256(f"{_LAYOUT} {tokenizer.key} {held_out} {hashes}".encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "facts.json").exists():
        splits = dict(zip(("train", "held_out"), split_documents(documents, held_out), strict=True))
        _write(folder, splits, tokenizer, {"files": len(documents), "skipped": skipped})
    corpus = Corpus(folder, key, tokenizer, json.loads((folder / "facts.json").read_text()))
    for split in ("train", "held_out"):
        if corpus.facts[f"{split}_tokens"] <= at_least:
            raise InvalidData(
                f"the {split} text has only {corpus.facts[f'{split}_tokens']} tokens",
                where="--data",
                why=f"training and evaluation read windows of {at_least + 1} tokens",
                try_="--sequence-length 64, or more text",
            )
    return corpus


def _write(
    folder: Path,
    splits: dict[str, list[bytes]],
    tokenizer: ByteTokenizer | JsonTokenizer,
    facts: dict[str, int],
) -> None:
    """All files of a corpus, in a temporary folder that gets its name when they are complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        for split, texts in splits.items():
            text = b"".join(part + b"\0" for part in texts)
            (unfinished / f"{split}.text").write_bytes(text)
            facts[f"{split}_bytes"] = facts[f"{split}_tokens"] = len(text)
            if isinstance(tokenizer, JsonTokenizer):
                path = unfinished / f"{split}.tokens"
                facts[f"{split}_tokens"] = _tokenise(path, texts, tokenizer)
        (unfinished / "facts.json").write_text(json.dumps(facts))
        os.rename(unfinished, folder)
    except OSError:
        # Another process finished the same corpus first: its files are the same.
        if not (folder / "facts.json").exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenise(path: Path, texts: Iterable[bytes], tokenizer: JsonTokenizer) -> int:
    end = [] if tokenizer.end is None else [tokenizer.end]
    total = 0
    with path.open("wb") as file:
        for text in texts:
            tokens = np.array(tokenizer.encode(text) + end, dtype=tokenizer.dtype)
            file.write(tokens.tobytes())
            total += len(tokens)
    return total

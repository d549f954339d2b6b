"""Text to tokens: files, split, tokenizers, windows; n-gram baselines against hand counts."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest

from lmoe_compiler.errors import InvalidData
from lmoe_compiler.train import data
from lmoe_compiler.train.baselines import NGram, baselines, zlib_bits_per_byte
from lmoe_compiler.train.data import (
    ByteTokenizer,
    find_files,
    load_tokenizer,
    prepare,
    read_documents,
    split_documents,
    windows,
)


def write_texts(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        text = "".join(f"line {n} of file {number}\n" for n in range(20 + number))
        (folder / f"{number}.txt").write_text(text)
    return folder


def corpus_of(folder: Path, tokenizer: str = "", share: float = 0.2):
    return prepare([str(folder)], tokenizer, share, folder.parent / "cache", 16)


# -- files and split -----------------------------------------------------------------------------


def test_files_folders_and_globs_are_found_once(tmp_path):
    write_texts(tmp_path / "a", 3)
    (tmp_path / "a" / ".hidden").write_text("no")
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "b" / "deep.txt").write_text("yes")
    named = [str(tmp_path / "a"), str(tmp_path / "a" / "*.txt"), str(tmp_path / "a" / "0.txt")]
    assert [p.name for p in find_files(named)] == ["0.txt", "1.txt", "2.txt", "deep.txt"]
    assert [p.name for p in find_files([str(tmp_path / "**" / "deep*")])] == ["deep.txt"]


def test_default_is_the_standard_library():
    files = find_files([])
    assert any(p.name == "argparse.py" for p in files)
    assert not any("site-packages" in p.parts for p in files)
    assert files == sorted(files)


def test_copies_count_once_and_binaries_are_left_out(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "b").write_bytes(b"text")
    (tmp_path / "c").write_bytes(b"\xff\xfe binary")
    (tmp_path / "d").write_bytes(b"nul \0")
    (tmp_path / "e").write_bytes(b"")
    documents, skipped = read_documents(find_files([str(tmp_path)]), named=True)
    assert [text for _, text in documents] == [b"text"]
    assert skipped == 2


def test_split_depends_on_each_file_alone():
    documents = [(f"{number * 0x05000000:08x}" + "0" * 56, b"%d" % number) for number in range(51)]
    train, held_out = split_documents(documents, 0.25)
    # hashes below a quarter of 2**32 = 0x40000000
    assert held_out == [b"%d" % n for n in range(13)]
    again, held_again = split_documents(documents[5:40], 0.25)
    assert set(held_again) < set(held_out)
    assert set(again) < set(train)


def test_one_file_is_split_at_its_end():
    train, held_out = split_documents([("f" * 64, bytes(range(100)))], 0.05)
    assert train == [bytes(range(90))]
    assert held_out == [bytes(range(90, 100))]


# -- corpus --------------------------------------------------------------------------------------


def test_prepared_once_and_again_when_the_text_changes(tmp_path):
    folder = write_texts(tmp_path / "texts", 12)
    corpus = corpus_of(folder)
    stamp = (corpus.folder / "train.text").stat().st_mtime_ns
    again = corpus_of(folder)
    assert (again.key, (again.folder / "train.text").stat().st_mtime_ns) == (corpus.key, stamp)
    (folder / "3.txt").write_text("something else " * 30)
    assert corpus_of(folder).key != corpus.key
    assert not list((tmp_path / "cache").glob("unfinished-*"))


def test_every_byte_is_in_one_split(tmp_path):
    folder = write_texts(tmp_path / "texts", 12)
    corpus = corpus_of(folder)
    parts = [bytes(corpus.text(split)).split(b"\0")[:-1] for split in ("train", "held_out")]
    assert sorted(parts[0] + parts[1]) == sorted(p.read_bytes() for p in folder.iterdir())
    assert all(parts)


def test_batches_are_windows_and_a_function_of_the_seed(tmp_path):
    corpus = corpus_of(write_texts(tmp_path / "texts", 12))
    inputs, labels = corpus.batch(4, 16, (0, 7, 0))
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    text = bytes(corpus.text("train"))
    for row, following in zip(inputs, labels, strict=True):
        assert bytes(row.tolist()) + bytes(following.tolist()[-1:]) in text
    same, _ = corpus.batch(4, 16, (0, 7, 0))
    other, _ = corpus.batch(4, 16, (0, 8, 0))
    assert (inputs == same).all()
    assert not (inputs == other).all()


def test_windows_predict_every_held_out_token_once(tmp_path):
    corpus = corpus_of(write_texts(tmp_path / "texts", 12))
    tokens = corpus.tokens("held_out")
    found = list(windows(corpus.held_out_tokens(len(tokens)), 16, 8))
    new = [found[0][1][:8], *(labels[8:] for _, labels in found)]
    predicted = np.concatenate([labels.numpy() for labels in new])
    assert (predicted == tokens[1 : len(predicted) + 1]).all()
    assert len(tokens) - len(predicted) <= 16


def test_evaluations_read_all_over_the_held_out_text(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "_PIECE", 10)
    corpus = corpus_of(write_texts(tmp_path / "texts", 12))
    text = bytes(corpus.text("held_out"))
    part = bytes(corpus.held_out_text(40))
    pieces = [part[start : start + 10] for start in range(0, 40, 10)]
    places = [text.index(piece) for piece in pieces]
    assert len(part) == 40
    assert part[:10] == text[:10]
    assert part[-10:] == text[-10:]
    assert places[1] > len(text) / 5


def test_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_texts(tmp_path / "texts", 12)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train([str(p) for p in folder.iterdir()], trainer)
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    corpus = corpus_of(folder, str(path))
    assert corpus.tokenizer.vocab_size == trained.get_vocab_size()
    text = corpus.tokenizer.decode(corpus.tokens("train").tolist())
    assert text == bytes(corpus.text("train")).decode().replace("\0", "")
    assert (corpus.tokens("train") == corpus.tokenizer.end).sum() == bytes(
        corpus.text("train")
    ).count(b"\0")
    assert corpus.bytes_per_token("train") > 2


# -- bad data ------------------------------------------------------------------------------------


def test_bad_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    (tmp_path / "tokenizer.json").write_text("{}")
    cache = tmp_path / "cache"
    for name, message in (
        ("missing.txt", "no such file"),
        ("empty", "no text in"),
        ("binary", "files that are not UTF-8 text: 1"),
        ("short.txt", "has only"),
    ):
        with pytest.raises(InvalidData, match=message):
            prepare([str(tmp_path / name)], "", 0.1, cache, 64)
    with pytest.raises(InvalidData, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidData, match="cannot read tokenizer"):
        load_tokenizer(str(tmp_path / "other.json"))


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InvalidData, match=r"cannot read .*secret\.txt: Permission denied"):
        prepare([str(path)], "", 0.1, tmp_path / "cache", 4)


# -- baselines -----------------------------------------------------------------------------------


def array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def test_ngrams_by_hand():
    """Text abab ac: counts and Witten-Bell interpolation, computed on paper."""
    train = array(b"ababac")
    unigram = NGram.fit(train, 1)
    # c = 6, d = 3, a occurs 3 times: (3 + 3/256) / 9
    a = (3 + 3 / 256) / 9
    b = (2 + 3 / 256) / 9
    z = (0 + 3 / 256) / 9
    np.testing.assert_allclose(unigram.probabilities(array(b"abz")), [a, b, z])
    bigram = NGram.fit(train, 2)
    # after a: b twice, c once, so c = 3, d = 2; after b: a twice, c = 2, d = 1; after z: nothing
    np.testing.assert_allclose(
        bigram.probabilities(array(b"abaz")), [(2 + 2 * b) / 5, (2 + 1 * a) / 3, (0 + 2 * z) / 5]
    )
    np.testing.assert_allclose(bigram.probabilities(array(b"za")), [a])
    trigram = NGram.fit(train, 3)
    # after ba: b once, c once
    np.testing.assert_allclose(
        trigram.probabilities(array(b"bab")), [(1 + 2 * (2 + 2 * b) / 5) / 4]
    )
    assert math.isclose(
        trigram.bits_per_byte(array(b"bab")), -math.log2((1 + 2 * (2 + 2 * b) / 5) / 4)
    )


def test_each_history_gives_a_distribution():
    text = array(b"the cat sat on the mat; that is that" * 3)
    trigram = NGram.fit(text, 3)
    for history in (b"th", b"t ", b"zz"):
        queries = b"".join(history + bytes([byte]) for byte in range(256))
        # three bytes a query, and the first probability is that of the third byte
        assert math.isclose(trigram.probabilities(array(queries))[::3].sum(), 1.0)


def test_longer_histories_and_zlib_on_repetitive_text():
    text = b"def f(x):\n    return x + 1\n\n" * 50
    bits = baselines(array(text), array(text))
    assert bits["unigram"] > bits["bigram"] > bits["trigram"]
    assert (
        bits["zlib"]
        == zlib_bits_per_byte(array(text))
        == 8 * len(zlib.compress(text, 9)) / len(text)
    )
    assert json.dumps(bits)


def test_bytes_round_trip():
    text = "naïve λ\n"
    assert ByteTokenizer().decode(ByteTokenizer().encode(text.encode())) == text

"""Token files and packed rows: nothing is lost, and a run goes on at any row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxdocs.corpus import file_digest
from ctxdocs.datasets import Document, Question, write_records
from ctxdocs.datasets.packing import PackedRows, Position, pack_rows
from ctxdocs.datasets.tokenising import BatchEncoder, load_token_file, load_tokenizer, tokenise_files
from ctxdocs.datasets.tokens import TokenSequences, TokenWriter, token_dtype
from ctxdocs.errors import CtxdocsError, DocumentError, InputError, StorageError

END = 7
DOCUMENTS = st.lists(st.lists(st.integers(10, 65_535), max_size=9), max_size=9)


def joined(documents):
    return [token for document in documents for token in [*document, END]]


def text_of(rows):
    return [token for row in rows for token in row.tokens[row.documents >= 0].tolist()]


@given(DOCUMENTS)
@settings(deadline=None)
def test_sequences_come_back_from_memory_and_from_files(tmp_path_factory, sequences):
    packed = TokenSequences.pack(sequences)
    stem = tmp_path_factory.mktemp("tokens") / "x"
    packed.save(stem)
    for found in (packed, TokenSequences.load(stem)):
        assert [found[index].tolist() for index in range(len(found))] == sequences
        assert found.lengths.tolist() == list(map(len, sequences))
        assert found.tokens.dtype == np.uint16


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert token_dtype(65_536) == np.uint16
    with TokenWriter(tmp_path / "x", token_dtype(65_537)) as writer:
        writer.add([70_000, 1])
    assert (writer.sequences, writer.tokens) == (1, 2)
    assert TokenSequences.load(tmp_path / "x").tokens.tolist() == [70_000, 1]
    with pytest.raises(OverflowError):
        TokenSequences.pack([[70_000]])


def test_writing_that_stops_half_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "x") as writer:
        writer.add([1, 2])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="not open"):
        writer.add([1])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError), TokenWriter(tmp_path / "file" / "x"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "x.tokens.npy.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="x: tokens cannot be written"):
        TokenSequences.pack([[1] * 9000]).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_damaged_token_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"x\.tokens\.npy"):
        TokenSequences.load(tmp_path / "x")
    TokenSequences.pack([[1, 2], [3]]).save(tmp_path / "x")
    TokenSequences.pack([[1]]).save(tmp_path / "y")
    (tmp_path / "y.offsets.npy").replace(tmp_path / "x.offsets.npy")
    with pytest.raises(DocumentError, match="belong together"):
        TokenSequences.load(tmp_path / "x")
    tokens = tmp_path / "x.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DocumentError, match="damaged"):
        TokenSequences.load(tmp_path / "x")


@given(DOCUMENTS, st.integers(1, 12), st.data())
@settings(deadline=None)
def test_packing_loses_nothing_and_goes_on_anywhere(documents, length, data):
    whole = list(pack_rows(documents, length, end=END, padding=0))
    rows = [row for row, _ in whole]
    assert text_of(rows) == joined(documents)
    assert all(len(row.tokens) == length for row in rows)
    assert all((row.documents >= 0).all() for row in rows[:-1])
    assert all((row.tokens[row.documents < 0] == 0).all() for row in rows)
    cut = data.draw(st.integers(0, len(whole)))
    place = whole[cut - 1][1] if cut else Position()
    rest = list(pack_rows(documents[place.document :], length, end=END, padding=0, start=place))
    assert [(row.tokens.tolist(), row.documents.tolist(), place) for row, place in rest] == [
        (row.tokens.tolist(), row.documents.tolist(), place) for row, place in whole[cut:]
    ]


@given(DOCUMENTS, st.integers(1, 12), st.one_of(st.none(), st.integers(0, 3)))
@settings(deadline=None)
def test_rows_of_a_token_file_are_those_of_a_stream(documents, length, seed):
    rows = PackedRows(TokenSequences.pack(documents), length, end=END, padding=0, seed=seed)
    order = [int(number) for number in rows._order]
    assert sorted(order) == list(range(len(documents)))
    streamed = [row for row, _ in pack_rows([documents[number] for number in order], length, end=END, padding=0)]
    assert len(rows) == len(streamed)
    for row, expected in zip(rows, streamed, strict=True):
        assert row.tokens.tolist() == expected.tokens.tolist()
        assert row.starts.tolist() == expected.starts.tolist()
        assert [order[number] for number in expected.documents if number >= 0] == row.documents[
            row.documents >= 0
        ].tolist()
    assert sorted(rows.order(0, epoch=1)) == list(range(len(rows)))


def test_a_row_knows_where_its_documents_begin():
    (first, _), (second, place) = pack_rows([[10, 11], [], [12, 13, 14, 15]], 6, end=END)
    assert first.tokens.tolist() == [10, 11, END, END, 12, 13]
    assert first.starts.tolist() == [0, 3, 4]
    assert first.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert second.tokens.tolist() == [14, 15, END, END, END, END]
    assert second.documents.tolist() == [2, 2, 2, -1, -1, -1]
    assert second.positions.tolist() == [0, 1, 2, 0, 0, 0]
    assert place == (3, 0)


def test_wrong_places_and_lengths_are_refused():
    rows = PackedRows(TokenSequences.pack([[10]]), 4, end=END)
    with pytest.raises(IndexError):
        rows[1]
    for call in (
        lambda: list(pack_rows([[10]], 0, end=END)),
        lambda: list(pack_rows([[10]], 4, end=END, start=Position(0, 5))),
        lambda: PackedRows(TokenSequences.pack([]), -1, end=END),
    ):
        with pytest.raises(InputError):
            call()


LONG = "\n".join(f"{number}. The tide rose by {number} m, and (so they say) fell again!\n" for number in range(999))


def test_texts_are_tokenised_as_they_would_be_alone(tokenizer):
    encoder = BatchEncoder(tokenizer)
    texts = ["One two.", "", LONG, "x" * 30_000, "Ends <|end|> here"]
    alone = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
    found = list(encoder.encode(texts))
    assert [ids.tolist() for ids in found] == alone
    assert tokenizer.eos_token_id not in found[-1]
    assert tokenizer("<|end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_a_tokenizer_that_marks_beginnings_is_given_whole_texts():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"▁{word}": number for number, word in enumerate(LONG.split())}
    marking = Tokenizer(models.WordLevel(vocabulary, unk_token="▁The"))
    marking.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    whole = Tokenizer(models.WordLevel({"a": 0, "▁a": 1}, unk_token="a"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    for each in (marking, whole):
        assert next(BatchEncoder(each).encode([LONG])).tolist() == each.encode(LONG).ids


@pytest.fixture
def tokenizer_file(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_files_are_tokenised_once(tmp_path, tokenizer, tokenizer_file):
    path = tmp_path / "x.jsonl"
    write_records(path, [Document("One two."), Document(LONG)])
    info = tokenise_files(path, tokenizer, tmp_path / "out" / "x")
    assert (info.sequences, info.skipped, info.sources) == (2, 0, [["x.jsonl", file_digest(path)]])
    found = load_token_file(tmp_path / "out" / "x", load_tokenizer(tokenizer_file))
    assert found[0].tolist() == tokenizer("One two.")["input_ids"]
    assert len(found.tokens) == info.tokens
    written = (tmp_path / "out" / "x.tokens.npy").stat().st_mtime_ns
    assert tokenise_files(path, load_tokenizer(tmp_path), tmp_path / "out" / "x") == info
    assert (tmp_path / "out" / "x.tokens.npy").stat().st_mtime_ns == written
    with path.open("a") as lines:
        lines.write(json.dumps({"text": "Three."}) + "\n{\n")
    with pytest.raises(DocumentError, match=r"x\.jsonl:4"):
        tokenise_files(path, tokenizer, tmp_path / "out" / "x")
    assert not (tmp_path / "out" / "x.json").exists()
    info = tokenise_files(path, tokenizer, tmp_path / "out" / "x", on_error="skip")
    assert (info.sequences, info.skipped) == (3, 1)


def test_what_cannot_be_tokenised_or_belongs_to_another_tokenizer_is_refused(tmp_path, tokenizer, tokenizer_file):
    from tokenizers import Tokenizer, models

    write_records(tmp_path / "q.jsonl", [Question("Who?", ("a",), ("a",), (0,))])
    write_records(tmp_path / "d.jsonl", [Document("a")])
    tokenise_files(tmp_path / "d.jsonl", tokenizer, tmp_path / "d")
    other = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "broken.json").write_text("{}")
    for call, message in [
        (lambda: tokenise_files(tmp_path / "q.jsonl", tokenizer, tmp_path / "q"), r"q\.jsonl:1: a question"),
        (lambda: load_token_file(tmp_path / "d", other), "another tokenizer"),
        (lambda: load_token_file(tmp_path / "none"), "no such file"),
        (lambda: load_tokenizer(tmp_path / "none"), "no such file"),
        (lambda: load_tokenizer(tmp_path / "broken.json"), "no tokenizer"),
        (lambda: BatchEncoder(object()), "no fast tokenizer"),
    ]:
        with pytest.raises(CtxdocsError, match=message):
            call()
    assert load_tokenizer(tokenizer_file)

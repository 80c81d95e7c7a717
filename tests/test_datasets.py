"""Records in files: what is read, what is refused and where, the order of streams, and what is held out."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxdocs.datasets import (
    SPLITS,
    Document,
    Question,
    Skipped,
    read_records,
    record_id,
    split_of,
    split_title,
    stream_records,
    write_records,
)
from ctxdocs.datasets.records import parse_record, to_json
from ctxdocs.errors import CtxdocsError, DocumentError, StorageError

ASKED = {"question": "Where?", "answers": ["here"], "context": "It is here."}


def lines(path, *values):
    path.write_text(
        "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values), "utf-8"
    )
    return path


def numbered(path, count, name=""):
    return lines(path, *({"text": f"{name}{number}"} for number in range(count)))


def texts(records):
    return [record.text for record in records]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_what_is_written_is_read(tmp_path, suffix):
    records = [
        Document("One\u2028line.", "Title", "source"),
        Question("Which?", ("a", "b"), ("a is b", "c"), (0,), "Title", "7", "set", options=("a", "c"), split="dev"),
        Question("Why?", (), (), ()),
    ]
    path = tmp_path / f"all{suffix}"
    assert write_records(path, records) == 3
    first = path.read_bytes()
    places = [f"{path}:{number}" for number in (1, 2, 3)]
    found = list(read_records(path))
    assert [record.place for record in found] == places
    assert [to_json(record) for record in found] == [to_json(record) for record in records]
    write_records(path, records)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    lines(tmp_path / "b" / "one.jsonl", {"text": "b"})
    lines(tmp_path / "a.jsonl", {"text": "a"})
    lines(tmp_path / ".hidden" / "c.jsonl", {"text": "c"})
    lines(tmp_path / "notes.txt", "no record")
    assert texts(read_records(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("packed", ["zst", "gz"])
def test_files_of_several_frames_and_long_lines(tmp_path, frames, packed):
    path = tmp_path / f"x.jsonl.{packed}"
    compress = zstandard.ZstdCompressor().compress if packed == "zst" else gzip.compress
    record = json.dumps({"text": "word " * 200_000}).encode() + b"\n"
    path.write_bytes(b"".join(compress(record) for _ in range(frames)))
    assert [len(record.text) for record in read_records(path)] == [1_000_000] * frames


@pytest.mark.parametrize("packed", ["zst", "gz"])
@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_file_that_is_cut_off_is_refused_even_when_lines_may_be_skipped(tmp_path, packed, keep):
    path = tmp_path / f"x.jsonl.{packed}"
    compress = zstandard.ZstdCompressor().compress if packed == "zst" else gzip.compress
    whole = compress(b"".join(json.dumps({"text": str(n**7)}).encode() + b"\n" for n in range(5000)))
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DocumentError, match=r"x\.jsonl.*cut off or damaged"):
        list(read_records(path, on_error="skip"))
    path.write_bytes(b"never compressed at all")
    with pytest.raises(DocumentError, match="damaged"):
        list(read_records(path))


BROKEN = {
    '{"text": "a"': "broken JSON at character 13",
    "[1]": "expected a JSON object, found a list",
    '{"title": "a"}': "neither 'text' nor 'question'",
    '{"text": 3}': "'text' is a number",
    '{"text": " \\n"}': "'text' is blank",
    '{"text": "a", "title": ["b"]}': "'title' is a list",
    '{"text": "\\ud800"}': "surrogate",
    '{"text": ' + "[" * 100_000: "cannot be read",
    '{"text": ' + "9" * 5000 + "}": "cannot be read",
    "": "the line is empty",
    "  ": "the line is empty",
    '{"question": "", "answers": "a", "context": "b"}': "'question' is blank",
    '{"question": "q", "context": "b"}': "no 'answers'",
    '{"question": "q", "answers": [], "context": "b"}': "'answers' is empty",
    '{"question": "q", "answers": [1], "context": "b"}': "'answers' is no list of strings",
    '{"question": "q", "answers": [""], "context": "b"}': "'answers' holds a blank",
    '{"question": "q", "answers": "a"}': "neither 'context' nor 'contexts'",
    '{"question": "q", "answers": "a", "context": 1}': "'context' is a number",
    '{"question": "q", "answers": "a", "contexts": ["b", " "]}': r"'contexts\[1\]' is blank",
    '{"question": "q", "answers": "a", "contexts": ["b", null]}': r"'contexts\[1\]' is null",
    '{"question": "q", "answers": "a", "contexts": [{"title": "b"}]}': r"'contexts\[0\]' has no string 'text'",
    '{"question": "q", "answers": "a", "context": "b", "relevant": [1]}': "'relevant' holds 1, and there are 1",
    '{"question": "q", "answers": "a", "context": "b", "relevant": [true]}': "'relevant' is no list of numbers",
    '{"question": "q", "answers": "a", "context": "b", "impossible": "no"}': "'impossible' is a string",
    '{"question": "q", "answers": "a", "context": "b", "impossible": true, "relevant": [0]}': "yet contexts",
    '{"question": "q", "answers": "a", "context": "b", "options": "c"}': "'options' is no list of strings",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_line_that_is_no_record_is_named_or_skipped(tmp_path, line):
    path = lines(tmp_path / "x.jsonl", {"text": "first"}, line, {"text": "last"})
    with pytest.raises(DocumentError, match=rf"x\.jsonl:2: .*{BROKEN[line]}") as caught:
        list(read_records(path))
    assert caught.value.hint
    skipped = Skipped()
    assert texts(read_records(path, on_error="skip", skipped=skipped)) == ["first", "last"]
    assert skipped.count == 1
    assert skipped.examples[0].startswith(f"{path}:2: ")
    skipped = Skipped()
    assert sorted(texts(stream_records(path, seed=0, on_error="skip", skipped=skipped))) == ["first", "last"]
    assert skipped.count == 1
    with pytest.raises(DocumentError, match=r"x\.jsonl:2: "):
        list(stream_records(path, seed=0))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xe9"}\n\n\n')
    with pytest.raises(DocumentError, match=r"x\.jsonl:2: not UTF-8 \(byte 11 of the line\)"):
        list(read_records(path))
    assert texts(read_records(path, on_error="skip")) == ["a"]


def test_files_without_records_and_wrong_arguments_are_refused(tmp_path):
    empty = lines(tmp_path / "empty.jsonl")
    full = numbered(tmp_path / "full.jsonl", 3)
    (tmp_path / "folder").mkdir()
    for call, message in [
        (lambda: list(read_records(empty)), "no record"),
        (lambda: list(stream_records(empty, seed=0)), "no record"),
        (lambda: list(read_records(tmp_path / "none.jsonl")), "no such file"),
        (lambda: list(read_records(tmp_path / "folder")), "no JSON lines"),
        (lambda: list(read_records([])), "no files"),
        (lambda: list(read_records(full, on_error="ignore")), "on_error"),
        (lambda: stream_records(full, seed=0, on_error="ignore"), "on_error"),
        (lambda: stream_records(full, seed=0, buffer=0), "buffer"),
        (lambda: stream_records(full, seed=0, start=-1), "start"),
        (lambda: stream_records([full, full], seed=0, weights=[1]), "weights"),
        (lambda: stream_records(full, seed=0, weights=[0]), "weights"),
        (lambda: split_of("a", validation=0.5, test=0.5), "held out"),
    ]:
        with pytest.raises(CtxdocsError, match=message):
            call()
    with pytest.raises(StorageError, match="cannot be made"):
        write_records(full / "x.jsonl", [])


def test_writing_that_stops_half_way_leaves_what_was_there(tmp_path):
    path = numbered(tmp_path / "x.jsonl", 2)

    def stopped():
        yield Document("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, stopped())
    assert texts(read_records(tmp_path)) == ["0", "1"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_records(path, [Document("old")])
    (tmp_path / f"x{suffix}.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=rf"x{suffix}: cannot be written \(No space"):
        write_records(path, [Document("new")])
    assert texts(read_records(path)) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("values", "relevant"),
    [
        ({"context": "one"}, (0,)),
        ({"contexts": ["there", "it is Here.", "here"]}, (1, 2)),
        ({"contexts": ["yes", "no"]}, (0, 1)),
        ({"contexts": ["here", "there"], "relevant": [1]}, (1,)),
        ({"contexts": ["here"], "impossible": True}, ()),
        ({"contexts": ["here"], "relevant": []}, ()),
        ({"context": ""}, ()),
    ],
)
def test_which_contexts_hold_the_answer(values, relevant):
    values = {"contexts": [], **values} if "context" not in values else values
    assert parse_record({"question": "q", "answers": "here", **values}).relevant == relevant


def test_contexts_with_titles_begin_with_them():
    record = parse_record({**ASKED, "contexts": [{"title": "T", "text": "here"}, {"text": "b"}]})
    assert record.contexts == ("T\nhere", "b")


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    buffer=st.integers(1, 20),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_a_stream_is_whole_and_goes_on_where_it_stopped(tmp_path_factory, counts, buffer, seed, data):
    folder = tmp_path_factory.mktemp("stream")
    paths = [numbered(folder / f"{index}.jsonl", count, f"{index}-") for index, count in enumerate(counts)]
    whole = texts(stream_records(paths, seed=seed, buffer=buffer))
    assert Counter(whole) == Counter(texts(read_records(paths)))
    start = data.draw(st.integers(0, len(whole) + 1))
    assert texts(stream_records(paths, seed=seed, buffer=buffer, start=start)) == whole[start:]
    weighted = texts(stream_records(paths, seed=seed, buffer=buffer, weights=range(1, len(paths) + 1)))
    assert set(weighted) == set(whole)
    resumed = stream_records(paths, seed=seed, buffer=buffer, start=start, weights=range(1, len(paths) + 1))
    assert texts(resumed) == weighted[start:]


def test_seed_and_epoch_decide_the_order_and_skipped_lines_do_not_count(tmp_path):
    path = numbered(tmp_path / "x.jsonl", 200)
    orders = [texts(stream_records(path, seed=seed, epoch=epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    broken = lines(tmp_path / "y.jsonl", *(f'{{"text": "{n}"}}' if n % 3 else "{" for n in range(90)))
    whole = texts(stream_records(broken, seed=0, on_error="skip", buffer=7))
    assert texts(stream_records(broken, seed=0, on_error="skip", buffer=7, start=20)) == whole[20:]


def test_the_order_of_a_stream_stays_the_same_from_version_to_version(tmp_path):
    path = numbered(tmp_path / "x.jsonl", 10)
    assert "".join(texts(stream_records(path, seed=5, epoch=2, buffer=4))) == "2035749861"


def test_weights_are_the_shares_of_what_is_drawn(tmp_path):
    few, many = numbered(tmp_path / "a.jsonl", 20, "a"), numbered(tmp_path / "b.jsonl", 3000, "b")
    drawn = texts(stream_records([few, many], seed=0, weights=[1, 3], buffer=50))
    share = sum(text.startswith("a") for text in drawn) / len(drawn)
    assert 0.22 < share < 0.28
    assert set(texts(read_records(few))) <= set(drawn)


def test_no_more_than_the_buffer_is_read_ahead(tmp_path):
    path = numbered(tmp_path / "x.jsonl", 100)
    for number, record in enumerate(stream_records(path, seed=0, buffer=8)):
        assert int(record.text) < number + 8


def test_titles_decide_the_split():
    titles = [f"title {number}" for number in range(20_000)]
    counts = Counter(split_of(title, validation=0.05, test=0.02) for title in titles)
    assert 850 < counts["validation"] < 1150
    assert 320 < counts["test"] < 480
    assert all(split_of(f"  {title.upper()} ") == split_of(title) for title in titles[:500])
    assert [split_of(title, seed=1) for title in titles] != [split_of(title) for title in titles]
    assert set(SPLITS) == set(counts)
    # Published lists of what is held out depend on it.
    held = [number for number, title in enumerate(titles[:700]) if split_of(title) != "train"]
    assert held == [208, 231, 240, 429, 447, 498, 500, 568, 598, 622, 624, 669, 670, 689]


def test_records_without_a_title_are_split_by_what_they_are_about():
    asked = [Question(f"Is it {n}?", ("a",), ("same text", "other"), (0,)) for n in range(3)]
    assert {split_title(record) for record in asked} == {"same text"}
    assert split_title(Document("text")) == "text"
    assert split_title(Document("text", "T")) == "T"
    assert split_title(Question("Who?", ("a",), (), ())) == "Who?"


def test_ids_are_the_data_sets_own_or_hashes_of_the_content():
    assert record_id(parse_record({**ASKED, "id": 7, "dataset": "set"})) == "set:7"
    first, second = (record_id(parse_record({**ASKED, "context": text})) for text in ("a", "b"))
    assert first != second
    assert len(first) == 16

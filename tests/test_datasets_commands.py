"""Published formats, splits in files, n-gram overlap, and the commands for them."""

from __future__ import annotations

import json

import pytest

from ctxdocs.datasets import Document, Question, read_records, record_id, split_of, write_records
from ctxdocs.datasets.__main__ import main
from ctxdocs.datasets.converting import convert
from ctxdocs.datasets.formats import detect
from ctxdocs.datasets.overlap import Shared, check_overlap, compared_texts
from ctxdocs.datasets.splits import split_files
from ctxdocs.errors import CtxdocsError, DocumentError, InputError

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Gannet Rock",
            "paragraphs": [
                {
                    "context": "It was built in 1874.",
                    "qas": [
                        {
                            "id": "a",
                            "question": "When?",
                            "answers": [{"text": "1874", "answer_start": 16}, {"text": "1874", "answer_start": 16}],
                        },
                        {"id": "b", "question": "By whom?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
HOTPOT = [
    {
        "_id": "h",
        "question": "Which is older?",
        "answer": "A",
        "supporting_facts": [["B", 0], ["A", 1]],
        "context": [["A", ["One.", " Two."]], ["C", ["Three."]], ["B", ["Four."]]],
    }
]
PASSAGES = {
    "question": "Who?",
    "answers": ["her"],
    "context": "A: one: two\n\nB: three\n\nno title here",
    "supporting_titles": ["B"],
    "split": "test",
    "dataset": "sets",
}


def dump(path, *values):
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return path


def test_squad(tmp_path):
    path = dump(tmp_path / "dev.json", SQUAD)
    assert detect(path) == "squad"
    counts = convert("auto", [path], tmp_path / "out.jsonl", split="dev")
    assert (counts.questions, counts.unanswerable, counts.documents) == (2, 1, 0)
    first, second = read_records(tmp_path / "out.jsonl")
    assert (first.answers, first.relevant, first.title, first.id) == (("1874",), (0,), "Gannet Rock", "a")
    assert (first.source, first.split) == ("dev", "dev")
    assert (second.answers, second.relevant) == ((), ())


def test_hotpotqa_nq_open_and_titled_passages(tmp_path):
    paths = [
        dump(tmp_path / "hotpot.json", HOTPOT),
        dump(tmp_path / "nq.jsonl", {"question": "who", "answer": ["a", "b"]}),
        dump(tmp_path / "passages.jsonl", PASSAGES),
    ]
    assert list(map(detect, paths)) == ["hotpotqa", "nq-open", "passages"]
    counts = convert("auto", paths, tmp_path / "out.jsonl.gz", source="named", split="train")
    assert (counts.questions, counts.without_contexts, counts.several_contexts) == (3, 1, 2)
    hotpot, nq, passages = read_records(tmp_path / "out.jsonl.gz")
    assert hotpot.contexts == ("A\nOne. Two.", "C\nThree.", "B\nFour.")
    assert (hotpot.relevant, hotpot.id, hotpot.source) == ((0, 2), "h", "named")
    assert (nq.answers, nq.contexts, nq.split) == (("a", "b"), (), "train")
    assert passages.contexts == ("A\none: two", "B\nthree", "no title here")
    assert (passages.relevant, passages.split, passages.source) == ((1,), "test", "sets")


def test_a_folder_of_texts(tmp_path, corpus):
    (corpus / "sub").mkdir()
    (corpus / "sub" / "blank.txt").write_text(" ")
    assert detect(corpus) == detect(corpus / "ferry.txt") == "text"
    with pytest.raises(DocumentError, match=r"blank\.txt"):
        convert("auto", [corpus], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    counts = convert("text", [corpus], tmp_path / "out.jsonl", on_error="skip")
    assert (counts.documents, counts.skipped) == (3, 1)
    titles = {record.title: record.source for record in read_records(tmp_path / "out.jsonl")}
    assert titles["ferry.txt"] == "corpus"


def broken(change):
    squad = json.loads(json.dumps(SQUAD))
    change(squad["data"][0]["paragraphs"][0]["qas"], squad["data"][0]["paragraphs"][0], squad)
    return squad


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (lambda qas, paragraph, squad: qas[0].pop("question"), r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: 'question'", 1),
        (lambda qas, paragraph, squad: qas[0].update(answers=[]), r"qas\[0\]: 'answers' is empty", 1),
        (lambda qas, paragraph, squad: qas[0].update(answers="1874"), None, 2),
        (lambda qas, paragraph, squad: qas.__setitem__(1, 3), r"qas\[1\]: expected a JSON object, found a number", 1),
        (lambda qas, paragraph, squad: paragraph.pop("context"), r"qas\[0\]: 'contexts\[0\]' is null", None),
        (lambda qas, paragraph, squad: paragraph.pop("qas"), r"data\[0\]\.paragraphs\[0\]: no list 'qas'", None),
        (lambda qas, paragraph, squad: squad.update(data={}), "no list 'data'", None),
    ],
)
def test_what_is_wrong_with_a_squad_file_is_named(tmp_path, change, message, left):
    path = dump(tmp_path / "x.json", broken(change))
    if message is not None:
        with pytest.raises(DocumentError, match=message):
            convert("squad", [path], tmp_path / "out.jsonl")
    if left is None:
        with pytest.raises(DocumentError):
            convert("squad", [path], tmp_path / "out.jsonl", on_error="skip")
    else:
        assert convert("squad", [path], tmp_path / "out.jsonl", on_error="skip").questions == left


def test_broken_lines_are_skipped_in_every_format_of_lines(tmp_path):
    path = tmp_path / "nq.jsonl"
    path.write_text('{"question": "who", "answer": ["a"]}\n\n{\n[]\n{"question": "why", "answer": ["b"]}\n')
    with pytest.raises(DocumentError, match=r"nq\.jsonl:2: the line is empty"):
        convert("nq-open", [path], tmp_path / "out.jsonl")
    counts = convert("nq-open", [path], tmp_path / "out.jsonl", on_error="skip")
    assert (counts.questions, counts.skipped) == (2, 3)


def test_files_of_no_known_format_are_refused(tmp_path):
    for path, message in [
        (dump(tmp_path / "keys.jsonl", {"body": "a"}), r"of no known format \(the keys \['body'\]\)"),
        (dump(tmp_path / "list.json", [1]), "of no known format"),
        (dump(tmp_path / "empty.jsonl"), "no record"),
        (tmp_path / "none.json", "no such file"),
    ]:
        with pytest.raises(CtxdocsError, match=message):
            convert("auto", [path], tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="no format 'triviaqa'"):
        convert("triviaqa", [], tmp_path / "out.jsonl")
    with pytest.raises(DocumentError, match="a HotpotQA file is a list"):
        convert("hotpotqa", [dump(tmp_path / "x.json", SQUAD)], tmp_path / "out.jsonl")


@pytest.fixture
def parts(tmp_path):
    write_records(tmp_path / "d.jsonl", [Document(f"text {n}", f"title {n}") for n in range(400)])
    asked = [
        Question(f"q{n}", ("a",), ("a",), (0,), title=f"title {n % 90}", split=("train", "", "dev")[n % 3])
        for n in range(300)
    ]
    write_records(tmp_path / "q.jsonl.gz", asked)
    return [tmp_path / "d.jsonl", tmp_path / "q.jsonl.gz"]


def test_files_are_divided_by_title_and_ids_are_listed(tmp_path, parts):
    report = split_files(parts, tmp_path / "out", validation=0.1, test=0.05)
    assert report.left_out == 100
    assert sum(report.records.values()) == 600
    ids = {}
    for split in ("train", "validation", "test"):
        records = list(read_records(tmp_path / "out" / split))
        assert len(records) == report.records[split] > 0
        assert {split_of(record.title, validation=0.1, test=0.05) for record in records} == {split}
        ids[split] = [record_id(record) for record in records]
    for split in ("validation", "test"):
        assert (tmp_path / "out" / f"{split}.ids.txt").read_text().split() == ids[split]
    assert json.loads((tmp_path / "out" / "split.json").read_text())["records"] == report.records
    assert split_files(parts, tmp_path / "out", published=None, test=0).left_out == 0
    assert not (tmp_path / "out" / "test" / "d.jsonl").exists()


def test_files_that_would_overwrite_each_other_or_themselves_are_refused(tmp_path, parts):
    split_files(parts, tmp_path / "out")
    train = tmp_path / "out" / "train" / "d.jsonl"
    before = train.read_bytes()
    with pytest.raises(InputError, match="holds the files"):
        split_files(train, tmp_path / "out")
    with pytest.raises(InputError, match="the name d"):
        split_files([parts[0], train], tmp_path / "other")
    with pytest.raises(InputError, match="holds the training files"):
        check_overlap(train, parts[0], n=2, output=tmp_path / "out" / "train")
    with pytest.raises(InputError, match="the same name"):
        check_overlap([parts[0], train], parts[0], n=2, output=tmp_path / "other")
    assert train.read_bytes() == before


SENTENCE = "Maud Ferris counted the ships by hand, and wrote them down in a book bound in grey cloth."
RUN = "counted the ships by hand"


def overlap_files(tmp_path, test, *train):
    write_records(tmp_path / "test.jsonl", test)
    write_records(tmp_path / "train.jsonl", train)
    return tmp_path / "train.jsonl", tmp_path / "test.jsonl"


def test_shared_runs_are_found_whatever_the_case_and_punctuation(tmp_path):
    train, test = overlap_files(
        tmp_path,
        [Document("Nothing else."), Document(SENTENCE)],
        Document("She COUNTED -- the ships, by Hand; every day."),
        Document("She counted the ships by ear."),
        Question("Who?", ("a",), ("fine", "fine " + SENTENCE), (0,)),
    )
    report = check_overlap(train, test, n=5)
    assert [(found.train, found.test, found.runs) for found in report.overlaps] == [
        (f"{train}:1", f"{test}:2", 1),
        (f"{train}:3", f"{test}:2", 14),
    ]
    assert report.overlaps[0].words == RUN
    assert (report.shared_runs, report.shared) == (14, [Shared(f"{test}:2", runs=14, shared=14)])
    assert (report.test_records, report.too_short, report.train_records, report.test_runs) == (2, 1, 3, 14)
    assert [found.runs for found in check_overlap(train, test, n=18).overlaps] == [1]
    assert [found.runs for found in check_overlap(train, test, n=4).overlaps] == [2, 1, 15]


def test_how_much_of_a_test_record_is_shared(tmp_path):
    asked = Question("Which?", ("ships",), (f"{SENTENCE} {SENTENCE}", "Nothing of it."), (0, 1))
    train, test = overlap_files(tmp_path, [asked, Document("nobody says this anywhere")], Document(f"She {RUN}."))
    report = check_overlap(train, test, n=4, compare="contexts")
    assert (report.test_runs, report.shared_runs) == (15 + 3 + 1, 2)
    assert report.shared == [Shared(f"{test}:1", runs=33, shared=4)]


def test_answers_are_tested_by_their_sentences():
    asked = Question("When?", ("1874",), ("Nothing. It was built (in 1874). It burnt down later, in the war.",), (0,))
    assert compared_texts(asked, 3) == ["It was built (in 1874"]
    assert compared_texts(asked, 8) == ["Nothing. It was built (in 1874). It burnt"]
    assert compared_texts(asked, 99)[0].startswith("Nothing. It was")
    assert compared_texts(asked, 3, "contexts") == list(asked.contexts)
    reaching = Question("Who?", ("U.S. Army", "the army"), ("It was built by the U.S. Army in a year.",), (0,))
    assert compared_texts(reaching, 3) == ["It was built by the U.S. Army in a year"]
    assert compared_texts(Question("Which?", ("!",), ("?! ...",), (0,)), 3) == []
    judged = Question("Is it?", ("yes",), ("It is. Or not.", "Else."), (0,))
    assert compared_texts(judged, 3) == ["It is. Or not."]
    assert compared_texts(Question("Why?", ("a",), (), ()), 3) == ["Why?"]


def test_what_shares_a_run_is_left_out_or_cut(tmp_path):
    mixed = Document(f"First İ paragraph.\n\nAnd she {RUN}.\n\nLast paragraph.", "T")
    only = Document(f"It says: {RUN}")
    train, test = overlap_files(
        tmp_path, [Document(SENTENCE)], Document("free"), mixed, only, Question(f"Who {RUN}?", ("a",), ("b",), (0,))
    )
    report = check_overlap(train, test, n=5, output=tmp_path / "clean.jsonl")
    assert (len(report.overlaps), report.written) == (3, 1)
    assert [record.text for record in read_records(tmp_path / "clean.jsonl")] == ["free"]
    report = check_overlap(train, test, n=5, output=tmp_path / "clean", remove="paragraphs")
    assert (report.written, report.shortened) == (2, 1)
    texts = [record.text for record in read_records(tmp_path / "clean")]
    assert texts == ["free", "First İ paragraph.\n\nLast paragraph."]
    assert check_overlap(tmp_path / "clean", test, n=5).overlaps == []


def test_overlap_refuses_what_it_cannot_compare(tmp_path):
    train, test = overlap_files(tmp_path, [Document("one two")], Document("three"))
    for wrong in ({"n": 3}, {"n": 0}, {"compare": "titles"}, {"remove": "lines"}):
        with pytest.raises(InputError):
            check_overlap(train, test, **wrong)


def run(capsys, *arguments):
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands_follow_each_other(tmp_path, capsys, tokenizer):
    raw = dump(tmp_path / "dev.json", SQUAD)
    records = tmp_path / "squad.jsonl"
    code, out, _ = run(capsys, "convert", "auto", raw, "--output", records, "--json")
    assert code == 0
    assert json.loads(out)["unanswerable"] == 1
    code, out, _ = run(capsys, "count", records)
    assert code == 0
    assert "questions         2" in out
    code, out, _ = run(capsys, "mix", records, "--output", tmp_path / "mixed.jsonl", "--contexts", 2, "--json")
    assert (code, json.loads(out)["questions"]) == (0, 2)
    code, out, _ = run(capsys, "split", records, "--output", tmp_path / "split", "--json", "--published", "any")
    assert (code, json.loads(out)["train"]) == (0, 2)
    texts = tmp_path / "texts.jsonl"
    write_records(texts, [Document("It was built in 1874, they say."), Document("free")])
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    code, out, _ = run(
        capsys, "tokenize", texts, "--tokenizer", tmp_path, "--output", tmp_path / "tokens" / "x", "--json"
    )
    assert (code, json.loads(out)["sequences"]) == (0, 2)
    overlap = ["overlap", "--train", texts, "--test", records, "--n", 5]
    code, out, _ = run(capsys, *overlap)
    assert code == 1
    assert f"{texts}:1: 1 run, the first in {records}:1: it was built in 1874" in out
    code, out, _ = run(capsys, *overlap, "--json", "--write-clean", tmp_path / "clean.jsonl")
    assert (code, len(json.loads(out)["overlaps"])) == (0, 1)
    assert run(capsys, "overlap", "--train", tmp_path / "clean.jsonl", "--test", records, "--n", 5)[0] == 0


def test_commands_say_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    code, out, err = run(capsys, "count", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path}:2: 'text' is a number")
    code, out, _ = run(capsys, "count", path, "--on-error", "skip")
    assert code == 0
    assert "skipped           1" in out
    code, _, err = run(capsys, "mix", path, "--output", tmp_path / "y.jsonl")
    assert code == 1
    assert f"{path}:1: a document" in err

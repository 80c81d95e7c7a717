"""The command line, run as a user runs it; one tiny library serves most tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import transformers
from click.testing import CliRunner

from ctxdocs.cli import main
from ctxdocs.hub import cached_folder
from ctxdocs.published import CCM_DRIVE, PUBLISHED
from tests.conftest import tiny_autocompressor, tiny_gist, tiny_model

DOCUMENTS = {
    "lighthouse.md": "# Lighthouse\n\nThe lighthouse was built in 1874 from grey granite.\n",
    "ferry.txt": "The ferry sails twice a day in winter and five times in summer.\n",
    "school/gauge.rst": "Tide gauge\n==========\n\nThe gauge is read every six hours.\n",
}


def write_documents(folder: Path) -> Path:
    for name, text in DOCUMENTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def run(*args: object, **options):
    return CliRunner().invoke(main, [str(arg) for arg in args], **options)


def run_json(*args: object, code: int = 0) -> dict:
    """Run with --json; standard output is one JSON object and nothing else."""
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    assert result.stdout.count("\n") == 1
    return value


@pytest.fixture(scope="module")
def embedder_folder(tokenizer, tmp_path_factory) -> Path:
    """A sentence-transformers model that sums random word vectors."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("embedder") / "static"
    SentenceTransformer(modules=[StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=16)]).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def options(tiny_checkpoint, embedder_folder) -> list[object]:
    """What makes a library that needs nothing from outside."""
    return ["--model", tiny_checkpoint, "--embedder", embedder_folder, "--chunk-tokens", 32, "--overlap-tokens", 4]


@pytest.fixture(scope="module")
def shared(options, tmp_path_factory) -> Path:
    """A folder with ``corpus`` and the ``library`` made of it, for tests that only read."""
    folder = tmp_path_factory.mktemp("shared")
    write_documents(folder / "corpus")
    run_json("compress", folder / "corpus", "--library", folder / "library", *options)
    return folder


@pytest.fixture
def own(shared, tmp_path) -> Path:
    """A library of the test's own, and its corpus."""
    corpus = write_documents(tmp_path / "corpus")
    result = run("compress", corpus, "--library", tmp_path / "library", *options_of(shared))
    assert result.exit_code == 0, result.output
    return tmp_path


def options_of(shared: Path) -> list[object]:
    info = run_json("info", "--library", shared / "library")
    return [
        *("--model", info["compressor"]["name_or_path"], "--embedder", info["embedder"]["name"]),
        *("--chunk-tokens", info["chunk_tokens"], "--overlap-tokens", info["overlap_tokens"]),
    ]


# compress


def test_compress_reports_what_it_did(options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    report = run_json("compress", corpus, "--library", tmp_path / "library", *options)
    assert report["documents"] == 3
    assert report["chunks"] >= 3
    assert report["compression_ratio"] == report["source_tokens"] / report["memory_slots"]
    assert report["bytes"] > 0
    assert report["seconds"] > 0
    assert report["tokens_per_second"] > 0
    assert (report["unchanged"], report["replaced"], report["removed"], report["failed"]) == (0, 0, 0, [])
    assert report["library"] == str(tmp_path / "library")


def test_second_run_says_that_nothing_changed(own):
    result = run("compress", own / "corpus", "--library", own / "library")
    assert result.exit_code == 0
    assert "Nothing changed: 3 documents" in result.stdout
    report = run_json("compress", own / "corpus", "--library", own / "library")
    assert (report["documents"], report["unchanged"]) == (0, 3)


def test_changed_documents_are_replaced_and_vanished_ones_pruned(own):
    (own / "corpus" / "ferry.txt").write_text("The ferry no longer sails.\n", encoding="utf-8")
    shutil.rmtree(own / "corpus" / "school")
    report = run_json("compress", own / "corpus", "--library", own / "library")
    assert (report["documents"], report["replaced"], report["removed"]) == (1, 1, 0)
    assert run_json("compress", own / "corpus", "--library", own / "library", "--prune")["removed"] == 1


def test_prune_accepts_a_folder_that_has_become_empty(own):
    shutil.rmtree(own / "corpus")
    (own / "corpus").mkdir()
    assert run_json("compress", own / "corpus", "--library", own / "library", "--prune")["removed"] == 3


def test_documents_that_cannot_be_read_are_named(own):
    bad = own / "corpus" / "bad.txt"
    bad.write_bytes(b"\x00\x01\x02")
    report = run_json("compress", own / "corpus", "--library", own / "library", code=3)
    assert [failure["path"] for failure in report["failed"]] == [str(bad)]
    assert report["unchanged"] == 3
    result = run("compress", own / "corpus", "--library", own / "library")
    assert result.exit_code == 3
    assert str(bad) in result.stderr


@pytest.mark.parametrize("content", [{}, {"image.png": b"\x89PNG"}], ids=["empty", "unknown formats"])
def test_nothing_to_compress_makes_no_library(content, options, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    failure = run_json("compress", folder, "--library", tmp_path / "library", *options, code=1)
    assert str(folder) in failure["error"]
    assert ".md" in failure["hint"]
    assert not (tmp_path / "library").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["missing"],
        ["corpus", "--model", "corpus"],
        ["corpus", "--index", "nonsense"],
        ["corpus", "--codec", "nonsense"],
        ["corpus", "--device", "nonsense"],
        ["corpus", "--overlap-tokens", "32"],
        ["corpus", "--segment-tokens", "0"],
    ],
    ids=lambda wrong: " ".join(wrong),
)
def test_wrong_arguments_make_no_library(wrong, options, tmp_path, monkeypatch):
    write_documents(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    failure = run_json("compress", *options, *wrong, "--library", "library", code=1)
    assert failure["error"]
    assert not (tmp_path / "library").exists()


def test_a_folder_with_other_files_is_not_taken_for_a_library(options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    before = sorted(corpus.rglob("*"))
    assert str(corpus) in run_json("compress", corpus, "--library", corpus, *options, code=1)["error"]
    assert {path for path in corpus.rglob("*") if path.suffix} == {path for path in before if path.suffix}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--chunk-tokens", "64"),
        ("--overlap-tokens", "0"),
        ("--segment-tokens", "16"),
        ("--codec", "int8"),
        ("--index", "HNSW8"),
        ("--embedder", "another"),
        ("--dtype", "bfloat16"),
    ],
)
def test_settings_that_contradict_the_library_are_refused(option, value, shared):
    failure = run_json("compress", shared / "corpus", "--library", shared / "library", option, value, code=1)
    assert option in failure["error"]
    assert value in failure["error"]
    assert option in failure["hint"]


def test_settings_that_agree_with_the_library_are_accepted(shared):
    report = run_json(
        "compress", shared / "corpus", "--library", shared / "library", *options_of(shared), "--codec", "exact"
    )
    assert report["unchanged"] == 3


def test_another_model_is_refused(shared, tokenizer, tmp_path):
    tiny_autocompressor(tokenizer=tokenizer, seed=1).save(tmp_path / "other")
    failure = run_json(
        "compress", shared / "corpus", "--library", shared / "library", "--model", tmp_path / "other", code=1
    )
    assert str(tmp_path / "other") in failure["error"]


# methods


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory) -> Path:
    """A causal language model that no method has touched."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_plain_model_gets_a_method_and_the_output_says_so(plain, options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    command = ["compress", corpus, "--library", tmp_path / "library", *options, "--model", plain]
    said = "kvzip, ratio 2, budget uniform, positions source, prefix none (chosen by default: the model names no meth"
    assert said in run(*command).stdout
    assert said in run("info", "--library", tmp_path / "library").stdout
    report = run_json(*command, "--method", "kvzip", "--ratio", 2)
    assert (report["documents"], report["unchanged"], report["compressor"]["method"]) == (0, 3, "kvzip")
    assert report["compressor"]["chosen_by_default"] is True
    assert run_json("ask", "Why?", "--library", tmp_path / "library", "--max-new-tokens", 2)["memory_slots"] > 0


def test_a_method_and_its_settings_are_chosen_by_options(plain, options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    command = ["compress", corpus, "--library", tmp_path / "library", *options, "--model", plain]
    chosen = ["--method", "snapkv", "--slots", 3, "--budget", "global", "--positions", "compact", "--prefix", "none"]
    report = run_json(*command, *chosen)
    assert report["compressor"]["chosen_by_default"] is False
    assert report["memory_slots"] <= 3 * report["chunks"]
    text = run("info", "--library", tmp_path / "library").stdout
    assert "snapkv, slots 3, budget global, positions compact, prefix none\n" in text
    assert run_json(*command, *chosen)["unchanged"] == 3
    assert "made with --slots 3, not 4" in run_json(*command, "--slots", 4, code=1)["error"]
    for option, value in (("--method", "kv"), ("--ratio", 3), ("--budget", "uniform"), ("--positions", "source")):
        failure = run_json(*command, option, value, code=1)
        assert f"was made with {option}" in failure["error"]
        assert option in failure["hint"]


def test_a_trained_method_may_have_a_ratio_too(tokenizer, options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    tiny_gist("beacon", tokenizer).save(tmp_path / "beacon")
    command = ["compress", corpus, "--library", tmp_path / "library", *options, "--model", tmp_path / "beacon"]
    assert run_json(*command, "--ratio", 8)["compressor"]["settings"]["ratio"] == [8]
    assert run_json(*command, "--ratio", 8)["unchanged"] == 3
    assert "made with --ratio [8], not 4" in run_json(*command, "--ratio", 4, code=1)["error"]
    assert "made without --slots, not with 5" in run_json(*command, "--slots", 5, code=1)["error"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "zip"], "unknown method 'zip'"),
        (["--ratio", "0.5"], "ratio is 0.5"),
        (["--ratio", "2", "--method", "kv"], "the method kv has no --ratio"),
        (["--segment-tokens", "8"], "the method kvzip has no --segment-tokens"),
        (["--slots", "0"], "slots is 0"),
        (["--budget", "all"], "unknown budget 'all'"),
        (["--positions", "none"], "unknown positions 'none'"),
        (["--prefix", "chat"], "prefix='chat' needs a tokenizer with a chat template"),
        (["--prefix", "system"], "unknown prefix 'system'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_a_method_cannot_use_are_told_as_options(wrong, message, plain, options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    command = ["compress", corpus, "--library", tmp_path / "library", *options, "--model", plain, *wrong]
    failure = run_json(*command, code=1)
    assert message in failure["error"]
    assert failure["hint"]
    assert not (tmp_path / "library").exists()
    said = run(*command).stderr
    assert said.startswith("Error: ")
    assert len(said.splitlines()) == 2  # the error and its hint


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
UNSUITED = {
    "encoder alone": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=32)),
        "does not compute its logits",
    ),
    "encoder and decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=400, d_model=32, d_ff=32, num_layers=2, num_heads=4, d_kv=8)
        ),
        "no causal language model of the kind t5",
    ),
    "running state": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        "keep a running state",
    ),
    "no rotary embedding": (lambda: tiny_model("opt"), "OPTForCausalLM has no rotary embedding"),
}


@pytest.mark.parametrize("method", [[], ["--method", "kvzip"]], ids=["by default", "kvzip"])
@pytest.mark.parametrize("kind", UNSUITED)
def test_models_that_cannot_be_compressed_with_are_refused_in_a_line(kind, method, tokenizer, options, tmp_path):
    make, message = UNSUITED[kind]
    make().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    corpus = write_documents(tmp_path / "corpus")
    result = run("compress", corpus, "--library", tmp_path / "l", *options, "--model", tmp_path / "model", *method)
    assert result.exit_code == 1
    assert not (tmp_path / "l").exists()
    error, *hint = result.stderr.splitlines()
    assert message in error
    assert len(hint) <= 1


def test_a_prompt_beyond_the_window_says_by_how_much(tokenizer, options, tmp_path):
    tiny_model(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    corpus = write_documents(tmp_path / "corpus")
    command = ["compress", corpus, *options, "--model", tmp_path / "model", "--method", "kv"]
    failure = run_json(*command, "--chunk-tokens", 128, "--library", tmp_path / "none", code=0)
    assert failure["documents"] == 3  # they are short
    run_json(*command, "--library", tmp_path / "l")
    failure = run_json("ask", "When does the ferry sail?", "-k", 4, "--library", tmp_path / "l", code=1)
    assert "more than the model's 64" in failure["error"]
    assert failure["hint"]
    (corpus / "ferry.txt").write_text(DOCUMENTS["ferry.txt"] * 9, encoding="utf-8")
    failure = run_json(*command, "--chunk-tokens", 128, "--library", tmp_path / "other", code=1)
    assert "more than the model's 64" in failure["error"]


def test_memories_of_another_model_are_not_read(plain, options, tokenizer, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    corpus = write_documents(tmp_path / "corpus")
    run_json("compress", corpus, "--library", tmp_path / "l", *options, "--model", plain)
    failure = run_json("ask", "Why?", "--library", tmp_path / "l", "--model", tmp_path / "other", code=1)
    assert "was made by compressor" in failure["error"]
    assert "compress the documents again" in failure["hint"]


def test_a_budget_above_the_document_keeps_all_of_it(plain, options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    command = ["compress", corpus, "--library", tmp_path / "l", *options, "--model", plain, "--slots", 1000]
    report = run_json(*command)
    assert report["memory_slots"] == report["source_tokens"]


def test_a_ratio_is_a_number(plain, tmp_path):
    result = run("compress", write_documents(tmp_path / "c"), "--model", plain, "--ratio", "four")
    assert result.exit_code == 2
    assert "'four' is no number" in result.stderr


# ask


@pytest.mark.parametrize("mode", ["memory", "text", "none"])
def test_ask_reads_memories_or_text_or_nothing(mode, shared):
    answer = run_json(
        "ask",
        "When does the ferry sail?",
        "--library",
        shared / "library",
        "--mode",
        mode,
        "-k",
        2,
        "--max-new-tokens",
        4,
    )
    assert answer["mode"] == mode
    assert isinstance(answer["answer"], str)
    assert len(answer["sources"]) == (0 if mode == "none" else 2)
    slots = sum(source["slots"] for source in answer["sources"])
    assert answer["memory_slots"] == (slots if mode == "memory" else 0)
    assert answer["prompt_tokens"] > 0
    assert 0 < answer["time_to_first_token"] <= answer["seconds"]
    for source in answer["sources"]:
        assert {"document", "chunk", "score", "text", "slots"} <= source.keys()


def test_ask_streams_the_answer_and_lists_its_sources(shared, monkeypatch):
    monkeypatch.chdir(shared)
    question = ["ask", "When does the ferry sail?", "--library", "library", "-k", 1, "--max-new-tokens", 8]
    answer = run_json(*question)
    result = run(*question)
    assert result.exit_code == 0
    streamed, _, sources = result.stdout.partition("\n\n")
    assert streamed.strip() == "".join(c if c.isprintable() or c in "\t\n" else "\ufffd" for c in answer["answer"])
    assert f"1  {Path(answer['sources'][0]['document']).relative_to(shared)}" in sources


def test_sampling_follows_the_seed(shared):
    question = ["ask", "Why?", "--library", shared / "library", "--temperature", 1, "--top-k", 50, "--top-p", 0.9]
    first, again, other = (run_json(*question, "--seed", seed)["answer"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_answer_ends_at_a_stop_string(shared):
    question = ["ask", "When?", "--library", shared / "library", "--max-new-tokens", 8]
    whole = run_json(*question, "--stop", "never said")["answer"]
    stop = whole[2:4]
    assert run_json(*question, "--stop", stop)["answer"] == whole.partition(stop)[0].strip()


def test_a_question_may_come_from_standard_input(shared):
    result = run("ask", "-", "--library", shared / "library", "--max-new-tokens", 1, "--json", input="Why?\n")
    assert json.loads(result.stdout)["question"] == "Why?"


def test_questions_in_a_file_are_answered_like_each_alone(shared, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("When does the ferry sail?\n\nWho reads the gauge?\n", encoding="utf-8")
    common = ["--library", shared / "library", "--max-new-tokens", 4]
    answers = run_json("ask", "--questions", file, *common)["answers"]
    assert [answer["question"] for answer in answers] == ["When does the ferry sail?", "Who reads the gauge?"]
    for answer in answers:
        assert answer["answer"] == run_json("ask", answer["question"], *common)["answer"]
    assert "Who reads the gauge?" in run("ask", "--questions", file, *common).stdout


@pytest.mark.parametrize("given", [[], ["Why?", "--questions", __file__]], ids=["neither", "both"])
def test_ask_takes_one_question_or_a_file(given, shared):
    assert run("ask", *given, "--library", shared / "library").exit_code == 2


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_an_error_in_every_mode(question, shared):
    run_json("ask", question, "--library", shared / "library", "--mode", "none", code=1)


def test_an_answer_keeps_to_a_schema(shared, tmp_path):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"times": {"enum": [2, 5]}}, "required": ["times"]}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({**schema, "additionalProperties": False}), encoding="utf-8")
    question = ["ask", "How often?", "--library", shared / "library", "-k", 1, "--schema", file]
    answer = run_json(*question)
    assert json.loads(answer["answer"])["times"] in (2, 5)
    assert answer["finish_reason"] == "stop"
    assert run(*question).stdout.startswith(answer["answer"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "no JSON"), ("[]", "a mapping"), ('{"type": "objct"}', "objct")],
)
def test_a_file_that_is_no_schema_is_refused(content, message, shared, tmp_path):
    pytest.importorskip("llguidance")
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    told = run_json("ask", "Why?", "--library", shared / "library", "--schema", file, code=1)
    assert message in told["error"]


# search, info, remove


@pytest.mark.parametrize("retrieval", ["hybrid", "dense", "lexical"])
def test_search_finds_the_document(retrieval, shared):
    query = "lighthouse grey granite"
    found = run_json("search", query, "--library", shared / "library", "--retrieval", retrieval, "-k", 1)
    assert found["query"] == query
    assert [Path(hit["document"]).name for hit in found["hits"]] == ["lighthouse.md"]
    assert "1874" in found["hits"][0]["text"]


def test_search_and_ask_rank_by_likelihood(shared):
    options = ["--library", shared / "library", "-k", 2, "--rerank", "likelihood"]
    hits = run_json("search", "lighthouse", *options)["hits"]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert all(hit["score"] < 0 for hit in hits)  # log-probabilities
    sources = run_json("ask", "lighthouse", *options, "--max-new-tokens", 1)["sources"]
    assert [source["id"] for source in sources] == [hit["id"] for hit in hits]


def test_k_must_be_positive_and_may_exceed_the_chunks(shared):
    assert "k must be" in run_json("search", "ferry", "--library", shared / "library", "-k", 0, code=1)["error"]
    chunks = run_json("info", "--library", shared / "library")["chunks"]
    hits = run_json("search", "ferry", "--library", shared / "library", "-k", 99, "--retrieval", "dense")["hits"]
    assert len(hits) == chunks


def test_info_counts_and_lists_documents(shared):
    info = run_json("info", "--library", shared / "library", "--documents")
    assert info["documents"] == len(info["document_list"]) == 3
    assert {Path(document["uri"]).name for document in info["document_list"]} == {
        "lighthouse.md",
        "ferry.txt",
        "gauge.rst",
    }
    assert (info["chunk_tokens"], info["codec"]) == (32, "exact")
    text = run("info", "--library", shared / "library", "--documents").stdout
    assert "gauge.rst" in text
    assert info["compressor"]["fingerprint"][:12] in text


def test_remove_takes_files_and_folders(own, monkeypatch):
    monkeypatch.chdir(own)
    removed = run_json("remove", "corpus/ferry.txt", "corpus/school", "--compact", "--library", "library")
    assert removed["removed"] == 2
    assert removed["bytes_freed"] > 0
    assert run_json("info", "--library", "library")["documents"] == 1
    assert "ferry.txt" in run_json("remove", "corpus/ferry.txt", "--library", "library", code=1)["error"]


def test_an_empty_library_says_how_to_fill_it(own):
    run_json("remove", own / "corpus", "--library", own / "library")
    assert "compress" in run_json("ask", "Why?", "--library", own / "library", code=1)["hint"]


# models


def cached(hub: Path, name: str, files: dict[str, str]) -> None:
    """Lay files out like the local cache of the hub."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    (folder / "snapshots" / "0").mkdir(parents=True)
    for file, text in files.items():
        (folder / "snapshots" / "0" / file).write_text(text)


def test_models_lists_what_is_published_and_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    sharded = {"config.json": "{}", "pytorch_model.bin.index.json": '{"weight_map": {"a": "1.bin", "b": "2.bin"}}'}
    whole, complete, partial, empty = (checkpoint.name for checkpoint in PUBLISHED[:4])
    cached(tmp_path, whole, {"config.json": "{}", "model.safetensors": ""})
    cached(tmp_path, complete, {**sharded, "1.bin": "", "2.bin": ""})
    cached(tmp_path, partial, {**sharded, "1.bin": ""})
    cached(tmp_path, empty, {"config.json": "{}"})
    value = run_json("models")
    assert "autocompressor" in value["methods"]
    here = {checkpoint["name"] for checkpoint in value["checkpoints"] if checkpoint["cached"]}
    assert here == {whole, complete}
    assert cached_folder(whole) == tmp_path / f"models--{whole.replace('/', '--')}" / "snapshots" / "0"
    text = run("models").stdout
    assert all(checkpoint.name in text for checkpoint in PUBLISHED)
    assert max(map(len, text.splitlines())) <= 120


def test_models_says_where_adapters_and_their_bases_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapters = [checkpoint for checkpoint in PUBLISHED if checkpoint.drive]
    base = adapters[0].base
    cached(tmp_path, base, {"config.json": "{}", "model.safetensors": ""})
    rows = {row["name"]: row for row in run_json("models")["checkpoints"]}
    for adapter in adapters:
        row = rows[adapter.name]
        assert (row["cached"], row["drive"], row["base"]) == (None, adapter.drive, adapter.base)
        assert bool(row["base_cached"]) == (adapter.base == base)
    assert rows[PUBLISHED[0].name]["base_cached"] is None
    text = run("models").stdout
    assert CCM_DRIVE in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert all(lines[adapter.name][1] == adapter.base for adapter in adapters)
    assert {adapter.name: lines[adapter.name][-1] == "yes" for adapter in adapters} == {
        adapter.name: adapter.base == base for adapter in adapters
    }


def test_models_tells_how_much_a_text_shrinks():
    lines = {line.split("  ")[0]: line for line in run("models").stdout.splitlines()}
    for name, size in {
        "princeton-nlp/AutoCompressor-2.7b-6k": "50 per segment",
        "princeton-nlp/RMT-2.7b-8k": "50 per text",
        "princeton-nlp/FullAttention-2.7b-4k": "none",
        "namespace-Pt/ultragist-mistral-7b-inst": "1 per 2-32 tokens",
        "fcyp/RCC_Ins_Reconstruction": "1 per 32 tokens",
        "llama-7b-no-online-concat_recur-ntok2": "2 per segment",
        "llama-7b-no-online-merge_recur-ntok8": "8 per text",
    }.items():
        assert f"  {size}  " in lines[name]


def test_models_lists_the_bundled_model_where_there_is_one(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ctxdocs.published.bundled_path", lambda: tmp_path)
    assert run_json("models")["bundled"] is None
    monkeypatch.setattr("ctxdocs.published.bundled_path", lambda: tiny_checkpoint)
    bundled = run_json("models")["bundled"]
    assert (bundled["method"], bundled["slots"], bundled["cached"]) == ("autocompressor", 4, str(tiny_checkpoint))
    assert "\nbundled " in run("models").stdout


# errors and streams


@pytest.mark.parametrize("command", [["ask", "Why?"], ["search", "why"], ["info"], ["remove", "x"]], ids=lambda c: c[0])
def test_a_missing_library_is_an_error_with_a_hint(command, tmp_path):
    failure = run_json(*command, "--library", tmp_path / "none", code=1)
    assert str(tmp_path / "none") in failure["error"]
    assert "ctxdocs compress" in failure["hint"]
    result = run(*command, "--library", tmp_path / "none")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert failure["error"] in result.stderr
    assert failure["hint"] in result.stderr


def test_the_library_may_be_named_by_the_environment(shared):
    result = run("info", "--json", env={"CTXDOCS_LIBRARY": str(shared / "library")})
    assert json.loads(result.stdout)["documents"] == 3


@pytest.mark.parametrize("command", [["compress"], ["search"], ["ask", "x", "--mode", "nonsense"], ["nonsense"]])
def test_usage_errors_are_json_too(command):
    assert "--help" in run_json(*command, code=2)["hint"]
    result = run(*command)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_behind_a_double_dash_json_is_a_question(shared):
    result = run("search", "--library", shared / "none", "--", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""


def test_only_unexpected_errors_show_a_traceback(shared, monkeypatch):
    expected = ["search", " ", "--library", shared / "library"]
    assert "Traceback" not in run(*expected).stderr
    assert "Traceback" in run(*expected, env={"CTXDOCS_DEBUG": "1"}).stderr

    def broken(*_, **__):
        raise RuntimeError("boiler")

    monkeypatch.setattr("ctxdocs.library.Library.search", broken)
    result = run("search", "ferry", "--library", shared / "library", "--json")
    assert result.exit_code == 1
    assert "boiler" in json.loads(result.stdout)["error"]
    assert "Traceback" in result.stderr
    assert isinstance(run("search", "ferry", "--library", shared / "library").exception, RuntimeError)


def test_markup_and_control_characters_stay_text(options, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    name = "[bold]\x1b[2J.md"
    (corpus / name).write_text("The [red]kettle[/red] \x1b]0;title\x07 boils\u202e :smile:", encoding="utf-8")
    library = ["--library", tmp_path / "library"]
    run_json("compress", corpus, *library, *options)
    for result in (run("search", "kettle", *library), run("info", "--documents", *library)):
        assert result.exit_code == 0
        assert not set("\x1b\x07\u202e") & set(result.stdout)
        assert "[bold]" in result.stdout
    assert "[red]kettle[/red]" in run("search", "kettle", *library).stdout
    assert ":smile:" in run("search", "kettle", *library).stdout
    assert run_json("search", "kettle", *library)["hits"][0]["document"].endswith(name)


def test_every_command_has_help_and_json():
    for name in main.list_commands(click.Context(main)):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


# in a process of its own


def python(*args: object, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **options)


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from ctxdocs.cli import main; main(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'transformers', 'faiss', 'numpy', 'rich'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert "compress" in result.stdout


def test_both_streams_are_free_of_noise(options, tmp_path):
    corpus = write_documents(tmp_path / "corpus")
    library = ["--library", tmp_path / "library", "--json"]
    compressed = python("-m", "ctxdocs.cli", "compress", corpus, *library, *options)
    answered = python("-m", "ctxdocs.cli", "ask", "Why?", "--max-new-tokens", 2, *library)
    for result in (compressed, answered):
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert isinstance(json.loads(result.stdout), dict)


def test_interrupted_compression_is_resumed(options, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(150):
        (corpus / f"{number:03}.txt").write_text(f"Ship {number} passed the lighthouse.", encoding="utf-8")
    script = """
import os, signal, sys
from ctxdocs.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
from ctxdocs.compressors.base import Compressor
compress, calls = Compressor.compress_ids, []
def interrupted(self, documents, **options):
    calls.append(documents)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return compress(self, documents, **options)
Compressor.compress_ids = interrupted
main(sys.argv[1:])
"""
    command = ["compress", corpus, "--library", tmp_path / "library", *options]
    result = python("-c", script, *command, "--json")
    assert result.returncode == 130, result.stderr
    assert result.stderr == ""
    assert "again" in json.loads(result.stdout)["hint"]
    stored = run_json("info", "--library", tmp_path / "library")["documents"]
    assert 0 < stored < 150
    report = run_json(*command)
    assert (report["unchanged"], report["documents"]) == (stored, 150 - stored)
    assert run_json("info", "--library", tmp_path / "library")["documents"] == 150


def chat(*args: object, lines: list[str]):
    result = run("chat", *args, input="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result


def test_chat_answers_line_by_line_and_obeys_its_commands(tiny_checkpoint, tmp_path):
    saved = tmp_path / "talk.safetensors"
    model = ["--model", tiny_checkpoint, "--max-new-tokens", 5]
    result = chat(
        *model, lines=["Who built it?", "", "/memory", f"/save {saved}", "/reset", "/memory", "/exit", "Lost?"]
    )
    assert "1 turn: " in result.stdout
    assert f"Saved to {saved}" in result.stdout
    assert result.stdout.endswith("Forgotten.\nNothing has been said yet.\n")
    again = chat(*model, "--session", saved, lines=["/memory", "When?", "/memory"])
    assert "1 turn: " in again.stdout
    assert "2 turns: " in again.stdout


def test_chat_in_json_answers_every_line_with_an_object(tiny_checkpoint, tmp_path):
    lines = ["Who?", "/memory", f"/save {tmp_path}/no/such/folder", "/load", "/dance", f"/load {tmp_path}/none"]
    result = chat("--model", tiny_checkpoint, "--json", "--max-new-tokens", 5, lines=[*lines, "Why?", "/help"])
    who, memory, unsaved, nothing, dance, unloaded, why, said = map(json.loads, result.stdout.splitlines())
    assert (who["question"], who["finish_reason"], why["question"]) == ("Who?", "length", "Why?")
    assert memory["turns"] == 1
    assert memory["tokens_seen"] > 5
    assert "could not be written" in unsaved["error"]
    assert nothing["error"] == "/load needs a file"
    assert dance["error"] == "there is no command /dance"
    assert "cannot be read as a session" in unloaded["error"]
    assert "/reset" in said["help"]


def test_chat_over_a_library_shows_its_sources(shared):
    result = chat("--library", shared / "library", "-k", 1, "--max-new-tokens", 5, lines=["When was it built?", "Why?"])
    assert result.stdout.count("chunk ") == 2
    error = run_json("chat", "--library", shared / "no-library", code=1)["error"]
    assert "there is no library" in error
    assert run("chat", "--library", shared / "library", "--method", "beacon").exit_code == 2

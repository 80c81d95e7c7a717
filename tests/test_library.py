"""The main job from Python: add, search, ask, remove; incremental, and safe against bad input."""

from __future__ import annotations

import threading

import pytest
import torch

from ctxdocs import CtxdocsError, FingerprintMismatch, InputError, Library, LibraryError, StorageError
from ctxdocs.corpus import Document

from .conftest import FakeEmbedder, tiny_autocompressor

QUESTION = "When was the lighthouse built?"


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return library


def uris(library):
    return sorted(uri.rsplit("/", 1)[-1] for uri in library.store.digests())


def test_adding_counts_what_it_did(make_library, corpus):
    library = make_library()
    report = library.add(corpus)
    assert (report.documents, report.unchanged, report.replaced, report.failed) == (3, 0, 0, [])
    assert report.chunks == library.info()["chunks"] >= 3
    assert report.memory_slots == report.chunks * 4
    assert report.source_tokens == library.info()["tokens"]
    assert report.compression_ratio == pytest.approx(report.source_tokens / report.memory_slots)
    assert report.bytes == report.memory_slots * 32 * 4
    assert report.tokens_per_second == pytest.approx(report.source_tokens / report.seconds)


def test_a_second_run_compresses_nothing(library, corpus):
    reopened = Library.open(library.path, "no/model", FakeEmbedder())  # nothing to do, so no model is loaded
    report = reopened.add(corpus)
    assert (report.documents, report.chunks, report.unchanged) == (0, 0, 3)


def test_changed_files_are_replaced_and_vanished_ones_dropped_when_asked(library, corpus):
    (corpus / "ferry.txt").write_text("The ferry was sold. Nobody sails.", encoding="utf-8")
    (corpus / "gauge.rst").unlink()
    report = library.add(corpus)
    assert (report.documents, report.replaced, report.unchanged, report.removed) == (1, 1, 1, 0)
    assert uris(library) == ["ferry.txt", "gauge.rst", "lighthouse.md"]
    assert "sold" in library.search("ferry", k=1)[0].text
    report = library.add(corpus, missing="drop")
    assert (report.documents, report.unchanged, report.removed) == (0, 2, 1)
    assert uris(library) == ["ferry.txt", "lighthouse.md"]


def test_dropping_spares_documents_outside_the_given_folders(library, corpus, tmp_path):
    other = tmp_path / "corpus-two"
    other.mkdir()
    (other / "note.md").write_text("A note.", encoding="utf-8")
    library.add([other, Document.from_text("Made in Python.", uri="memo")])
    assert library.add(other, missing="drop").removed == 0
    assert len(uris(library)) == 5


def test_documents_from_python(library):
    document = Document.from_text("Maud Ferris keeps bees.", uri="memo/1", metadata={"author": "me"})
    assert library.add(document).documents == 1
    assert library.add(document).unchanged == 1
    hit = library.search("Who keeps bees?", k=1)[0]
    assert hit.document == "memo/1"
    assert hit.text == "Maud Ferris keeps bees."
    with pytest.raises(InputError, match="two documents are named 'memo/1'"):
        library.add([document, document])


def test_stored_memories_are_what_the_compressor_makes(library):
    hits = library.search("ferry", k=3)
    memories = library.store.memories(library.store.chunks([hit.id for hit in hits]))
    for hit, memory in zip(hits, memories, strict=True):
        fresh = library.compressor.compress([hit.text])[0]
        torch.testing.assert_close(memory.vectors, fresh.vectors, rtol=1e-4, atol=1e-5)
        assert (memory.slots, memory.source_tokens) == (hit.slots, hit.tokens)


@pytest.mark.parametrize("retrieval", ["hybrid", "dense", "lexical"])
def test_search_among_some_documents(library, retrieval):
    (gauge,) = [uri for uri in library.store.digests() if uri.endswith("gauge.rst")]
    hits = library.search("ferry gauge", k=9, retrieval=retrieval, documents=[gauge, "nothing"])
    assert {hit.document for hit in hits} == {gauge}
    assert library.search("ferry", retrieval=retrieval, documents=[]) == []


@pytest.mark.parametrize("retrieval", ["hybrid", "dense", "lexical"])
def test_search_finds_the_document(library, retrieval):
    hits = library.search("lighthouse built 1874", k=2, retrieval=retrieval)
    assert hits[0].document.endswith("lighthouse.md")
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_asking_reads_memories_text_or_nothing(library):
    memory, text, none = (
        library.ask(QUESTION, k=2, mode=mode, max_new_tokens=8) for mode in ("memory", "text", "none")
    )
    assert [hit.id for hit in memory.sources] == [hit.id for hit in text.sources]
    assert memory.memory_slots == sum(hit.slots for hit in memory.sources)
    assert (text.memory_slots, none.memory_slots, none.sources) == (0, 0, [])
    assert none.prompt_tokens == memory.prompt_tokens < text.prompt_tokens
    assert 0 < memory.time_to_first_token <= memory.seconds


def test_an_answer_is_what_the_compressor_generates_from_the_memories(library):
    answer = library.ask(QUESTION, k=2, max_new_tokens=8, stop=())
    memories = library.store.memories(library.store.chunks([hit.id for hit in answer.sources]))
    prompt = [*memories, f"Question: {QUESTION}\nAnswer:"]
    assert answer.text == library.compressor.generate(prompt, max_new_tokens=8).strip()


def test_streaming_gives_the_same_answer(library):
    stream = library.stream(QUESTION, k=2, max_new_tokens=16)
    pieces = list(stream)
    answer = library.ask(QUESTION, k=2, max_new_tokens=16)
    assert "".join(pieces).strip() == stream.answer.text == answer.text
    assert stream.answer.memory_slots == answer.memory_slots
    assert list(stream) == []


def test_a_batch_of_questions_equals_each_alone(library):
    questions = [QUESTION, "How often does the ferry sail?", "gauge"]
    together = library.ask_many(questions, k=2, max_new_tokens=8)
    for question, answer in zip(questions, together, strict=True):
        assert answer.text == library.ask(question, k=2, max_new_tokens=8).text


def test_k_beyond_the_library_gives_all_there_is(library):
    assert len(library.search("ferry", k=1000)) == library.info()["chunks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": -3}, "k must be at least 1"),
        ({"question": "  "}, "the query is empty"),
        ({"mode": "telepathy"}, "unknown mode 'telepathy'"),
        ({"retrieval": "guess"}, "unknown retrieval 'guess'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"colour": 1}, "unknown option"),
    ],
)
def test_unusable_questions_are_refused(library, arguments, message):
    with pytest.raises(InputError, match=message):
        library.ask(**{"question": QUESTION, **arguments})


def test_too_many_memories_for_the_model_say_by_how_much(tmp_path, corpus, tokenizer):
    small = tiny_autocompressor(tokenizer=tokenizer, max_position_embeddings=48, segment_tokens=32)
    library = Library.create(tmp_path / "small", small, FakeEmbedder(), chunk_tokens=8, overlap_tokens=0)
    library.add(corpus)
    with pytest.raises(InputError, match="more than the model's 48"):
        library.ask(QUESTION, k=12)


def test_an_empty_library_and_a_missing_one(make_library, tmp_path):
    with pytest.raises(LibraryError, match="is empty"):
        make_library().ask(QUESTION)
    with pytest.raises(LibraryError, match="nowhere"):
        Library.open(tmp_path / "nowhere")


def test_a_library_of_another_model_is_refused_naming_both(library, tokenizer, compressor):
    other = tiny_autocompressor(tokenizer=tokenizer, seed=5)
    opened = Library.open(library.path, other, FakeEmbedder())
    assert opened.info()["documents"] == 3
    with pytest.raises(FingerprintMismatch, match=f"{compressor.fingerprint[:12]}.*{other.fingerprint[:12]}"):
        opened.ask(QUESTION)


def test_another_model_that_cannot_take_the_settings_is_refused_by_fingerprint(tmp_path, tiny_checkpoint, corpus):
    library = Library.create(tmp_path / "named", tiny_checkpoint, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    tiny_autocompressor(max_position_embeddings=64, seed=5).save(tmp_path / "short")
    with pytest.raises(FingerprintMismatch, match="short"):
        _ = Library.open(tmp_path / "named", tmp_path / "short", FakeEmbedder(), device="cpu").compressor


def test_a_library_opens_again_with_the_model_it_names(tmp_path, tiny_checkpoint, corpus):
    library = Library.create(tmp_path / "named", tiny_checkpoint, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    again = Library.open(tmp_path / "named", embedder=FakeEmbedder(), device="cpu")
    assert again.ask(QUESTION, max_new_tokens=8).text == library.ask(QUESTION, max_new_tokens=8).text


def test_a_library_of_a_model_made_in_python_asks_for_it(library):
    with pytest.raises(LibraryError, match="does not say where its compressor is"):
        Library.open(library.path, embedder=FakeEmbedder()).ask(QUESTION)


def test_another_embedder_is_refused(library, compressor):
    class Other(FakeEmbedder):
        name = "other"

    with pytest.raises(LibraryError, match="indexed with fake-bag-of-words"):
        Library.open(library.path, compressor, Other()).search("ferry")


def test_removing_by_path_folder_and_uri(library, corpus):
    library.add(Document.from_text("Made in Python.", uri="memo"))
    assert library.remove(corpus / "ferry.txt") == 1
    assert library.remove("memo") == 1
    with pytest.raises(LibraryError, match=r"ferry\.txt is not in the library"):
        library.remove([corpus / "gauge.rst", corpus / "ferry.txt"])
    assert uris(library) == ["gauge.rst", "lighthouse.md"]
    assert library.remove(corpus) == 2
    library.compact()
    assert library.info()["memory_bytes"] == 0
    assert list((library.path / "memories").iterdir()) == []


def test_wrong_chunking_leaves_nothing_behind(make_library, tmp_path):
    with pytest.raises(InputError):
        make_library("bad", chunk_tokens=8, overlap_tokens=8)
    assert not (tmp_path / "bad").exists()


def test_files_that_cannot_be_read_are_reported_and_the_rest_is_added(make_library, corpus):
    (corpus / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (corpus / "empty.md").write_bytes(b"")
    (corpus / "broken.pdf").write_bytes(b"%PDF-1.7\nnot really")
    (corpus / "latin.txt").write_bytes("Café à la crème, déjà vu, garçon, naïveté, où, forêt.".encode("latin-1"))
    library = make_library()
    report = library.add(corpus)
    assert report.documents == 4
    failed = {failure["path"].rsplit("/", 1)[-1]: failure["reason"] for failure in report.failed}
    assert failed.keys() == {"binary.txt", "empty.md", "broken.pdf"}
    assert all(failed.values())
    assert "garçon" in library.search("garçon", k=1)[0].text


def test_an_empty_folder_adds_nothing_and_a_missing_path_is_an_error(make_library, tmp_path):
    (tmp_path / "void").mkdir()
    library = make_library()
    assert library.add(tmp_path / "void").documents == 0
    with pytest.raises(InputError, match="missing"):
        library.add(tmp_path / "missing")


@pytest.mark.parametrize(("megabytes", "chunk_tokens"), [(2, 200), pytest.param(20, 2000, marks=pytest.mark.slow)])
def test_a_large_file(megabytes, chunk_tokens, make_library, tmp_path, monkeypatch):
    """It goes through in windows: what is held at once does not grow with the file."""
    import ctxdocs.ingestion as ingestion

    monkeypatch.setattr(ingestion, "_LARGEST_WINDOW", 256)
    path = tmp_path / "large.txt"
    line = "the quick brown fox jumps over the lazy dog and runs away from the old grey wolf\n"
    path.write_text(line * (megabytes * 2**20 // len(line) + 1), encoding="utf-8")
    library = make_library(chunk_tokens=chunk_tokens, overlap_tokens=0)
    windows = []
    compressor = library.compressor
    monkeypatch.setattr(
        type(compressor),
        "compress_batch",
        lambda self, documents, **_: (
            windows.append(len(documents)),
            [self.as_memory(torch.zeros(4, 32), len(document)) for document in documents],
        )[1],
    )
    report = library.add(path)
    assert report.documents == 1
    assert report.chunks == sum(windows) > 1000
    assert max(windows) <= 256


def test_windows_stay_small_while_memories_are_large(make_library, monkeypatch):
    import ctxdocs.ingestion as ingestion

    library = make_library()
    monkeypatch.setattr(ingestion, "_FIRST_WINDOW", 2)
    monkeypatch.setattr(ingestion, "_WINDOW_BYTES", 3 * 4 * 32 * 4)  # three memories of the tiny model
    sizes = []
    compress = type(library.compressor).compress_ids
    monkeypatch.setattr(
        type(library.compressor),
        "compress_ids",
        lambda self, documents, **options: (sizes.append(len(documents)), compress(self, documents, **options))[1],
    )
    library.add([Document.from_text(f"Note number {n}.", uri=f"note/{n}") for n in range(11)])
    assert sizes == [2, 3, 3, 3]


def test_a_failing_write_keeps_what_was_committed(make_library, corpus, monkeypatch):
    from ctxdocs.cache import Writer

    library = make_library()
    library.add(corpus / "ferry.txt")

    def full(self, chunks, finished):
        raise StorageError("no space left on the disk", "free some space")

    monkeypatch.setattr(Writer, "write", full)
    with pytest.raises(StorageError, match="no space left"):
        library.add(corpus)
    monkeypatch.undo()
    assert uris(library) == ["ferry.txt"]
    assert library.add(corpus).documents == 2


def test_an_interruption_keeps_finished_windows_and_the_next_run_resumes(make_library, tmp_path, monkeypatch):
    import ctxdocs.ingestion as ingestion

    monkeypatch.setattr(ingestion, "_FIRST_WINDOW", 2)
    monkeypatch.setattr(ingestion, "_LARGEST_WINDOW", 2)
    library = make_library()
    documents = [Document.from_text(f"Note number {n}.", uri=f"note/{n}") for n in range(12)]
    compress, calls = type(library.compressor).compress_batch, []

    def interrupted(self, batch, **options):
        calls.append(len(batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compress(self, batch, **options)

    monkeypatch.setattr(type(library.compressor), "compress_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.add(documents)
    done = library.info()["documents"]
    assert 2 <= done < 12
    report = library.add(documents)
    assert (report.documents, report.unchanged) == (12 - done, done)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ctxdocs-")]


def test_an_error_while_reading_reaches_the_caller(make_library, corpus, monkeypatch):
    import ctxdocs.ingestion as ingestion

    def broken(source):
        raise RuntimeError("the disk fell out")

    monkeypatch.setattr(ingestion, "load_document", broken)
    with pytest.raises(RuntimeError, match="fell out"):
        make_library().add(corpus)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ctxdocs-")]


def test_progress_is_told(make_library, corpus):
    seen = []
    library = make_library()
    library.add(corpus / "ferry.txt")
    library.add(corpus, on_progress=lambda progress: seen.append((progress.seen, progress.total)))
    assert seen[0] == (2, 3)
    assert seen[-1] == (3, 3)


@pytest.mark.parametrize(("codec", "smaller"), [("exact", 1), ("bfloat16", 2), ("int8", 3)])
def test_codecs_trade_precision_for_bytes(make_library, corpus, codec, smaller):
    library = make_library(codec=codec)
    library.add(corpus)
    assert library.ask(QUESTION, k=3, max_new_tokens=4).memory_slots == 12
    assert library.info()["memory_bytes"] <= 12 * 32 * 4 / smaller


def test_every_error_is_a_ctxdocs_error():
    assert all(
        issubclass(error, CtxdocsError) for error in (FingerprintMismatch, InputError, LibraryError, StorageError)
    )

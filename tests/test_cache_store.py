from __future__ import annotations

import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ctxdocs.cache import NewChunk, Store
from ctxdocs.errors import FingerprintMismatch, InputError, LibraryError
from ctxdocs.memory import SoftPrompt
from tests.cache_samples import DIMENSION, FINGERPRINT, STAMP, add, chunk, create, embedding, equal, memory, nearest

KINDS = ["soft_prompt", "kv", "kv by head", "layer_states"]


@pytest.fixture
def store(tmp_path):
    with create(tmp_path / "library") as store:
        yield store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_memories_come_back_bit_for_bit(store, kind, dtype):
    made = [memory(seed, kind, dtype) for seed in range(3)]
    with store.writer() as writer:
        document = writer.begin("a", "1")
        writer.write([chunk(document, f"text {i}", i, m) for i, m in enumerate(made)], [document])
    with Store.open(store.path) as again:
        read = again.memories(again.chunks([3, 1, 2]))
    assert [equal(one, made[i]) for one, i in zip(read, (2, 0, 1), strict=True)] == [True] * 3


def test_memories_that_share_storage_or_have_no_slots_are_stored(store):
    batch = torch.randn(4, 3, 16)
    made = [SoftPrompt(vectors=vectors, **STAMP) for vectors in (batch[0], batch[0], batch[:, 1], batch[0, :0])]
    with store.writer() as writer:
        document = writer.begin("a", "1")
        writer.write([chunk(document, "x", i, m) for i, m in enumerate(made)], [document])
    assert all(map(equal, store.memories(store.chunks([1, 2, 3, 4])), made))


def test_documents_say_what_they_hold(store):
    with store.writer() as writer:
        add(writer, "a", "one two", "three", sha256="digest a")
        add(writer, "empty", sha256="digest b")
    document = store.document("a")
    assert (document.uri, document.sha256, document.metadata) == ("a", "digest a", {"title": "a"})
    assert (document.chunks, document.tokens, document.slots) == (2, 3, 6)
    assert document.nbytes == 2 * memory().nbytes
    assert [one.uri for one in store.documents()] == ["a", "empty"]
    assert store.digests() == {"a": "digest a", "empty": "digest b"}
    assert store.document("nowhere") is None
    counts = store.counts()
    assert (counts.documents, counts.chunks, counts.tokens, counts.slots) == (2, 2, 3, 6)
    assert counts.disk_bytes > counts.memory_bytes == document.nbytes


def test_chunks_keep_the_order_asked_for_and_skip_those_that_are_gone(store):
    with store.writer() as writer:
        add(writer, "a", "first", "second", "third")
    assert [one.text for one in store.chunks([3, 99, 1, 3])] == ["third", "first", "third"]
    assert store.chunk(2).ordinal == 1
    assert store.chunk(2**70) is None
    assert store.chunk_ids(["a", "b"]).tolist() == [1, 2, 3]


def test_a_document_is_invisible_until_it_is_finished(store):
    with store.writer() as writer:
        document = writer.begin("a", "1")
        writer.write([chunk(document, "early words", 0)])
        assert store.counts().documents == 0
        assert store.chunks([1]) == [] == store.matching("early", 5)
        assert nearest(store, "early words") == []
        writer.write([chunk(document, "late words", 1)], [document])
        assert store.document("a").chunks == 2
        assert nearest(store, "early words") == ["early words"]
        assert len(store.matching("words", 5)) == 2


def test_unfinished_documents_are_dropped_with_their_shards(store):
    with store.writer() as writer:
        document = writer.begin("a", "1")
        writer.write([chunk(document, "words")])
    assert store.counts().documents == 0
    assert list((store.path / "memories").iterdir()) == []


def test_a_new_version_replaces_the_old_one_at_once(store):
    with store.writer() as writer:
        add(writer, "a", "old words", "old more", sha256="1")
        add(writer, "b", "others")
        add(writer, "a", "new words", sha256="2")
        assert store.digests() == {"a": "2", "b": "1"}
        assert store.matching("old", 5) == []
        assert nearest(store, "old words", 5).count("old words") == 0
        assert nearest(store, "new words") == ["new words"]
        assert store.counts().chunks == 2


def test_removed_documents_are_gone_from_every_search(store):
    with store.writer() as writer:
        add(writer, "a", "alpha beta")
        add(writer, "b", "beta gamma")
        assert nearest(store, "alpha beta") == ["alpha beta"]
        assert writer.remove(["a", "nowhere"]) == 1
        assert nearest(store, "alpha beta", 5) == ["beta gamma"]
        assert [number for number, _ in store.matching("beta", 5)] == [2]
        assert writer.remove([]) == 0


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "remove", "compact", "begin", "reopen"]), st.sampled_from("abcd")),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=20, deadline=None)
def test_a_library_is_the_sum_of_what_was_done(steps):
    expected: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, create(Path(folder) / "library") as store:
        writer = store.writer()
        for number, (step, uri) in enumerate(steps):
            if step == "add":
                expected[uri] = f"{uri} {number}"
                add(writer, uri, expected[uri], f"{uri} twin", sha256=str(number))
            elif step == "remove":
                assert writer.remove([uri]) == (expected.pop(uri, None) is not None)
            elif step == "compact":
                writer.compact()
            elif step == "begin":
                writer.write([chunk(writer.begin(uri, "never"), "unfinished")])
            else:
                writer.close()
                writer = store.writer()
            assert {one.uri: one.chunks for one in store.documents()} == dict.fromkeys(expected, 2)
            assert len(nearest(store, "x", 99)) == 2 * len(expected)
            for name, text in expected.items():
                assert nearest(store, text) == [text]
                assert {one.uri for one in store.chunks(found for found, _ in store.matching(name, 9))} == {name}
                assert all(map(equal, store.memories(store.chunks(store.chunk_ids([name]))), (memory(0), memory(1))))
        writer.close()


def test_ids_are_never_used_again(store):
    with store.writer() as writer:
        add(writer, "a", "words")
        writer.remove(["a"])
        writer.compact()
    with store.writer() as writer:
        add(writer, "a", "words")
    assert store.chunk_ids(["a"]).tolist() == [2]


def test_compacting_frees_space_and_keeps_what_is_in_use(store):
    big = SoftPrompt(vectors=torch.randn(1000, 50), **STAMP)
    with store.writer() as writer:
        for uri in "abc":
            document = writer.begin(uri, "1")
            pair = [chunk(document, f"{uri} big", 0, big), chunk(document, f"{uri} small", 1, memory(ord(uri)))]
            writer.write(pair, [document])
        mixed = [writer.begin(uri, "1") for uri in "de"]
        writer.write([chunk(mixed[0], "d", 0, big), chunk(mixed[1], "e", 0, memory(5))], mixed)
        writer.remove(["a", "b", "d"])
        held = store.chunks(store.chunk_ids(["c", "e"]))
        assert writer.compact() > 3 * big.nbytes
        assert len(list((store.path / "memories").iterdir())) == 2
        # The chunks were looked up before the compaction moved the memory of "e".
        read = store.memories(held)
    assert equal(read[0], big)
    assert equal(read[1], memory(ord("c")))
    assert equal(read[2], memory(5))
    assert nearest(store, "e") == ["e"]


def test_a_memory_removed_meanwhile_is_an_error_that_says_so(store):
    with store.writer() as writer:
        add(writer, "a", "words")
        held = store.chunks([1])
        writer.remove(["a"])
        writer.compact()
    with pytest.raises(LibraryError, match="removed"):
        store.memories(held)


def test_a_memory_of_another_compressor_is_refused(store):
    alien = SoftPrompt(vectors=torch.zeros(1, 4), span=1, source_tokens=1, fingerprint="other")
    with store.writer() as writer:
        document = writer.begin("a", "1")
        with pytest.raises(FingerprintMismatch, match=f"{FINGERPRINT}.*other"):
            writer.write([chunk(document, "x", 0, alien)], [document])
        writer.write([chunk(document, "x")], [document])
    assert store.counts().documents == 1


@pytest.mark.parametrize("vector", [np.zeros(DIMENSION + 1), np.full(DIMENSION, np.nan), np.float32(1)])
def test_an_unusable_embedding_is_refused(store, vector):
    with store.writer() as writer:
        document = writer.begin("a", "1")
        with pytest.raises(InputError, match="embedding"):
            writer.write([NewChunk(document, 0, 0, 1, "x", 1, vector, memory())], [document])


def test_a_document_named_twice_as_finished_is_finished_once(store):
    with store.writer() as writer:
        document = writer.begin("a", "1")
        writer.write([chunk(document, "x")], [document, document])
    assert store.counts().documents == 1


def test_wrong_calls_are_refused_and_change_nothing(store):
    with store.writer() as writer:
        with pytest.raises(InputError, match="not begun"):
            writer.write([chunk(7, "x")])
        document = writer.begin("a", "1")
        with pytest.raises(InputError, match="ordinal"):
            writer.write([chunk(document, "x", 0), chunk(document, "y", 0)], [document])
        with pytest.raises(InputError, match="Unicode"):
            writer.write([chunk(document, "x"), NewChunk(document, 1, 0, 1, "\ud800", 1, embedding(""), memory())])
        with pytest.raises(InputError, match="Unicode"):
            writer.remove(["\udcff"])
        with pytest.raises(InputError, match="JSON"):
            writer.begin("b", "1", {"x": object()})
        assert list((store.path / "memories").iterdir()) == []
        writer.write([chunk(document, "x")], [document])
        with pytest.raises(InputError, match="finished already"):
            writer.write([chunk(document, "y", 1)])
    with pytest.raises(InputError, match="queries"):
        store.nearest(np.zeros(DIMENSION, np.float32), 1)
    assert store.counts().chunks == 1


def test_matching_ranks_by_words_and_can_be_restricted(store):
    with store.writer() as writer:
        add(writer, "a", "the lighthouse keeper", "the sea", "Lighthouses: lighthouse, LIGHTHOUSE", "caf\u00e9")
        add(writer, "b", "rain", "wind", "snow")
    found = store.matching('"lighthouse" (or lanterns)?', 10)
    assert [number for number, _ in found] == [3, 1]
    assert sorted((score for _, score in found), reverse=True) == [score for _, score in found]
    assert [number for number, _ in store.matching("lighthouse", 10, allowed=[1, 2])] == [1]
    assert [number for number, _ in store.matching("cafe", 10)] == [4]
    assert store.matching("lighthouse", 0) == [] == store.matching("lighthouse", 5, allowed=[])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    with create(tmp_path_factory.mktemp("words") / "library") as store:
        with store.writer() as writer:
            add(writer, "a", "alpha AND beta", "NEAR(gamma, 2) OR NOT alpha*", 'text: ^delta - "quoted"')
        yield store


@given(st.text(max_size=60) | st.text(alphabet="\"'*()^:-+{}AND ORNTEalph\x00", max_size=60))
@example('"')
@example("alpha AND")
@example("NEAR(alpha beta, 3)")
@example("text : alpha")
@example("alpha " * 5000)
@example(" ".join(f"word{i}" for i in range(5000)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_may_be_searched_for(words, query):
    found = words.matching(query, 10)
    assert {number for number, _ in found} <= {1, 2, 3}
    if "alpha" in query.lower().split():
        assert {1, 2} <= {number for number, _ in found}


def test_threads_may_share_a_store_and_a_writer(store):
    failures = []
    stop = threading.Event()

    def read():
        while not stop.is_set():
            try:
                ids, _ = store.nearest(embedding("text 1-0")[None], 5)
                chunks = store.chunks(ids[0])
                store.memories(chunks)
                store.matching("text", 3)
                sum(document.chunks for document in store.documents())
            except Exception as error:  # whatever it is, the test reports it
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    with store.writer() as writer:
        for reader in readers:
            reader.start()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda i: add(writer, f"doc {i}", f"text {i}-0", f"text {i}-1"), range(15)))
        stop.set()
        for reader in readers:
            reader.join()
    assert failures == []
    assert store.counts().chunks == 30
    assert nearest(store, "text 7-1") == ["text 7-1"]


def test_create_refuses_a_folder_in_use(store, tmp_path):
    with pytest.raises(LibraryError, match="there is a library"):
        create(store.path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(LibraryError, match="other files"):
        create(tmp_path / "used")
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["notes.txt"]
    with pytest.raises(LibraryError, match="is a file"):
        create(tmp_path / "used" / "notes.txt")


def test_create_takes_over_an_interrupted_creation(tmp_path):
    create(tmp_path / "library").close()
    (tmp_path / "library" / "manifest.json").unlink()
    with pytest.raises(LibraryError, match="no library"):
        Store.open(tmp_path / "library")
    create(tmp_path / "library").close()


@pytest.mark.parametrize(
    "arguments",
    [
        {"codec": "zip"},
        {"index": "Flat,Flat,Flat"},
        {"index": "PCA4,Flat"},
        {"compressor": {}},
        {"settings": {"x": object()}},
    ],
)
def test_create_refuses_what_it_does_not_know(tmp_path, arguments):
    with pytest.raises(InputError):
        create(tmp_path / "library", **arguments)
    create(tmp_path / "library").close()


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(LibraryError, match="does not exist"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(LibraryError, match="is no library"):
        Store.open(tmp_path)


def test_the_manifest_comes_back(tmp_path):
    compressor = {"fingerprint": FINGERPRINT, "name": "caf\u00e9"}
    create(tmp_path / "library", compressor=compressor, codec="int8", index="HNSW8", settings={"chunk": 5}).close()
    with Store.open(tmp_path / "library") as store:
        manifest = store.manifest
    assert manifest.compressor == compressor
    assert (manifest.codec, manifest.index, manifest.settings) == ("int8", "HNSW8", {"chunk": 5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ({"format": "other"}, "damaged"),
        ({"version": 2}, "newer"),
        ({"version": "1"}, "damaged"),
        ({"codec": "zip"}, "codec"),
        ({"compressor": {}}, "fingerprint"),
        ({"embedder": {"name": "x", "dimension": "8"}}, "dimension"),
        ({"settings": None}, "settings"),
    ],
)
def test_a_damaged_manifest_is_named(store, change, message):
    path = store.path / "manifest.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(LibraryError, match=message):
        Store.open(store.path)

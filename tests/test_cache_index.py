from __future__ import annotations

import os

import faiss
import numpy as np
import pytest

from ctxdocs.cache import NewChunk, Store
from ctxdocs.errors import LibraryError
from tests.cache_samples import DIMENSION, add, create, embedding, memory, nearest

TEXTS = [f"text {i}" for i in range(20)]


@pytest.fixture
def filled(tmp_path):
    path = tmp_path / "library"
    with create(path) as store, store.writer() as writer:
        add(writer, "a", *TEXTS[:10])
        add(writer, "b", *TEXTS[10:])
    return path


def check(path, texts=TEXTS):
    with Store.open(path) as store:
        for text in texts:
            assert nearest(store, text) == [text]
        assert len(nearest(store, "anything", 100)) == len(texts)


def fill(store: Store, uri: str, vectors: np.ndarray) -> None:
    with store.writer() as writer:
        document = writer.begin(uri, "1")
        one = memory()
        chunks = [NewChunk(document, i, 0, 1, "x", 1, vector, one) for i, vector in enumerate(vectors)]
        writer.write(chunks, [document])


def test_scores_are_cosines_best_first(filled):
    queries = np.stack([embedding("text 3") * 7, embedding("nothing")])
    with Store.open(filled) as store:
        ids, scores = store.nearest(queries, 20)
        stored = np.stack([embedding(chunk.text) for chunk in store.chunks(ids[1])])
    assert ids[0, 0] == 4
    assert scores[0, 0] == pytest.approx(1, abs=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    cosines = stored @ queries[1] / np.linalg.norm(stored, axis=1) / np.linalg.norm(queries[1])
    np.testing.assert_allclose(scores[1], cosines, atol=1e-6)


def test_k_may_exceed_what_there_is(filled, tmp_path):
    with Store.open(filled) as store:
        assert store.nearest(np.ones((2, DIMENSION), np.float32), 10**9)[0].shape == (2, 20)
        assert store.nearest(np.ones((2, DIMENSION), np.float32), 0)[0].shape == (2, 0)
    with create(tmp_path / "empty") as store:
        assert store.nearest(np.ones((2, DIMENSION), np.float32), 3)[0].shape == (2, 0)


def test_a_search_can_be_restricted(filled):
    with Store.open(filled) as store:
        allowed = store.chunk_ids(["b"])
        ids, _ = store.nearest(embedding("text 3")[None], 20, allowed=allowed)
        assert sorted(ids[0]) == sorted(allowed)
        assert store.nearest(embedding("text 3")[None], 5, allowed=[])[0].shape == (1, 0)
        assert store.nearest(embedding("text 3")[None], 5, allowed=[4, 999])[0][0].tolist()[0] == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no index"),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: faiss.write_index(faiss.IndexFlatIP(DIMENSION), str(path)),
        lambda path: faiss.write_index(faiss.IndexIDMap(faiss.IndexFlatIP(3)), str(path)),
    ],
    ids=["missing", "empty", "text", "truncated", "no ids", "wrong dimension"],
)
def test_an_unusable_index_is_built_from_the_shards(filled, damage):
    index = filled / "index.faiss"
    damage(index)
    before = index.read_bytes() if index.exists() else None
    check(filled)
    assert (index.read_bytes() if index.exists() else None) == before, "readers never write"
    with Store.open(filled) as store, store.writer():
        pass
    assert faiss.read_index(str(index)).ntotal == 20
    check(filled)


def test_a_stale_index_is_brought_up_to_date(filled):
    stale = (filled / "index.faiss").read_bytes()
    with Store.open(filled) as store, store.writer() as writer:
        writer.remove(["a"])
        add(writer, "c", "new text")
    (filled / "index.faiss").write_bytes(stale)
    check(filled, [*TEXTS[10:], "new text"])


def test_a_writer_that_changes_nothing_writes_no_index(filled):
    os.utime(filled / "index.faiss", (0, 0))
    with Store.open(filled) as store, store.writer():
        pass
    assert (filled / "index.faiss").stat().st_mtime == 0


def test_the_index_is_saved_when_an_exception_passes_through(filled):
    with Store.open(filled) as store, pytest.raises(KeyboardInterrupt), store.writer() as writer:
        add(writer, "c", "new text")
        raise KeyboardInterrupt
    assert faiss.read_index(str(filled / "index.faiss")).ntotal == 21
    check(filled, [*TEXTS, "new text"])


def test_flush_saves_the_index(filled):
    with Store.open(filled) as store, store.writer() as writer:
        add(writer, "c", "new text")
        writer.flush()
        assert faiss.read_index(str(filled / "index.faiss")).ntotal == 21


def test_a_reader_follows_a_writer(filled):
    with Store.open(filled) as reader, Store.open(filled) as other:
        assert nearest(reader, "text 1") == ["text 1"]
        with other.writer() as writer:
            add(writer, "c", "new text")
            assert nearest(reader, "new text") == ["new text"]
            writer.remove(["a"])
            assert "text 1" not in nearest(reader, "text 1", 50)
            writer.compact()
            add(writer, "d", "newest text")
            assert nearest(reader, "newest text") == ["newest text"]
            assert len(nearest(reader, "x", 50)) == 12


@pytest.mark.parametrize("factory", ["HNSW16", "IVF4,Flat"])
def test_other_kinds_of_index_find_add_and_remove(tmp_path, factory):
    vectors = np.random.default_rng(0).standard_normal((400, DIMENSION)).astype(np.float32)
    path = tmp_path / "library"
    with create(path, index=factory) as store:
        fill(store, "few", vectors[:10])
        assert store.nearest(vectors[:10], 1)[0][:, 0].tolist() == list(range(1, 11))
        fill(store, "many", vectors[10:])
        with Store.open(path) as again:
            found = again.nearest(vectors, 1)[0][:, 0]
        assert (found == np.arange(1, 401)).mean() > 0.95
        saved = faiss.read_index(str(path / "index.faiss"))
        assert isinstance(faiss.downcast_index(saved.index), (faiss.IndexHNSW, faiss.IndexIVF))
        with store.writer() as writer:
            writer.remove(["few"])
        for reader in (store, Store.open(path)):
            ids = reader.nearest(vectors[:10], 400)[0]
            assert ids.max() > 10
            assert not np.isin(ids, np.arange(1, 11)).any()
            allowed = reader.nearest(vectors[:1], 3, allowed=[1, 50, 60])[0]
            assert set(allowed[0].tolist()) <= {50, 60, -1}
        with store.writer() as writer:
            writer.compact()
        assert faiss.read_index(str(path / "index.faiss")).ntotal == 390
        assert (store.nearest(vectors[10:], 1)[0][:, 0] == np.arange(11, 401)).mean() > 0.95


def test_a_shard_that_is_missing_or_damaged_is_named(filled):
    with Store.open(filled) as store:
        chunk = store.chunk(1)
        shard = filled / "memories" / f"{chunk.shard_id:08d}.safetensors"
    (filled / "index.faiss").unlink()
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:100]), shard.unlink):
        damage()
        with Store.open(filled) as store:
            with pytest.raises(LibraryError, match=shard.name):
                store.memories([chunk])
            with pytest.raises(LibraryError, match=shard.name):
                nearest(store, "text 1")

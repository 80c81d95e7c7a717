import codecs
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctxdocs.corpus import Chunker, Document, file_digest, find_files, load_document
from ctxdocs.errors import DocumentError, InputError

PROSE = "The lighthouse keeper writes down the weather. Each evening he lights the lamp!\n\nNobody visits. "


def byte_level(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: several tokens may share one character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: whitespace makes no tokens."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {"bytes": byte_level(256), "bpe": byte_level(400), "words": words()}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param


def own_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def boundaries(text):
    return {0, *(cluster.end() for cluster in regex.finditer(r"\X", text))}


# --- chunks -----------------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        *"ab .,!\n\t\u0301\u200d\u0600\u3000\ud55c\u1112\u1161\u11ab\u0915\u094d\u3002\u6c34",
        "\r\n",
        "word ",
        " \u0301",
        "e\u0301\u0323",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea",
        "\U0001f44d\U0001f3fd",
        PROSE,
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.lists(pieces, max_size=40).map("".join) | st.text(max_size=60),
    name=st.sampled_from(sorted(TOKENIZERS)),
    chunk_tokens=st.integers(1, 60),
    overlap=st.floats(0, 0.99),
)
@example(text=PROSE * 20, name="bpe", chunk_tokens=48, overlap=0.2)
def test_chunks_cover_the_text_within_the_limit(text, name, chunk_tokens, overlap):
    tokenizer = TOKENIZERS[name]
    chunks = list(Chunker(tokenizer, chunk_tokens, int(overlap * chunk_tokens))(text))
    edges = boundaries(text)
    covered = 0
    for ordinal, chunk in enumerate(chunks):
        assert chunk.ordinal == ordinal
        assert chunk.text == text[chunk.start : chunk.end]
        assert chunk.text.strip()
        assert 0 < len(chunk.ids) <= chunk_tokens
        assert not text[covered : chunk.start].strip()
        covered = max(covered, chunk.end)
        if len(chunk.text) > 1:
            assert chunk.ids == own_ids(tokenizer, chunk.text)
        for edge in {chunk.start, chunk.end} - edges:
            # Only a cluster longer than a whole chunk is cut.
            low = max(e for e in edges if e < edge)
            high = min(e for e in edges if e > edge)
            assert len(own_ids(tokenizer, text[low:high])) > chunk_tokens
    tail = text[covered:]
    # Characters the tokenizer drops altogether cannot be in a chunk of their own.
    assert not tail.strip() or not own_ids(tokenizer, tail)


def test_chunks_overlap_and_begin_at_words(tokenizer):
    text = " ".join(f"word{i}" for i in range(300))
    chunks = list(Chunker(tokenizer, 64, 16)(text))
    assert len(chunks) > 3
    for before, after in pairwise(chunks):
        assert before.end < after.end
        shared = text[after.start : before.end]
        assert 8 <= len(own_ids(tokenizer, shared)) <= 16
        assert text[after.start - 1] == " " and text[before.end] == " "


def test_no_overlap_repeats_nothing(tokenizer):
    text = PROSE * 10
    chunks = list(Chunker(tokenizer, 50, 0)(text))
    assert "".join("".join(chunk.text.split()) for chunk in chunks) == "".join(text.split())


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        ("b b b b\n\nb b. b b b b", "b b b b"),
        ("b b b b. b b b b b b", "b b b b."),
        ("bbbb bbbb bbbb bbbbbb", "bbbb bbbb bbbb"),
    ],
    ids=["paragraph", "sentence", "word"],
)
def test_chunk_ends_at_the_best_break(tail, end):
    head = "a" * 79 + " "
    first = next(Chunker(TOKENIZERS["bytes"], 102, 0)(head + tail + "b" * 100))
    assert first.text == head + end


def test_long_text_is_chunked_lazily_across_windows(tokenizer):
    text = PROSE * 12_000  # over a million characters: several windows
    chunks = Chunker(tokenizer, 256, 0)(text)
    first = next(chunks)
    assert first.start == 0
    covered = first.end
    sizes = []
    for chunk in chunks:
        assert not text[covered : chunk.start].strip()
        covered = chunk.end
        sizes.append(len(chunk.ids))
    assert not text[covered:].strip()
    # No chunk but the last is cut short by a window's end.
    assert min(sizes[:-1]) > 128


def test_tokenizer_sees_a_bounded_part_of_the_text():
    class Recorder:
        is_fast = True
        longest = 0

        def __call__(self, texts, **options):
            self.longest = max(self.longest, sum(map(len, texts)))
            return TOKENIZERS["words"](texts, **options)

    text = PROSE * 12_000
    recorder = Recorder()
    assert sum(1 for _ in Chunker(recorder)(text)) > 10
    assert recorder.longest < len(text) * 0.7


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000"])
def test_blank_text_has_no_chunks(tokenizer, text):
    assert list(Chunker(tokenizer)(text)) == []


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-1, 0), (8, 8), (8, -1)])
def test_chunker_refuses_impossible_sizes(tokenizer, size, overlap):
    with pytest.raises(InputError, match="must"):
        Chunker(tokenizer, size, overlap)


def test_chunker_refuses_slow_tokenizers():
    with pytest.raises(InputError, match="offsets"):
        Chunker(object())


# --- files ------------------------------------------------------------------------------------------------------


def names(sources):
    return [source.path.name for source in sources]


def test_find_files_walks_sorted_and_skips_hidden(tmp_path):
    for name in ("b.md", "a.txt", "c.png", ".hidden.md", "sub/d.HTML", ".git/e.md", "sub/.f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    sources = find_files(tmp_path)
    assert names(sources) == ["a.txt", "b.md", "d.HTML"]
    assert sources[0].uri == (tmp_path / "a.txt").resolve().as_posix()
    assert names(find_files([tmp_path], suffixes=[".MD"])) == ["b.md"]


def test_find_files_lists_each_file_once(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "a.md"
    file.write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.md").symlink_to(file)
    (tmp_path / "broken.md").symlink_to(tmp_path / "nowhere.md")
    monkeypatch.chdir(tmp_path)
    assert names(find_files(["sub/a.md", tmp_path, str(file)])) == ["a.md"]


def test_find_files_takes_named_files_of_any_suffix(tmp_path):
    file = tmp_path / ".notes"
    file.write_text("x")
    assert names(find_files(file)) == [".notes"]
    assert find_files(tmp_path) == []


def test_find_files_refuses_what_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        find_files([tmp_path, tmp_path / "nowhere"])


# --- documents --------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_text_document(tmp_path):
    path = written(tmp_path, "a.md", b"# Title\r\n\r\nBody\r\n")
    document = load_document(path)
    assert document.text == "# Title\n\nBody\n"
    assert document.uri == path.resolve().as_posix()
    assert document.sha256 == file_digest(path)
    assert document.metadata == {"format": "markdown", "bytes": 17}
    assert load_document(find_files(path)[0]) == document


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("naïve café".encode(), "naïve café", None),
        (codecs.BOM_UTF8 + "é".encode(), "é", None),
        ("é".encode("utf-16"), "é", "utf-16-le"),
        (codecs.BOM_UTF32_LE + "é".encode("utf-32-le"), "é", "utf-32-le"),
        ("naïve café".encode("latin-1"), "naïve café", "cp1252"),
        ("Привет, мир! Это короткий текст на русском языке.".encode("cp1251"), None, "cp1251"),
    ],
)
def test_decoding(tmp_path, data, text, encoding):
    document = load_document(written(tmp_path, "a.txt", data))
    assert document.metadata.get("encoding") == encoding
    assert document.text == (text or data.decode(encoding))


HTML = """<html><head><title> A
 page </title><style>p {}</style><body><nav>Home</nav><h1>Head <b>line</b></h1>
<p>One
two.<p>Three<br>four</p><script>var x</script><!-- note -->
<ul><li>a<li>b</ul><pre>if x:
    <i>y</i></pre><table><tr><th>k<th>v<tr><td>1</td><td><p>2</p></td></table>end</body></html>"""


def test_html_document(tmp_path):
    document = load_document(written(tmp_path, "a.html", HTML.encode()))
    assert document.metadata["title"] == "A page"
    assert document.text == ("Head line\n\nOne two.\n\nThree\nfour\n\na\nb\n\nif x:\n    y\n\nk | v\n1 | 2\n\nend")


def test_html_declared_encoding(tmp_path):
    page = '<meta charset="koi8-r"><p>Привет</p>'.encode("koi8-r")
    assert load_document(written(tmp_path, "a.htm", page)).text == "Привет"


def pdf_bytes(*pages: str, password: str | None = None) -> bytes:
    fpdf = pytest.importorskip("fpdf")
    pdf = fpdf.FPDF()
    pdf.set_title("Report")
    pdf.set_font("Helvetica", size=12)
    if password is not None:
        pdf.set_encryption(owner_password="owner", user_password=password)
    for page in pages:
        pdf.add_page()
        if page:
            pdf.multi_cell(0, text=page)
    return bytes(pdf.output())


def test_pdf_document(tmp_path):
    pytest.importorskip("pypdf")
    document = load_document(written(tmp_path, "a.pdf", pdf_bytes("First page.", "Second page.")))
    assert document.text == "First page.\n\nSecond page."
    assert document.metadata["pages"] == 2
    assert document.metadata["title"] == "Report"


def test_pdf_that_only_forbids_printing_is_read(tmp_path):
    pytest.importorskip("pypdf")
    document = load_document(written(tmp_path, "a.pdf", pdf_bytes("Open.", password="")))
    assert document.text == "Open."


def test_docx_document(tmp_path):
    docx = pytest.importorskip("docx")
    word = docx.Document()
    word.core_properties.title = "Minutes"
    word.add_heading("Agenda", 1)
    word.add_paragraph("Before the table.")
    table = word.add_table(2, 2)
    for cell, text in zip((cell for row in table.rows for cell in row.cells), "abcd", strict=True):
        cell.text = text
    word.add_paragraph("After it.")
    word.save(tmp_path / "a.docx")
    document = load_document(tmp_path / "a.docx")
    assert document.text == "Agenda\n\nBefore the table.\n\na | b\nc | d\n\nAfter it."
    assert document.metadata["title"] == "Minutes"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t ", "no text"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\x00\x01", "binary"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a", "utf-16"),
        ("a.txt", bytes(range(1, 256)) * 8, "binary"),
        ("a.html", b"<script>only()</script>", "no text"),
        ("a.xyz", b"\xd0\xcf\x11\xe0\x00", "formats read"),
        ("a.txt", b"x" * 101, "larger than 100 bytes"),
    ],
)
def test_unusable_files(tmp_path, name, data, reason):
    path = written(tmp_path, name, data)
    with pytest.raises(DocumentError, match=reason) as caught:
        load_document(path, max_bytes=100 if "larger" in reason else 10_000)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("suffix", [".pdf", ".docx"])
def test_damaged_documents(tmp_path, suffix):
    pytest.importorskip("pypdf")
    pytest.importorskip("docx")
    with pytest.raises(DocumentError, match="damaged"):
        load_document(written(tmp_path, "a" + suffix, b"%PDF-1.7 broken PK"))


@pytest.mark.parametrize(("suffix", "package"), [(".pdf", "pypdf"), (".docx", "docx")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DocumentError, match="needs") as caught:
        load_document(written(tmp_path, "a" + suffix, b"x"))
    assert caught.value.hint == "pip install 'ctxdocs[docs-formats]'"


def test_truncated_pdf(tmp_path):
    pytest.importorskip("pypdf")
    data = pdf_bytes("text " * 200)
    with pytest.raises(DocumentError):
        load_document(written(tmp_path, "a.pdf", data[: len(data) // 3]))


def test_encrypted_and_scanned_pdf(tmp_path):
    pytest.importorskip("pypdf")
    with pytest.raises(DocumentError, match="encrypted"):
        load_document(written(tmp_path, "locked.pdf", pdf_bytes("Secret.", password="secret")))
    with pytest.raises(DocumentError, match="no text"):
        load_document(written(tmp_path, "scan.pdf", pdf_bytes("")))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = written(tmp_path, "a.txt", b"x")
    path.chmod(0)
    with pytest.raises(DocumentError, match="cannot be read"):
        load_document(path)


def test_missing_file(tmp_path):
    for read in (load_document, file_digest):
        with pytest.raises(DocumentError, match="cannot be read"):
            read(tmp_path / "a.txt")


def test_large_text_file(tmp_path):
    path = written(tmp_path, "a.txt", PROSE.encode() * (20 * 2**20 // len(PROSE)))
    document = load_document(path)
    first = next(Chunker(TOKENIZERS["words"])(document.text))
    assert document.text.startswith(first.text)


def test_document_from_text():
    document = Document.from_text("Text.", uri="note:1", metadata={"author": "A"})
    assert document.metadata == {"author": "A"}
    assert document.sha256 == Document.from_text("Text.", uri="note:2").sha256
    assert document.sha256 != Document.from_text("Other.", uri="note:1").sha256


@pytest.mark.parametrize("text", ["", "  \n", "broken \ud800 text"])
def test_document_from_unusable_text(text):
    with pytest.raises(InputError, match="note"):
        Document.from_text(text, uri="note")

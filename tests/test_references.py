"""References to memories: nobody forges them, and they are good where the same library is open."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

import ctxdocs.references as module
from ctxdocs.errors import InputError, LibraryError
from ctxdocs.references import References


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return library


@pytest.fixture
def hits(library):
    return library.search("ferry gauge lighthouse", k=3)


@pytest.fixture
def references(library):
    return References(library.store)


def test_a_text_is_taken_apart_at_its_references(references, hits):
    one, two = (references.write(hit) for hit in hits[:2])
    parts = references.read(f"Read {one}{two} and {one}.")
    assert [part if isinstance(part, str) else part.id for part in parts] == [
        "Read ",
        hits[0].id,
        hits[1].id,
        " and ",
        hits[0].id,
        ".",
    ]
    assert references.read("") == []
    assert references.read("plain") == ["plain"]
    assert references.read(one)[0].text == hits[0].text


def test_a_reference_survives_templates_and_json(references, hits):
    import json

    from langchain_core.prompts import PromptTemplate

    reference = references.write(hits[0])
    assert json.loads(json.dumps(reference)) == reference == json.dumps(reference).strip('"')
    for template, kind in (("<{x}>", "f-string"), ("<{{ x }}>", "jinja2"), ("<{{x}}>", "mustache")):
        if kind == "jinja2":
            pytest.importorskip("jinja2")
        made = PromptTemplate.from_template(template, template_format=kind).format(x=reference)
        assert made == f"<{reference}>"


def altered(reference: str) -> list[str]:
    """References that somebody without the key might try."""
    inner = reference.strip("[]")
    kind, number, digest, signature = inner.split(":")
    other = "0" if signature[0] != "0" else "1"
    return [
        f"[[{kind}:{int(number) + 1}:{digest}:{signature}]]",
        f"[[{kind}:{number}:{digest}:{other}{signature[1:]}]]",
        f"[[{kind}:{number}:{'0' * 16}:{signature}]]",
        f"[[{kind}:0{number}:{digest}:{signature}]]",
        f"[[{kind}:{number}:{digest}:{signature.upper()}]]" if signature.upper() != signature else "[[memory]]",
        f"[[{kind}:{number}:{digest}:{signature[:-1]}]]",
        f"[[{kind}:{number}:{digest}:{signature}]",
        f"[[{kind}:{number}:{digest}:]]",
        f"[[{kind}:{number}]]",
        f"[[{kind}:{'9' * 40}:{digest}:{signature}]]",
        f"[[{kind}:\u0661:{digest}:{signature}]]",
        f"[[ {kind}:{number}:{digest}:{signature} ]]",
    ]


def test_what_imitates_a_reference_stays_text(references, hits):
    for forged in altered(references.write(hits[0])):
        assert references.read(f"see {forged}") == [f"see {forged}"]


def test_the_right_form_with_a_wrong_signature_is_noted(references, hits, caplog):
    forged = altered(references.write(hits[0]))[0]
    with caplog.at_level(logging.WARNING, "ctxdocs.references"):
        references.read(forged + forged)
    assert "looks like 2 references" in caplog.text


def test_a_reference_that_was_cut_is_noted(references, hits, caplog):
    whole = references.write(hits[0])
    with caplog.at_level(logging.WARNING, "ctxdocs.references"):
        assert len(references.read(f"{whole} and {whole}")) == 3
        assert not caplog.text
        assert references.read(f"{whole} {whole[:40]}")[1:] == [f" {whole[:40]}"]
    assert "begins like a reference to a memory and goes on otherwise (1)" in caplog.text


def test_a_chunk_that_is_gone_is_an_error(library, references, hits):
    reference = references.write(hits[0])
    library.remove(hits[0].document)
    with pytest.raises(LibraryError, match=f"chunk {hits[0].id}, which is no longer in the library.*search again"):
        references.read(reference)


def test_a_chunk_with_another_text_is_not_the_one_referred_to(references, hits):
    from dataclasses import replace

    with pytest.raises(LibraryError, match="no longer in the library"):
        references.read(references.write(replace(hits[0], text="another text")))


def test_another_library_of_the_process_is_told_apart(references, hits, make_library, corpus):
    other = make_library("other")
    other.add(corpus)
    with pytest.raises(InputError, match=r"memory of the library .*/library, and is read by .*/other"):
        References(other.store).read(references.write(hits[0]))


def test_another_library_of_another_process_is_text(references, hits, make_library, corpus, monkeypatch):
    reference = references.write(hits[0])
    monkeypatch.setattr(module, "_keys", {})
    other = make_library("other")
    other.add(corpus)
    assert References(other.store).read(reference) == [reference]


def test_another_process_reads_the_references_of_the_same_library(library, references, hits):
    code = (
        "import sys; from ctxdocs.cache import Store; from ctxdocs.references import References\n"
        "print([part.id for part in References(Store.open(sys.argv[1])).read(sys.argv[2])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library.path), references.write(hits[1])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"[{hits[1].id}]"


def test_the_key_is_its_owners_alone(library, references):
    path = library.path / "references.key"
    assert len(path.read_bytes()) == 32
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in library.path.iterdir() if entry.name.endswith(".tmp")] == []


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_a_key_that_others_can_read_is_noted(library, references, caplog):
    References(library.store)
    assert "can be read by others" not in caplog.text
    (library.path / "references.key").chmod(0o644)
    References(library.store)
    assert "references.key can be read by others" in caplog.text


def test_keys_differ_from_library_to_library_and_stay(library, references, make_library):
    other = make_library("other")
    References(other.store)
    key = (library.path / "references.key").read_bytes()
    assert key != (other.path / "references.key").read_bytes()
    References(library.store)
    assert key == (library.path / "references.key").read_bytes()


def test_a_key_that_another_process_wrote_meanwhile_stays(library, monkeypatch):
    path = library.path / "references.key"
    make = module._make_key

    def late(wanted):
        path.write_bytes(b"x" * 32)
        make(wanted)

    monkeypatch.setattr(module, "_make_key", late)
    References(library.store)
    assert path.read_bytes() == b"x" * 32


def test_a_damaged_key_is_refused(library):
    (library.path / "references.key").write_bytes(b"short")
    with pytest.raises(LibraryError, match=r"references\.key is damaged.*delete it"):
        References(library.store)


def test_where_no_key_can_be_kept_references_are_good_within_the_process(library, hits, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "_make_key", refuse)
    one, two = References(library.store), References(library.store)
    assert two.read(one.write(hits[0]))[0].id == hits[0].id
    assert not (library.path / "references.key").exists()
    monkeypatch.setattr(module, "_process_key", b"another process".ljust(32))
    monkeypatch.setattr(module, "_keys", {})
    assert References(library.store).read(one.write(hits[0])) == [one.write(hits[0])]


def test_a_library_with_a_key_is_added_to_compacted_and_opened_as_before(library, references, corpus):
    from ctxdocs.cache import Store

    library.remove(corpus / "ferry.txt")
    library.compact()
    library.add(corpus)
    assert Store.open(library.path).counts().documents == 3

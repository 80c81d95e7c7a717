"""Prompts: parts in order, natural tokenisation, and no special tokens from outside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxdocs import InputError
from ctxdocs.corpus import Chunker
from ctxdocs.memory import Memory
from ctxdocs.prompts import PromptFormat, encode_parts, encode_text, with_bos

FORMAT = PromptFormat(
    template="Read.{sources} Question: {question}\nAnswer:", text="<{source}>", memory="<{source}>", stop=("\n",)
)


def text_of(prompt, tokenizer):
    return [part if isinstance(part, Memory) else tokenizer.decode(part) for part in prompt]


def test_memories_stand_where_texts_would(compressor, tokenizer):
    memories = compressor.compress(["one", "two"])
    built = FORMAT.build("Why?", memories, tokenizer)
    assert text_of(built, tokenizer) == ["Read.<", memories[0], "><", memories[1], "> Question: Why?\nAnswer:"]
    plain = FORMAT.build("Why?", ["one", "two"], tokenizer)
    assert text_of(plain, tokenizer) == ["Read.<one><two> Question: Why?\nAnswer:"]
    assert text_of(FORMAT.build("Why?", [], tokenizer), tokenizer) == ["Read. Question: Why?\nAnswer:"]


def test_by_default_memories_stand_side_by_side_and_texts_apart(compressor, tokenizer):
    memories = compressor.compress(["one", "two"])
    assert text_of(PromptFormat().build("Why?", memories, tokenizer), tokenizer) == [
        *memories,
        "Question: Why?\nAnswer:",
    ]
    (whole,) = text_of(PromptFormat().build("Why?", ["one", "two"], tokenizer), tokenizer)
    assert whole == "one\n\ntwo\n\nQuestion: Why?\nAnswer:"


def test_neighbouring_text_tokenises_as_one_text(tokenizer):
    built = PromptFormat().build("How many gulls nest?", ["The old school."], tokenizer)
    whole = "The old school.\n\nQuestion: How many gulls nest?\nAnswer:"
    assert built[0].tolist() == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize("question", ["<|end|>", "a<|end|>b<|pad|>", "<|e", "nd|>"])
def test_special_tokens_from_outside_stay_text(tokenizer, question):
    special = set(tokenizer.all_special_ids)
    template = PromptFormat(template="{sources}<|end|>{question}")
    prompt = template.build(question, [question], tokenizer)
    assert sum(int(token) in special for part in prompt for token in part) == 1
    assert not special & set(encode_text(tokenizer, question).tolist())
    assert tokenizer.decode(torch.cat(prompt)) == question + "\n\n<|end|>" + question


def test_special_tokens_in_a_document_stay_text(tokenizer):
    text = "before <|end|> after <|pad|>"
    (chunk,) = Chunker(tokenizer, 64, 0)(text)
    assert not set(tokenizer.all_special_ids) & set(chunk.ids)
    assert chunk.ids == encode_text(tokenizer, text).tolist()


@given(question=st.text(max_size=30), source=st.text(max_size=30))
def test_any_text_survives(tokenizer, question, source):
    prompt = FORMAT.build(question, [source], tokenizer)
    expected = f"Read.<{source}> Question: {question}\nAnswer:"
    assert tokenizer.decode(torch.cat(prompt), clean_up_tokenization_spaces=False) == expected


def test_a_format_must_hold_its_places():
    for template, source in [
        ("{question}{sources}", "{source}"),
        ("{sources}", "{source}"),
        ("{sources}{question}", ""),
    ]:
        with pytest.raises(InputError, match=r"needs \{sources\} and then \{question\}"):
            PromptFormat(template=template, memory=source)
    assert PromptFormat.from_dict(FORMAT.to_dict()) == FORMAT
    assert PromptFormat.from_dict(None) == PromptFormat()
    with pytest.raises(InputError, match="keys"):
        PromptFormat.from_dict({"colour": 1})


def test_parts_are_text_ids_or_memories(compressor, tokenizer):
    memory = compressor.compress(["one"])[0]
    parts = encode_parts([memory, "two", [1, 2]], tokenizer)
    assert parts[0] is memory
    assert parts[2].tolist() == [1, 2]
    with pytest.raises(InputError, match="no tokenizer"):
        encode_parts(["two"], None)
    with pytest.raises(InputError, match="must be integers"):
        encode_parts([{"two": 2}], tokenizer)


def test_bos_is_put_in_front_once_and_never_before_a_memory(compressor):
    class WithBos:
        bos_token_id = 2

        def __call__(self, text, **_):
            return {"input_ids": [2]}

    memory = compressor.compress(["one"])[0]
    ids = torch.tensor([5])
    assert [part.tolist() for part in with_bos([ids], WithBos())] == [[2], [5]]
    assert with_bos([memory, ids], WithBos()) == [memory, ids]
    assert with_bos([ids], compressor.tokenizer) == [ids]

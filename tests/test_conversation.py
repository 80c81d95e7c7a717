"""Conversations over sessions, alone and with a library."""

from __future__ import annotations

import copy

import pytest

from ctxdocs import InputError, generation
from ctxdocs.chat_format import ChatFormat
from ctxdocs.conversation import Conversation
from ctxdocs.prompts import encode_text

from .conftest import tiny_autocompressor, tiny_gist

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    """A tokenizer with a chat template."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHATML
    return chatty


def whole(pieces):
    """Exhaust a generator; return the text it yielded and its value."""
    text = []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            return "".join(text), end.value


def heard(conversation, monkeypatch):
    """Record all ids that the conversation's session is fed."""
    fed = []
    read = conversation.session._read

    def recording(ids, **options):
        fed.extend(ids.tolist())
        return read(ids, **options)

    monkeypatch.setattr(conversation.session, "_read", recording)
    return fed


def test_a_plain_model_is_asked_turn_after_turn(compressor, monkeypatch):
    conversation = Conversation(compressor, max_new_tokens=5, stop=())
    fed = heard(conversation, monkeypatch)
    text, answer = whole(conversation.ask("Who built it?"))
    assert text.strip() == answer.text
    first = list(fed)
    assert compressor.tokenizer.decode(first[: answer.prompt_tokens]) == "Question: Who built it?\nAnswer:"
    assert len(first) == answer.prompt_tokens + 5  # the answer is part of the context
    whole(conversation.ask("When?"))
    assert compressor.tokenizer.decode(fed[len(first) : -5]) == "\n\nQuestion: When?\nAnswer:"
    assert [turn["question"] for turn in conversation.turns] == ["Who built it?", "When?"]
    assert conversation.memory().source_tokens == conversation.session.tokens_seen == len(fed)
    conversation.reset()
    assert (conversation.turns, conversation.memory()) == ([], None)


def test_a_system_text_is_read_as_it_stands(make_library, corpus, monkeypatch):
    library = make_library()
    library.add(corpus)
    system = "Say {question} and {sources}."
    read = []
    stream = generation.stream
    monkeypatch.setattr(
        generation, "stream", lambda reader, prompt, *rest: read.append(prompt) or stream(reader, prompt, *rest)
    )
    whole(Conversation(library.compressor, library, k=1, system=system, max_new_tokens=1).ask("Who built it?"))
    ((first, *_, last),) = read
    decode = library.compressor.tokenizer.decode
    assert system in decode(first)
    assert decode(last).endswith("Question: Who built it?\nAnswer:")


def test_a_chat_template_is_followed_to_the_letter(chatty, monkeypatch):
    compressor = tiny_gist(tokenizer=chatty)
    conversation = Conversation(compressor, system="Be brief.", max_new_tokens=4, eos_token_ids=())
    fed = heard(conversation, monkeypatch)
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("Who?", "When <|end|> then?", "Why?"):
        messages.append({"role": "user", "content": question})
        start = len(fed)
        _, answer = whole(conversation.ask(question))
        messages.append({"role": "assistant", "content": chatty.decode(fed[start + answer.prompt_tokens :])})
    expected = chatty.apply_chat_template(messages, tokenize=False).removesuffix("<|im_end|>\n")
    assert chatty.decode(fed) == expected
    # What looks like a special token in a question is text.
    assert chatty.eos_token_id not in fed


def test_templates_that_cannot_be_used_are_refused(chatty):
    chatty.chat_template = "{{ raise_exception('no system text') }}"
    with pytest.raises(InputError, match="chat template cannot be used: no system text"):
        ChatFormat.of(tiny_gist(tokenizer=chatty), "Be brief.")
    chatty.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(InputError, match="does not keep the texts of a conversation"):
        ChatFormat.of(tiny_gist(tokenizer=chatty))
    with pytest.raises(InputError, match="needs a tokenizer"):
        ChatFormat.of(tiny_gist())


def test_over_a_library_the_history_is_a_memory_and_sources_do_not_enter_it(make_library, corpus, monkeypatch):
    library = make_library()
    library.add(corpus)
    conversation = Conversation(library.compressor, library, k=2, max_new_tokens=4, stop=())
    fed = heard(conversation, monkeypatch)
    _, first = whole(conversation.ask("When was the lighthouse built?"))
    assert len(first.sources) == 2
    assert first.memory_slots == sum(hit.slots for hit in first.sources)
    text = library.compressor.tokenizer.decode(fed)
    assert text == f"Question: When was the lighthouse built?\nAnswer:{first.text}"
    history = conversation.memory()
    _, second = whole(conversation.ask("And the ferry?"))
    assert second.memory_slots == history.slots + sum(hit.slots for hit in second.sources)
    expected = encode_text(library.compressor.tokenizer, "\n\nQuestion: And the ferry?\nAnswer:")
    assert second.prompt_tokens == len(expected)


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(make_library, corpus):
    library = make_library()
    library.add(corpus)
    for conversation in (Conversation(library.compressor, library), Conversation(library.compressor)):
        pieces = conversation.ask("Who?")
        piece = next(pieces)
        pieces.close()
        assert conversation.turns == [{"question": "Who?", "answer": piece.strip()}]
        seen = conversation.session.tokens_seen
        assert seen > 0
        whole(conversation.ask("Where?"))
        assert len(conversation.turns) == 2


def test_a_conversation_is_saved_and_gone_on_with(compressor, tmp_path):
    conversation, again = Conversation(compressor, max_new_tokens=6), Conversation(compressor, max_new_tokens=6)
    whole(conversation.ask("Who built it?"))
    conversation.save(tmp_path / "c.safetensors")
    again.load(tmp_path / "c.safetensors")
    assert again.turns == conversation.turns
    assert whole(again.ask("When?"))[0] == whole(conversation.ask("When?"))[0]


def test_wrong_questions_leave_the_history_alone(tokenizer):
    small = tiny_autocompressor(tokenizer=tokenizer, max_position_embeddings=64, segment_tokens=40)
    conversation = Conversation(small, max_new_tokens=4)
    whole(conversation.ask("Who?"))
    seen, turns = conversation.session.tokens_seen, list(conversation.turns)
    with pytest.raises(InputError, match="the question is empty"):
        conversation.ask("  ")
    with pytest.raises(InputError, match="more than the model's 64"):
        whole(conversation.ask("word " * 5000))
    assert (conversation.session.tokens_seen, conversation.turns) == (seen, turns)
    with pytest.raises(InputError, match="unknown option"):
        Conversation(small, beams=3)

"""Chat templates of instruction-tuned models: what is asked stands where the template puts a user's text."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ctxdocs import InputError, Library
from ctxdocs.compressors.kvzip import KVzip
from ctxdocs.conversation import Conversation
from ctxdocs.prompts import encode_text

from .conftest import TEXT, FakeEmbedder, tiny_gist, tiny_kv, tiny_model
from .test_conversation import heard, whole

SOURCE = "The ferry sails twice a day."
OTHER = "The tide gauge stands on the north pier."
QUESTION = "How often does it sail?"

#: Templates as the families write them, with the special tokens they use; and whether spaces belong to words.
FAMILIES = {
    "qwen": (
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + "
        "'<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if message.role != 'system' %}{{- '<|im_start|>' + message.role + '\n' + "
        "message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        ["<|im_start|>", "<|im_end|>"],
        None,
    ),
    "llama-3": (
        "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
    ),
    "mistral": (
        "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{- '[INST] ' + "
        "message['content'] + '[/INST]' }}{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + "
        "eos_token }}{%- else %}{{- raise_exception('Only user and assistant roles') }}{%- endif %}{%- endfor %}",
        ["[INST]", "[/INST]"],
        "<s>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
        "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<bos>",
    ),
}
WITHOUT_SYSTEM = ("mistral", "gemma")


@functools.cache
def tokenizer_of(family):
    """A tokenizer of 400 tokens with a family's template; that of Mistral puts a space in front of texts."""
    template, special, bos = FAMILIES[family]
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    if family == "mistral":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        bpe.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.?:,<|>\n▁"))
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    front = [bos] if bos else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", *front, *special], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token="<|end|>", additional_special_tokens=special
    )
    made.chat_template = template
    return made


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(family):
    return tokenizer_of(family)


@pytest.fixture
def exact(tokenizer):
    return tiny_kv("kv", tokenizer)


def templated(tokenizer, user_text, **options):
    messages = [{"role": "user", "content": user_text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]


def built(compressor, sources, question=QUESTION):
    return compressor.prompt_format.build(question, sources, compressor.tokenizer, compressor.prefix_ids)


def test_texts_are_asked_as_the_template_would_have_it(exact, tokenizer):
    assert exact.prefix == "chat"
    for sources in ([], [SOURCE], [SOURCE, OTHER]):
        expected = templated(tokenizer, "\n\n".join([*sources, QUESTION]))
        (ids,) = built(exact, sources)
        assert ids.tolist() == expected
        assert expected.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)
    trained = tiny_gist(tokenizer=tokenizer)
    assert torch.cat(built(trained, [SOURCE])).tolist() == templated(tokenizer, f"{SOURCE}\n\n{QUESTION}")


def test_an_exact_memory_behind_the_header_reads_as_the_text(exact, tokenizer):
    memory = exact.compress([SOURCE])[0]
    prompt = built(exact, [memory])
    assert [prompt[0] is exact.prefix_ids, prompt[1] is memory, len(prompt)] == [True, True, 3]
    text = torch.cat([prompt[0], encode_text(tokenizer, SOURCE), prompt[2]])
    assert text.tolist() == templated(tokenizer, f"{SOURCE}\n\n{QUESTION}")
    assert exact.model_input(prompt).place.eq(0).all()  # nothing needs a mask
    read, _ = exact.prefill([prompt])
    expected = exact.model(text[None]).logits[:, -1]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)


def test_memories_stand_side_by_side(exact):
    memories = exact.compress([SOURCE, OTHER])
    prompt = built(exact, memories)
    assert prompt[:3] == [exact.prefix_ids, *memories]
    assert exact.tokenizer.decode(prompt[3]).lstrip().startswith(QUESTION)


def test_generation_from_text_takes_a_turn(exact, tokenizer):
    options = {"max_new_tokens": 6, "eos_token_ids": ()}
    ids = templated(tokenizer, QUESTION)
    expected = tokenizer.decode(exact.generate_ids(ids, **options), skip_special_tokens=True)
    assert exact.generate(QUESTION, **options) == expected
    # Who writes the header, writes everything.
    assert exact.generate([ids], **options) == expected


def test_a_library_is_asked_in_the_template(exact, tokenizer, tmp_path):
    (tmp_path / "c").mkdir()
    for number, text in enumerate((SOURCE, OTHER)):
        (tmp_path / "c" / f"{number}.txt").write_text(text, encoding="utf-8")
    library = Library.create(tmp_path / "l", exact, FakeEmbedder(), chunk_tokens=64, overlap_tokens=4)
    library.add(tmp_path / "c")
    options = {"k": 1, "max_new_tokens": 6, "eos_token_ids": ()}
    in_text = library.ask("How often does the ferry sail?", mode="text", **options)
    in_memory = library.ask("How often does the ferry sail?", **options)
    source = in_text.sources[0].text
    assert in_text.prompt_tokens == len(templated(tokenizer, f"{source}\n\nHow often does the ferry sail?"))
    assert in_memory.prompt_tokens + in_memory.memory_slots == in_text.prompt_tokens
    assert in_memory.text == in_text.text
    (again,) = library.ask_many(["How often does the ferry sail?"], **options)
    stream = library.stream("How often does the ferry sail?", **options)
    assert again.text == in_memory.text == "".join(stream).strip()
    nothing = library.ask("How often does the ferry sail?", mode="none", **options)
    assert nothing.prompt_tokens == len(templated(tokenizer, "How often does the ferry sail?"))
    first = whole(Conversation(exact, library, **options).ask("How often does the ferry sail?"))[1]
    assert (first.text, first.prompt_tokens) == (in_memory.text, in_memory.prompt_tokens)
    assert library.search("ferry", rerank="likelihood")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_is_written_as_the_template_would(exact, family, tokenizer, system, monkeypatch, tmp_path):
    if system and family in WITHOUT_SYSTEM:
        with pytest.raises(InputError, match=r"chat template cannot be used: .*leave the system text out"):
            Conversation(exact, system=system)
        return
    options = {"max_new_tokens": 4, "eos_token_ids": ()}
    conversation = Conversation(exact, system=system, **options)
    fed = heard(conversation, monkeypatch)
    messages = [{"role": "system", "content": system}] if system else []
    for question in ("Who?", "When <|end|> then?"):
        start = len(fed)
        _, answer = whole(conversation.ask(question))
        written = tokenizer.decode(fed[start + answer.prompt_tokens :])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": written}]
    written = tokenizer.decode([*conversation.compressor.prefix_ids, *fed])
    expected = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert "".join(written.split()).startswith("".join(expected.split()))
    # Another conversation goes on with it, behind the same system text.
    conversation.save(tmp_path / "c.safetensors")
    again = Conversation(exact, **options)
    again.load(tmp_path / "c.safetensors")
    assert again.compressor.prefix_ids.equal(conversation.compressor.prefix_ids)
    assert whole(again.ask("Why?"))[0] == whole(conversation.ask("Why?"))[0]


def test_behind_a_system_text_the_same_memories_are_read():
    exact = tiny_kv("kv", tokenizer_of("llama-3"))
    opening = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    other = exact.opened(opening)
    memory = exact.compress([SOURCE])[0]
    rest = encode_text(exact.tokenizer, QUESTION)
    front = torch.tensor(exact.tokenizer(opening, add_special_tokens=False)["input_ids"])
    assert other.prefix_ids.equal(front)
    torch.testing.assert_close(
        other.prefill([[other.prefix_ids, memory, rest]])[0],
        exact.prefill([[front, memory, rest]])[0],  # as text, with a mask
        rtol=1e-4,
        atol=1e-5,
    )
    assert exact.opened(exact.chat.head) is exact
    plain = tiny_kv("kv", tokenizer_of("llama-3"), prefix="bos")
    assert plain.opened(opening) is plain


@pytest.mark.parametrize("prefix", ["bos", "none", [5, 6]])
def test_another_prefix_leaves_the_template_as_it_is(prefix):
    compressor = tiny_kv("kv", tokenizer_of("llama-3"), prefix=prefix)
    expected = templated(compressor.tokenizer, f"{SOURCE}\n\n{QUESTION}")
    given = [5, 6] if isinstance(prefix, list) else []
    assert torch.cat(built(compressor, [SOURCE])).tolist() == given + expected
    memory = compressor.compress([SOURCE])[0]
    *front, read, _ = built(compressor, [memory])
    assert read is memory
    assert compressor.tokenizer.decode(torch.cat(front)[len(given) :]).endswith("user<|end_header_id|>\n\n")


def test_a_document_that_takes_in_the_headers_end_does_not_repeat_it():
    """A text that begins with a line break is tokenised together with the header's own."""
    tokenizer = copy.deepcopy(tokenizer_of("qwen"))
    compressor = tiny_kv("kv", tokenizer)
    (ids,) = built(compressor, ["\n\n" + SOURCE])
    assert ids.tolist() == templated(tokenizer, f"\n\n{SOURCE}\n\n{QUESTION}")
    conversation = Conversation(compressor, max_new_tokens=2, eos_token_ids=())
    whole(conversation.ask("\n\nWho?"))
    read = [*compressor.prefix_ids, *torch.cat(conversation.session._ids).tolist()]
    assert tokenizer.decode(read).count("<|im_start|>user") == 1


def test_a_template_that_tells_the_date_is_told_one_that_stays():
    tokenizer = copy.deepcopy(tokenizer_of("qwen"))
    tokenizer.chat_template = (
        "{{- 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    )
    assert tiny_kv("kv", tokenizer).chat.head == "Today is 26 Jul 2024.\n<|im_start|>user\n"


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "nothing of what is said"])
def test_without_a_template_that_can_be_used_text_is_plain(template):
    tokenizer = copy.deepcopy(tokenizer_of("llama-3"))
    tokenizer.chat_template = template
    compressor = tiny_kv("kv", tokenizer)
    assert (compressor.prefix, compressor.prefix_ids.tolist()) == ("bos", [tokenizer.bos_token_id])
    ids = torch.cat(built(compressor, [SOURCE]))
    text = f"{SOURCE}\n\nQuestion: {QUESTION}\nAnswer:"
    assert ids.tolist() == tokenizer(text)["input_ids"]
    prompt = built(compressor, compressor.compress([SOURCE]))
    assert tokenizer.decode(prompt[2]) == text.removeprefix(SOURCE)
    with pytest.raises(InputError, match=r"chat template|does not keep the texts"):
        tiny_kv("kv", tokenizer, prefix="chat")


def test_a_compressor_that_is_saved_asks_as_before(tmp_path):
    from ctxdocs import load_compressor

    compressor = KVzip(tiny_model(), tokenizer_of("gemma")).eval()
    compressor.save(tmp_path / "saved")
    again = load_compressor(tmp_path / "saved")
    assert (again.prefix, again.fingerprint) == ("chat", compressor.fingerprint)
    assert again.prompt_format == compressor.prompt_format
    assert again.request_ids().suffix.equal(compressor.request_ids().suffix)

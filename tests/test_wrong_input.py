"""Wrong input, to every method: an error says what is wrong, where, and what to do; nothing is computed of it."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

from ctxdocs import CheckpointError, FingerprintMismatch, InputError, load_compressor
from ctxdocs.checks import number, one_of, true_or_false, whole_number, whole_numbers, words
from ctxdocs.compressors.ccm_sessions import Window
from ctxdocs.errors import ContextTooLong
from ctxdocs.generation import GenerationOptions, generate, stream

from .conftest import tiny_autocompressor, tiny_ccm, tiny_gist, tiny_model, tiny_rcc

IDS = torch.arange(20, 75)
PROMPT = [11, 12, 13, 14]
TENSOR = torch.tensor(PROMPT)

#: Every way of reading a prompt behind memories.
READING = {
    "logits": lambda c, memories: c.logits(PROMPT, memories),
    "generate_ids": lambda c, memories: c.generate_ids(PROMPT, memories, max_new_tokens=2),
    "generate": lambda c, memories: c.generate([PROMPT], memories, max_new_tokens=2),
    "stream": lambda c, memories: list(c.stream([PROMPT], memories, max_new_tokens=2)),
    "batch": lambda c, memories: generate(c, [[TENSOR], [*memories, TENSOR]], GenerationOptions(max_new_tokens=2)),
    "session": lambda c, memories: c.session(memories).feed(PROMPT),
}


@pytest.fixture(params=READING)
def read(request):
    return READING[request.param]


def small(method, tokenizer):
    """A compressor of few positions, of which eight memories and a prompt take more."""
    if method == "autocompressor":
        return tiny_autocompressor(tokenizer=tokenizer, max_position_embeddings=32, segment_tokens=16)
    if method == "rcc":
        return tiny_rcc(tokenizer, max_position_embeddings=32)
    if method == "ccm":
        return tiny_ccm(tokenizer=tokenizer, max_position_embeddings=32)
    return tiny_gist(method, tokenizer, model=tiny_model(max_position_embeddings=32))


@pytest.mark.parametrize(
    ("method", "length", "span"),
    [("autocompressor", 9, 4), ("beacon", 16, 4), ("ultragist", 16, 5), ("rcc", 16, 4), ("ccm", 4, 4)],
)
def test_memories_and_prompt_beyond_the_positions_say_by_how_much(method, length, span, read, tokenizer):
    compressor = small(method, tokenizer)
    memory = compressor.compress_ids([IDS[:length]])[0]
    assert memory.span == span
    with pytest.raises(InputError) as error:
        read(compressor, [memory] * 8)
    said = re.search(r"(\d+) positions, (\d+) more than the model's 32 \((read fewer|reset)", str(error.value))
    needed, over = int(said[1]), int(said[2])
    assert over == needed - 32
    # A session also counts what compressing its text would take.
    assert needed >= 8 * span + len(PROMPT)
    assert read is READING["session"] or needed == 8 * span + len(PROMPT)
    read(compressor, [memory] * 2)


@pytest.fixture(scope="module")
def foreign():
    """A memory of every kind, each made by a compressor that no other test uses."""
    made = [tiny_autocompressor(seed=1), tiny_rcc(seed=1), tiny_gist("beacon", window=8), tiny_ccm(sink=True)]
    return [compressor.compress_ids([IDS[:9]])[0] for compressor in made]


def test_a_memory_of_another_compressor_is_refused_by_name(any_compressor, foreign):
    own = any_compressor.compress_ids([IDS[:9]])[0]
    for memory in foreign:
        for read in READING.values():
            with pytest.raises(FingerprintMismatch) as error:
                read(any_compressor, [own, memory])
            assert memory.fingerprint[:12] in str(error.value)
            assert f"{any_compressor.method} compressor {any_compressor.fingerprint[:12]}" in str(error.value)
            assert "load the compressor that made it, or compress the document again" in str(error.value)


def test_a_memory_of_the_same_weights_in_another_dtype_is_refused(any_compressor):
    memory = any_compressor.compress_ids([IDS[:9]])[0]
    other = copy.deepcopy(any_compressor).to(torch.float16)
    other.forget_fingerprint()
    with pytest.raises(FingerprintMismatch, match=memory.fingerprint[:12]):
        other.logits(PROMPT, [memory])
    with pytest.raises(FingerprintMismatch, match=other.fingerprint[:12]):
        any_compressor.session(other.compress_ids([IDS[:9]]))


def test_a_memory_kept_in_another_dtype_is_read_in_the_models(any_compressor):
    memory = any_compressor.compress_ids([IDS[:9]])[0]
    half = memory.to(dtype=torch.float16)
    logits = any_compressor.logits(PROMPT, [half])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, any_compressor.logits(PROMPT, [half.to(dtype=torch.float32)]))
    torch.testing.assert_close(
        any_compressor.session([half]).feed(PROMPT), any_compressor.session([half.to(dtype=torch.float32)]).feed(PROMPT)
    )


IDS_THAT_ARE_NONE = [
    ([400], "holds token id 400, outside the vocabulary of 400 tokens (was it tokenised for another model?)"),
    ([-1, 3], "holds token id -1, outside the vocabulary"),
    ([0.5], "must be integers in a list or a 1-D tensor, got torch.float32 of shape (1,)"),
    (np.array([1.0]), "must be integers in a list or a 1-D tensor, got torch.float64"),
    ([True], "must be integers in a list or a 1-D tensor, got torch.bool"),
    ([[1, 2]], "must be integers in a list or a 1-D tensor, got torch.int64 of shape (1, 2)"),
    (torch.ones(2, 2, dtype=torch.long), "must be integers in a list or a 1-D tensor, got torch.int64 of shape (2, 2)"),
    (7, "must be integers in a list or a 1-D tensor, got torch.int64 of shape ()"),
    ("text", "must be integers in a list or a 1-D tensor, got str"),
    (["1"], "must be integers in a list or a 1-D tensor, got list"),
    ([2**70], "must be integers in a list or a 1-D tensor, got list"),
    (None, "must be integers in a list or a 1-D tensor, got NoneType"),
    ([], "is empty"),
]


def test_ids_that_are_none_are_refused_everywhere(any_compressor):
    session = any_compressor.session()
    uses = {
        "document 1": lambda ids: any_compressor.compress_ids([PROMPT, ids]),
        "the prompt": lambda ids: any_compressor.logits(ids),
        "the prompt ": lambda ids: any_compressor.generate_ids(ids, max_new_tokens=2),
        "what is fed": lambda ids: session.feed(ids),
    }
    for ids, message in IDS_THAT_ARE_NONE:
        for what, use in uses.items():
            with pytest.raises(InputError) as error:
                use(ids)
            assert str(error.value).startswith(f"{what.strip()} {message}")
    assert session.tokens_seen == 0


def test_a_prompt_needs_text_of_its_own(any_compressor):
    memory = any_compressor.compress_ids([IDS[:9]])[0]
    with pytest.raises(InputError, match="the prompt is empty"):
        any_compressor.logits([], [memory])
    if memory.kind == "kv":  # summary vectors and layer states run through the layers; there it has logits
        with pytest.raises(InputError, match=r"empty \(give at least one token, behind the memories if there are any"):
            any_compressor.generate_ids([], [memory], max_new_tokens=2)


def test_memories_that_are_none_are_refused(any_compressor):
    memory = any_compressor.compress_ids([IDS[:9]])[0]
    for read in (READING[name] for name in READING if name != "batch"):
        with pytest.raises(InputError, match=r"come in a list, got one memory \(write memories=\[memory\]\)"):
            read(any_compressor, memory)
        with pytest.raises(InputError, match=r"a list of memories holds a int \(memories come from compress"):
            read(any_compressor, [memory, 3])
        with pytest.raises(InputError, match="memories come in a list, got str"):
            read(any_compressor, "memory")


def test_texts_that_are_none_are_refused(compressor):
    with pytest.raises(InputError, match=r"document 1 is empty \(give at least one token\)"):
        compressor.compress(["some text", ""])
    with pytest.raises(InputError, match=r"a text is a string, got int \(for token ids, use compress_ids\)"):
        compressor.compress(["some text", 3])
    with pytest.raises(InputError, match="texts come in a list, got NoneType"):
        compressor.compress(None)
    with pytest.raises(InputError, match="holds no documents"):
        compressor.compress([])
    assert compressor.compress([" \n"])[0].source_tokens > 0  # blank is text like any other


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (None, {}, "documents come in a list, got NoneType"),
        (3, {}, "documents come in a list, got int"),
        ("text", {}, "documents come in a list, got str"),
        ([PROMPT], {"batch_tokens": 0}, "a batch holds at least one token, got batch_tokens=0"),
        ([PROMPT], {"batch_tokens": "many"}, r"batch_tokens must be a whole number, got 'many' \(str\)"),
    ],
)
def test_batches_that_are_none_are_refused(any_compressor, documents, options, message):
    with pytest.raises(InputError, match=message):
        any_compressor.compress_ids(documents, **options)


def test_without_a_tokenizer_text_is_refused():
    compressor = tiny_autocompressor()
    for use in (
        lambda: compressor.compress(["text"]),
        lambda: compressor.generate("text"),
        lambda: list(compressor.stream("text")),
        lambda: stream(compressor, [TENSOR], GenerationOptions(stop=(".",))).send(None),
    ):
        with pytest.raises(InputError, match=r"this compressor has no(ne| tokenizer)"):
            use()


# Settings.


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_gist, {"ratio": "4"}, "ratio must be a whole number, got '4' (str)"),
        (tiny_gist, {"ratio": 2.5}, "ratio must be a whole number, got 2.5 (float)"),
        (tiny_gist, {"ratio": (2, True)}, "each ratio must be a whole number, got True (bool)"),
        (tiny_gist, {"ratio_mix": 3}, "unknown ratio mix 3 (it is one of: step-random"),
        (tiny_gist, {"window": True}, "window must be a whole number, got True (bool)"),
        (tiny_gist, {"window": 0}, "a window holds at least one token, got window=0"),
        (tiny_gist, {"stride": "8"}, "stride must be a whole number, got '8' (str)"),
        (tiny_gist, {"sink_size": 1.0}, "sink_size must be a whole number, got 1.0 (float)"),
        (tiny_gist, {"attend_prev": "no"}, "attend_prev must be True or False, got 'no' (str)"),
        (tiny_gist, {"projections": "qkv"}, "projections must be a list of words, got 'qkv' (str)"),
        (tiny_gist, {"embed_init": "pad"}, "unknown embed_init 'pad' (one of: eos, bos)"),
        (tiny_ccm, {"num_comp_tokens": "2"}, "num_comp_tokens must be a whole number, got '2' (str)"),
        (tiny_ccm, {"attn_type": None}, "unknown attn_type None (one of: concat_recur, merge_recur, concat, merge)"),
        (tiny_ccm, {"sink": 1}, "sink must be True or False, got 1 (int)"),
        (tiny_ccm, {"lora_rank": 0}, "a LoRA has a rank of at least 1, got lora_rank=0"),
        (tiny_ccm, {"segment_tokens": 8.0}, "segment_tokens must be a whole number, got 8.0 (float)"),
        (tiny_rcc, {"ratio": "4"}, "ratio must be a whole number, got '4' (str)"),
        (tiny_rcc, {"ratio": 0}, "cannot be compressed at ratio 0 (the ratio, at least 1, must divide the window)"),
        (tiny_rcc, {"window": 16.0}, "window must be a whole number, got 16.0 (float)"),
        (tiny_autocompressor, {"summary_length": -1}, "summary_length is -1, it cannot be negative"),
        (tiny_autocompressor, {"summary_length": "4"}, "summary_length must be a whole number, got '4' (str)"),
        (tiny_autocompressor, {"accumulate_summary": "no"}, "accumulate_summary must be True or False, got 'no' (str)"),
        (tiny_autocompressor, {"segment_tokens": True}, "segment_tokens must be a whole number, got True (bool)"),
        (Window, {"window_size": "160"}, "window_size must be a whole number, got '160' (str)"),
        (Window, {"sink_size": None}, "sink_size must be a whole number, got None (NoneType)"),
        (GenerationOptions, {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5 (float)"),
        (GenerationOptions, {"max_new_tokens": "9"}, "max_new_tokens must be a whole number, got '9' (str)"),
        (GenerationOptions, {"temperature": "hot"}, "temperature must be a number, got 'hot' (str)"),
        (GenerationOptions, {"temperature": float("nan")}, "temperature must be a number, got nan (float)"),
        (GenerationOptions, {"top_k": 1.5}, "top_k must be a whole number, got 1.5 (float)"),
        (GenerationOptions, {"top_p": None}, "top_p must be a number, got None (NoneType)"),
        (GenerationOptions, {"seed": "x"}, "seed must be a whole number, got 'x' (str)"),
        (GenerationOptions, {"stop": 3}, "stop must be a list of words, got 3 (int)"),
        (GenerationOptions, {"eos_token_ids": ("a",)}, "each eos_token_ids must be a whole number, got 'a' (str)"),
    ],
)
def test_settings_of_the_wrong_type_are_named(make, settings, message):
    with pytest.raises(InputError) as error:
        make(**settings)
    assert message in str(error.value)


def test_sessions_and_segments_name_wrong_options():
    for compressor in (tiny_autocompressor(), tiny_ccm(), tiny_rcc()):
        for value in ("8", 2.5, True):
            with pytest.raises(InputError, match="segment_tokens must be a whole number"):
                compressor.session(segment_tokens=value)
        with pytest.raises(InputError, match=r"a segment holds (at least one|between 1)"):
            compressor.session(segment_tokens=0)
    for compressor in (tiny_autocompressor(), tiny_ccm()):
        with pytest.raises(InputError, match=r"each segment_lengths must be a whole number, got '2' \(str\)"):
            compressor.compress_ids([[1, 2, 3]], segment_lengths=[1, "2"])
        with pytest.raises(InputError, match=r"segment_lengths must be a whole number, got 2.5 \(float\)"):
            compressor.compress_ids([[1, 2, 3]], segment_lengths=2.5)


def test_a_checkpoint_is_loaded_with_settings_of_its_own_only(tiny_checkpoint):
    with pytest.raises(InputError, match=r"autocompressor has no setting ratio \(it has: accumulate_summary, segment"):
        load_compressor(tiny_checkpoint, ratio=4)
    with pytest.raises(InputError, match=r"segment_tokens must be a whole number, got '8' \(str\)"):
        load_compressor(tiny_checkpoint, segment_tokens="8")
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has no place for: embed_summary\.weight \(another me"):
        load_compressor(tiny_checkpoint, method="ccm")


def test_checked_values_come_back_as_they_are_used():
    assert whole_number("n", np.int64(3)) == 3
    assert type(whole_number("n", np.int64(3))) is int
    assert whole_numbers("n", 4) == whole_numbers("n", (4,)) == whole_numbers("n", np.array([4])) == [4]
    assert (number("x", 2), number("x", 0.5), true_or_false("b", False)) == (2, 0.5, False)
    assert words("w", ("a", "b")) == ["a", "b"]
    assert one_of("w", "a", ("a", "b")) == "a"


@pytest.mark.parametrize(
    ("make", "length", "message"),
    [
        # Vectors of eleven segments, in front of three tokens and their own slots.
        (
            lambda model: tiny_autocompressor(max_position_embeddings=48, segment_tokens=5),
            58,
            "51 positions .*, 3 more",
        ),
        (lambda model: tiny_gist("beacon", model=model), 160, "52 positions, 4 more"),
        (lambda model: tiny_gist("ultragist", model=model, sink_size=0), 160, "52 positions, 4 more"),
        (lambda model: tiny_ccm(max_position_embeddings=48), 50, "2 positions more"),
    ],
)
def test_documents_beyond_the_positions_say_by_how_much(make, length, message):
    compressor = make(tiny_model(max_position_embeddings=48))
    ids = torch.arange(length) + 20
    with pytest.raises(
        ContextTooLong, match=rf"a document of {length} tokens takes (up to )?{message} .*compress .*in p"
    ):
        compressor.compress_ids([ids[:5], ids])
    assert compressor.compress_ids([ids[: length - 8]])[0].slots > 0
    options = {"segment_lengths": 49}
    if compressor.method in ("autocompressor", "ccm"):
        with pytest.raises(ContextTooLong, match="more"):
            compressor.compress_ids([ids[:49]], **options)


def test_a_document_of_any_length_fits_where_positions_start_anew():
    ids = torch.arange(200) + 20
    assert tiny_rcc().compress_ids([ids])[0].slots == 52
    forgetful = {"accumulate_summary": False, "max_position_embeddings": 48, "segment_tokens": 16}
    assert tiny_autocompressor(**forgetful).compress_ids([ids])[0].slots == 4
    assert tiny_autocompressor("opt", max_position_embeddings=48, segment_tokens=16).compress_ids([ids])[0].slots == 52

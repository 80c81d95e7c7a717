"""Generation from prompts with memories: batched, sampled, streamed, stopped."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError
from ctxdocs.generation import Decoding, GenerationOptions, generate, stream
from ctxdocs.prompts import encode_text

NO_END = {"eos_token_ids": ()}


def prompts(compressor):
    memories = compressor.compress_ids([[5, 6, 7], list(range(40, 90))])
    return [
        [*memories, torch.tensor([11, 12, 13])],
        [torch.tensor([20])],
        [torch.tensor([21, 22]), memories[1], torch.tensor([23, 24, 25, 26])],
    ]


def reference(compressor, prompt, count):
    """Greedy decoding that reads everything again for every token."""
    ids = []
    for _ in range(count):
        logits, _ = compressor.prefill([[*prompt, torch.tensor(ids, dtype=torch.long)]])
        ids.append(int(logits[0].argmax()))
    return ids


def test_a_batch_of_unequal_prompts_equals_each_alone_read_anew(any_compressor):
    options = GenerationOptions(max_new_tokens=12, **NO_END)
    batch = prompts(any_compressor)
    together = [result.ids for result in generate(any_compressor, batch, options)]
    assert together == [reference(any_compressor, prompt, 12) for prompt in batch]


def test_counts_and_times(any_compressor):
    result = generate(any_compressor, prompts(any_compressor)[2:], GenerationOptions(max_new_tokens=3, **NO_END))[0]
    assert result.prompt_tokens == 6
    assert result.memory_slots == any_compressor.compress_ids([list(range(40, 90))])[0].slots
    assert 0 < result.time_to_first_token <= result.seconds
    assert result.finish_reason == "length"
    assert generate(any_compressor, []) == []


def test_an_end_of_sequence_token_ends_one_row_and_not_the_others(compressor):
    batch = prompts(compressor)
    free = [result.ids for result in generate(compressor, batch, GenerationOptions(max_new_tokens=12, **NO_END))]
    end = free[0][4]
    options = GenerationOptions(max_new_tokens=12, eos_token_ids=(end,))
    ended = generate(compressor, batch, options)
    for row, result in zip(free, ended, strict=True):
        expected = row[: row.index(end)] if end in row else row
        assert result.ids == expected
        assert result.finish_reason == ("stop" if end in row else "length")


def test_stop_strings_cut_the_text_and_streams_never_show_them(compressor):
    prompt = [encode_text(compressor.tokenizer, "The ferry")]
    whole = generate(compressor, [prompt], GenerationOptions(max_new_tokens=40, **NO_END))[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    options = GenerationOptions(max_new_tokens=40, stop=(stop, "never there"), **NO_END)
    result = generate(compressor, [prompt], options)[0]
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(stream(compressor, prompt, options)) == result.text


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_join_to_the_text(compressor, seed):
    prompt = [encode_text(compressor.tokenizer, "Café")]
    options = GenerationOptions(max_new_tokens=60, temperature=3.0, seed=seed, **NO_END)
    pieces = list(stream(compressor, prompt, options))
    assert "".join(pieces) == generate(compressor, [prompt], options)[0].text
    assert len(pieces) > 5


def test_rows_end_by_themselves_and_are_dropped_without_a_trace_in_the_others(any_compressor):
    batch = prompts(any_compressor)
    options = [GenerationOptions(max_new_tokens=count, **NO_END) for count in (9, 2, 12)]
    decoding = Decoding(any_compressor, batch, options)
    steps = 0
    while not decoding.is_over:
        decoding.advance()
        decoding.drop_ended()
        steps += 1
    assert steps == 12
    alone = [generate(any_compressor, [prompt], each)[0].ids for prompt, each in zip(batch, options, strict=True)]
    assert [row.result.ids for row in decoding.rows] == alone


def test_prompts_that_choose_differently_are_not_continued_side_by_side(compressor):
    unlike = [GenerationOptions(), GenerationOptions(temperature=1.0)]
    with pytest.raises(InputError, match="choose their tokens alike"):
        Decoding(compressor, prompts(compressor)[:2], unlike)
    assert GenerationOptions(seed=3).choice == GenerationOptions(top_k=5, max_new_tokens=1).choice


def test_sampling_follows_its_seed_and_its_limits(compressor):
    prompt = [11, 12, 13]

    def sample(**options):
        return compressor.generate_ids(prompt, max_new_tokens=16, **NO_END, **options)

    greedy = sample()
    assert sample(temperature=1.0, seed=3) == sample(temperature=1.0, seed=3)
    assert len({tuple(sample(temperature=2.0, seed=seed)) for seed in range(4)}) > 1
    assert sample(temperature=1.0, top_k=1) == greedy
    assert sample(temperature=1.0, top_p=1e-6) == greedy
    assert len(set(sample(repetition_penalty=100.0))) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1}, "not be negative"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ("",)}, "not be empty"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        GenerationOptions(**options)


def test_generation_ends_where_the_positions_end(tokenizer):
    from .conftest import tiny_autocompressor

    small = tiny_autocompressor(tokenizer=tokenizer, max_position_embeddings=16, segment_tokens=8)
    result = generate(small, [[torch.tensor([5] * 10)]], GenerationOptions(max_new_tokens=50, **NO_END))[0]
    assert len(result.ids) == 7  # the last token is decided at position 15 and never read
    assert result.finish_reason == "length"


def test_text_goes_in_as_parts_and_comes_out_as_text(compressor):
    memory = compressor.compress(["The lighthouse was built in 1874."])[0]
    options = {"max_new_tokens": 8, "eos_token_ids": ()}
    text = compressor.generate("When?", memories=[memory], **options)
    assert text == compressor.generate([memory, "When?"], **options)
    assert text == "".join(compressor.stream("When?", memories=[memory], **options))
    assert compressor.generate_ids(encode_text(compressor.tokenizer, "When?"), [memory], **options) != []

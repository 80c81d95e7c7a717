"""Answers that keep to a JSON schema: always, beside others, and without a trace in those."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from ctxdocs import InputError
from ctxdocs.errors import MissingDependency
from ctxdocs.generation import Decoding, GenerationOptions, generate, stream
from ctxdocs.prompts import encode_text
from ctxdocs.structure import MOST_SCHEMA_BYTES, StructuredText, checked_schema, masked

from .conftest import tiny_autocompressor


def fields(**properties):
    """Of an object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SHORT = {"type": "string", "maxLength": 6}
WHOLE = {"type": "integer", "minimum": -50, "maximum": 1000}
SCHEMAS = {
    "string": SHORT,
    "enum": {"enum": ["north pier", "Café", 1874, None, True]},
    "integer": WHOLE,
    "object": fields(date=SHORT, gulls=WHOLE),
    "nested": fields(gauge=fields(place={"enum": ["pier", "rock"]}, read=fields(every={"const": 6})), is_old=WHOLE),
    "array": {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 3},
    "choice": {"anyOf": [fields(ferry=SHORT), {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    "optional": {**fields(a=SHORT, b=WHOLE, c={"type": "null"}), "required": ["b"]},
    "pattern": {"type": "string", "pattern": "^[0-9]{1,2} (March|May)$"},
    "format": fields(day={"type": "string", "format": "date"}),
    "reference": {"$defs": {"year": {"type": "integer", "minimum": 1, "maximum": 99}}, "$ref": "#/$defs/year"},
    "order": fields(z=WHOLE, a=WHOLE),
}
HOW = {"greedy": {}, "drawn": {"temperature": 2.0, "seed": 3}, "few": {"temperature": 5.0, "seed": 1, "top_k": 4}}


def prompt_of(compressor, text="The ferry sails"):
    return [*compressor.compress_ids([[5, 6, 7]]), encode_text(compressor.tokenizer, text)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_written_keeps_to_the_schema(compressor, name, how):
    options = GenerationOptions(max_new_tokens=200, schema=SCHEMAS[name], **HOW[how])
    (result,) = generate(compressor, [prompt_of(compressor)], options)
    value = json.loads(result.text)
    jsonschema.validate(value, SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    assert result.finish_reason == "stop"
    assert result.text == json.dumps(value, ensure_ascii=False)  # white space as there, and keys in order
    assert compressor.tokenizer.decode(result.ids) == result.text
    assert name != "order" or list(value) == ["z", "a"]


def drawn(schema, tokenizer, seed, most=400):
    """What a model that finds all tokens alike writes; None if it comes to no end."""
    text = StructuredText(schema, tokenizer, {0})
    draws = torch.Generator().manual_seed(seed)
    for written in range(most):
        likely = masked(torch.zeros(1, len(tokenizer) + 3), [text], [most - written]).softmax(-1)
        token = int(torch.multinomial(likely, 1, generator=draws))
        if token in text.eos_token_ids:
            return text.text
        text.add(token)
        if text.is_complete:
            return text.text
    return None


def bounded(kind, lowest, highest, most):
    """Schemas of a type with bounds, by the names of these."""
    bounds = st.tuples(st.integers(0, most), st.integers(0, most))
    return bounds.map(lambda two: {"type": kind, lowest: two[0], highest: sum(two)})


ONE = st.text(max_size=5) | st.integers(-(2**53), 2**53) | st.none()  # llguidance's numbers are 64-bit floats
VALUES = st.recursive(
    st.one_of(
        bounded("string", "minLength", "maxLength", 4),
        bounded("integer", "minimum", "maximum", 999),
        st.lists(ONE, min_size=1).map(lambda values: {"enum": values}),
        st.sampled_from([{"type": "boolean"}, {"type": ["null", "integer"]}, {"type": "string", "format": "time"}]),
        st.sampled_from([1, 2, 5, 10]).map(lambda step: {"type": "integer", "multipleOf": step}),
    ),
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.lists(inner, min_size=1, max_size=3).map(lambda kinds: {"anyOf": kinds}),
        st.builds(
            lambda named, needed: {**fields(**named), "required": list(named)[:needed]},
            st.dictionaries(st.text(max_size=4), inner, max_size=4),
            st.integers(0, 4),
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=VALUES, seed=st.integers(0, 99))
def test_whatever_the_schema_a_whole_value_keeps_to_it(tokenizer, schema, seed):
    text = drawn(schema, tokenizer, seed)
    assert text is not None
    jsonschema.validate(json.loads(text), schema)


TEXT = {"type": "string"}
TREE = {
    "$defs": {"tree": {"anyOf": [{"$ref": "#/$defs/branch"}, {"type": "number"}]}, "branch": fields(left={}, right={})},
    "$ref": "#/$defs/tree",
}
TREE["$defs"]["branch"] = fields(left={"$ref": "#/$defs/tree"}, right={"$ref": "#/$defs/tree"})
ENDLESS = {
    "text": TEXT,
    "number": {"type": "number"},
    "any object": {"type": "object"},
    "any value": {},
    "list": {"type": "array", "items": TEXT, "minItems": 2},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 3},
    "fields": fields(setup=TEXT, punchline=TEXT, rating={"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    "open": {"type": "object", "properties": {"name": TEXT}, "required": ["name"], "additionalProperties": TEXT},
    "tree": TREE,
}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_value_without_bounds_is_brought_to_its_end_while_there_are_tokens(compressor, name, seed):
    how = {} if seed is None else {"temperature": 4.0, "seed": seed}
    options = GenerationOptions(max_new_tokens=64, schema=ENDLESS[name], **how)
    (result,) = generate(compressor, [prompt_of(compressor)], options)
    assert result.finish_reason == "stop"
    assert len(result.ids) <= 64
    jsonschema.validate(json.loads(result.text), ENDLESS[name])


def test_a_value_that_needs_more_tokens_than_there_are_is_cut_off(compressor):
    schema = {"type": "string", "pattern": "^[a-z]{300,}[.]$"}
    (result,) = generate(compressor, [prompt_of(compressor)], GenerationOptions(max_new_tokens=30, schema=schema))
    assert (len(result.ids), result.finish_reason) == (30, "length")


def test_a_value_that_has_room_is_left_alone(compressor):
    short, long = (
        generate(compressor, [prompt_of(compressor)], GenerationOptions(max_new_tokens=most, schema=ENDLESS["fields"]))[
            0
        ]
        for most in (64, 512)
    )
    shared = next(i for i, (a, b) in enumerate(zip(short.ids, long.ids, strict=False)) if a != b)
    assert shared > 16  # nothing was closed before tokens ran short
    assert len(long.ids) > len(short.ids)


def test_a_value_that_is_cut_off_says_so_and_is_the_beginning_of_the_whole(compressor):
    whole, cut = (
        generate(compressor, [prompt_of(compressor)], GenerationOptions(max_new_tokens=most, schema=SCHEMAS["object"]))[
            0
        ]
        for most in (200, 5)
    )
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert len(cut.ids) == 5
    assert whole.text.startswith(cut.text)


def test_a_row_whose_grammar_gets_stuck_ends_and_the_others_go_on(compressor, monkeypatch):
    allowed, calls = StructuredText.allowed, []

    def stuck_at_the_fourth_token(text, room):
        calls.append(text)
        if len(calls) == 4:
            text.add(1)  # padding, which no grammar allows
        return allowed(text, room)

    monkeypatch.setattr(StructuredText, "allowed", stuck_at_the_fourth_token)
    options = [GenerationOptions(max_new_tokens=12, schema=schema) for schema in (SCHEMAS["object"], None)]
    decoding = Decoding(compressor, [prompt_of(compressor)] * 2, options)
    while not decoding.is_over:
        decoding.advance()
    stuck, free = (row.result for row in decoding.rows)
    assert (len(stuck.ids), stuck.finish_reason) == (3, "length")
    assert stuck.text.startswith("{")
    assert free.ids == generate(compressor, [prompt_of(compressor)], options[1])[0].ids


def test_rows_with_schemas_and_without_are_written_side_by_side(any_compressor):
    texts = ["The ferry", "In winter", "Café", "42"]
    schemas = [None, SCHEMAS["object"], None, SCHEMAS["array"]]
    batch = [prompt_of(any_compressor, text) for text in texts]
    options = [GenerationOptions(max_new_tokens=24, schema=schema, eos_token_ids=()) for schema in schemas]
    decoding = Decoding(any_compressor, batch, options)
    while not decoding.is_over:
        decoding.advance()
        decoding.drop_ended()
    alone = [generate(any_compressor, [prompt], each)[0] for prompt, each in zip(batch, options, strict=True)]
    assert [row.result.ids for row in decoding.rows] == [each.ids for each in alone]
    assert [row.result.text for row in decoding.rows] == [each.text for each in alone]
    assert [row.result.finish_reason for row in decoding.rows] == [each.finish_reason for each in alone]


def test_logits_of_free_rows_are_left_to_the_bit_and_the_others_but_masked(tokenizer):
    logits = torch.randn(3, 431)  # more rows of the embedding than tokens, as padded models have
    logits[0, 7], logits[1, 9] = -0.0, 1e-42
    text = StructuredText({"enum": ["a", "b"]}, tokenizer, {0})
    found = masked(logits, [None, text, None], [9, 9, 9])
    assert torch.equal(found[[0, 2]].view(torch.int32), logits[[0, 2]].view(torch.int32))
    kept = found[1] != float("-inf")
    assert torch.equal(found[1][kept], logits[1][kept])
    assert {tokenizer.decode([token]) for token in kept.nonzero()[:, 0].tolist()} <= {'"', '"a', '"b', '"a"', '"b"'}
    narrow = masked(logits[:, :50], [None, text, None], [9, 9, 9])
    assert torch.equal(narrow, found[:, :50])


def test_a_model_with_more_embeddings_than_tokens(tokenizer):
    padded = tiny_autocompressor(tokenizer=tokenizer, vocab_size=417)
    options = GenerationOptions(max_new_tokens=200, schema=SCHEMAS["nested"], temperature=9.0, seed=0)
    assert json.loads(generate(padded, [prompt_of(padded)], options)[0].text)


@pytest.mark.parametrize("name", ["object", "choice", "integer"])
def test_streamed_pieces_join_to_the_text(compressor, name):
    options = GenerationOptions(max_new_tokens=200, schema=SCHEMAS[name], temperature=3.0, seed=5)
    prompt = prompt_of(compressor)
    assert "".join(stream(compressor, prompt, options)) == generate(compressor, [prompt], options)[0].text


def test_a_character_of_several_tokens_is_streamed_when_it_is_whole(tokenizer):
    text = StructuredText({"enum": ["日本"]}, tokenizer, {0})
    tokens = tokenizer.encode('"日本"', add_special_tokens=False)
    assert len(tokens) == 8
    for token in tokens:
        assert not text.is_complete
        text.add(token)
    assert text.is_complete
    assert text.text == '"日本"'


def test_special_tokens_are_no_part_of_a_string(tokenizer):
    text = StructuredText({"type": "string"}, tokenizer, {0})
    text.add(tokenizer.convert_tokens_to_ids('"'))
    logits = masked(torch.zeros(1, 400), [text], [9])
    assert logits[0, 0] == logits[0, 1] == float("-inf")
    assert (logits[0] == 0).sum() > 200
    number = StructuredText({"type": "integer"}, tokenizer, {0})
    number.add(tokenizer.convert_tokens_to_ids("4"))
    assert masked(torch.zeros(1, 400), [number], [9])[0, 0] == 0  # a number may end, or go on


def test_a_tokenizer_with_bytes_to_fall_back_on():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *'abe:"{}', '{"', "ab", '\u2581"']
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("a", "b"), ("{", '"'), ("\u2581", '"')]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(spaces)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")
    schema = fields(ab=SHORT, é={"enum": ["日 本", "a b"]})
    draws = torch.Generator().manual_seed(0)
    text = StructuredText(schema, tokenizer, {1})
    while not text.is_complete:
        likely = masked(torch.zeros(1, 300), [text], [99]).softmax(-1)
        text.add(int(torch.multinomial(likely, 1, generator=draws)))
    jsonschema.validate(json.loads(text.text), schema)


def test_stop_strings_and_other_ends_do_not_cut_a_value(compressor):
    prompt = prompt_of(compressor)
    given = {"max_new_tokens": 200, "schema": SCHEMAS["object"]}
    free = generate(compressor, [prompt], GenerationOptions(**given))[0]
    ends = {"stop": ("gulls", '"'), "eos_token_ids": tuple(free.ids)}
    assert generate(compressor, [prompt], GenerationOptions(**given, **ends))[0].text == free.text


def test_a_session_has_read_the_whole_value(compressor):
    schema = SCHEMAS["object"]
    session, other = compressor.session(), compressor.session()
    for each in (session, other):
        each.feed([5, 6, 7])
    result = session.generate(200, schema=schema)
    assert json.loads(result.text)
    other.feed(result.ids)
    assert torch.allclose(session.feed([9]), other.feed([9]), atol=1e-5)


def test_a_library_answers_to_a_schema(make_library, corpus):
    library = make_library()
    library.add(corpus)
    schema = SCHEMAS["object"]
    answer = library.ask("When?", k=2, max_new_tokens=200, schema=schema)
    jsonschema.validate(json.loads(answer.text), schema)
    assert library.ask_many(["When?", "Where?"], k=2, max_new_tokens=200, schema=schema)[0].text == answer.text
    assert "".join(library.stream("When?", k=2, max_new_tokens=200, schema=schema)) == answer.text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("object", "a mapping, got str"),
        ({"type": "objct"}, "objct"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "missing"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "string", "not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"enum": ["x" * MOST_SCHEMA_BYTES]}, "bytes"),
        ({"properties": {f"p{number}": {} for number in range(2500)}}, "too big"),
        ({"const": float("nan")}, "as JSON"),
        ({"const": {1, 2}}, "as JSON"),
        ({"const": "\ud800"}, "cannot be used"),
        (json.loads('{"items":' * 150 + "{}" + "}" * 150), "recursion"),
    ],
)
def test_unusable_schemas_are_refused_before_anything_is_read(schema, message):
    with pytest.raises(InputError, match=message):
        GenerationOptions(schema=schema)


def test_tokenizers_that_cannot_be_used_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[END]": 0, "[UNK]": 1, "ferry": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words_only = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]", unk_token="[UNK]")
    for eos in ({0}, set()):
        with pytest.raises(InputError, match="structured answers need"):
            StructuredText({"type": "object"}, words_only, eos)


def test_without_a_tokenizer_or_the_package_the_error_says_what_to_do(monkeypatch):
    bare = tiny_autocompressor()
    with pytest.raises(InputError, match="tokenizer"):
        bare.generate_ids([5, 6], schema={"type": "object"})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependency, match=r"ctxdocs\[structured\]"):
        GenerationOptions(schema={"type": "object", "title": "another"})


def test_options_of_schemas_compare_and_hash():
    one, other = GenerationOptions(schema={"type": "object"}), GenerationOptions(schema={"type": "array"})
    assert one == GenerationOptions(schema={"type": "object"}) != other
    assert one.choice == other.choice == GenerationOptions().choice
    assert len({one, other}) == 2
    assert list(json.loads(checked_schema(fields(b=SHORT, a=SHORT)))["properties"]) == ["b", "a"]


def test_ready_grammars_are_kept(tokenizer, monkeypatch):
    first = StructuredText(SCHEMAS["nested"], tokenizer, {0})
    import llguidance

    monkeypatch.setattr(llguidance, "LLMatcher", None)  # nothing is compiled again
    second = StructuredText(dict(SCHEMAS["nested"]), tokenizer, {0})
    first.add(tokenizer.convert_tokens_to_ids("{"))
    assert (first.text, second.text) == ("{", "")

"""What holds for the session of every method: it answers, says what fits, and goes on after being saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctxdocs import CheckpointError, FingerprintMismatch, InputError, StorageError
from ctxdocs.compressors.ccm_sessions import Window

from .conftest import tiny_autocompressor, tiny_ccm, tiny_gist, tiny_kv, tiny_rcc

IDS = torch.arange(20, 75)
NO_END = {"eos_token_ids": ()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def started(compressor):
    """A session behind a memory, in the middle of things."""
    session = compressor.session(compressor.compress_ids([[5, 6, 7, 8, 9]]))
    session.feed(IDS)
    session.generate_ids(6, **NO_END)
    return session


def test_new_tokens_become_part_of_the_context(any_compressor):
    session, other = any_compressor.session(), any_compressor.session()
    session.feed(IDS[:7])
    new = session.generate_ids(5, **NO_END)
    assert session.tokens_seen == 12
    last = other.feed(IDS[:7])[-1]
    for token in new:
        assert int(last.argmax()) == token
        last = other.feed([token])[-1]
    close(session.memory().tensors(), other.memory().tensors())


def test_text_is_streamed_and_stop_strings_end_it(any_compressor):
    def answer(method, **options):
        session = any_compressor.session()
        session.feed(IDS[:7])
        return getattr(session, method)(12, **NO_END, **options)

    whole = answer("generate")
    assert whole.finish_reason == "length"
    assert len(whole.ids) == 12
    assert "".join(answer("stream")) == whole.text
    stop = whole.text[4:6]
    stopped = answer("generate", stop=(stop,))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]


def test_an_abandoned_answer_leaves_what_was_read(any_compressor):
    session = any_compressor.session()
    session.feed(IDS[:7])
    pieces = session.stream(12, **NO_END)
    next(pieces)
    pieces.close()
    seen = session.tokens_seen
    assert 7 <= seen < 19
    session.feed([9])
    assert session.tokens_seen == seen + 1


def test_a_saved_session_goes_on_where_it_was(any_compressor, tmp_path):
    session = started(any_compressor)
    session.note["turns"] = [{"question": "Why?"}]
    session.save(tmp_path / "session.safetensors")
    again = any_compressor.load_session(tmp_path / "session.safetensors")
    assert (again.tokens_seen, again.note) == (session.tokens_seen, session.note)
    close(again.memory().tensors(), session.memory().tensors())
    assert again.generate_ids(9, **NO_END) == session.generate_ids(9, **NO_END)
    close(again.feed(IDS), session.feed(IDS))
    close(again.memory().tensors(), session.memory().tensors())
    again.reset(), session.reset()
    close(again.feed(IDS[:5]), session.feed(IDS[:5]))


@pytest.mark.parametrize("ratio_mix", ["step-random", "sequence", "instance-random", "adapt-100"])
def test_the_choice_of_ratios_goes_on(tmp_path, ratio_mix):
    compressor = tiny_gist(ratio=[2, 4, 8], ratio_mix=ratio_mix)
    session = compressor.session()
    session.feed(IDS)
    session.save(tmp_path / "s.safetensors")
    again = compressor.load_session(tmp_path / "s.safetensors")
    for _ in range(4):
        close(again.feed(IDS), session.feed(IDS))


def test_a_stream_goes_on(tmp_path):
    compressor = tiny_ccm()
    session = compressor.session(window=Window(24, 8, 4, 1))
    session.feed(IDS)
    session.save(tmp_path / "s.safetensors")
    again = compressor.load_session(tmp_path / "s.safetensors")
    assert again.window == session.window
    close(again.feed(IDS), session.feed(IDS))


def test_an_empty_session_can_be_saved(any_compressor, tmp_path):
    any_compressor.session().save(tmp_path / "s.safetensors")
    again = any_compressor.load_session(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="the session is empty"):
        again.generate_ids(1)
    again.feed([5])


SMALL = {
    "llama": lambda: tiny_autocompressor(max_position_embeddings=48, segment_tokens=16),
    "llama-rmt": lambda: tiny_autocompressor(max_position_embeddings=24, segment_tokens=16, accumulate_summary=False),
    "beacon": lambda: tiny_gist(window=16, model=small_model()),
    "ultragist": lambda: tiny_gist("ultragist", window=16, model=small_model()),
    "rcc": lambda: tiny_rcc(max_position_embeddings=48),
    "ccm": lambda: tiny_ccm(max_position_embeddings=48),
    "kv": lambda: tiny_kv(model=small_model()),
    "streaming": lambda: tiny_kv("streaming", model=small_model(), prefix=[3]),
}


def small_model():
    from .conftest import tiny_model

    return tiny_model(max_position_embeddings=48)


@pytest.mark.parametrize("method", SMALL)
def test_what_does_not_fit_is_refused_before_anything_is_read(method):
    session = SMALL[method]().session()
    room = session.room(10_000)
    if method == "llama-rmt":  # one soft prompt of constant size: endless
        assert room == 10_000
        return
    assert 0 < room < 300
    with pytest.raises(InputError, match=r"more than the model's 48 \(reset the session"):
        session.feed([7] * (room + 1))
    assert session.tokens_seen == 0
    session.feed([7] * (room - 3))
    assert len(session.generate_ids(10, **NO_END)) == 3
    with pytest.raises(InputError, match="with 1 more token the session takes"):
        session.generate_ids(10, **NO_END)
    assert session.tokens_seen == room
    session.memory()


def test_files_that_are_no_session_of_the_compressor(any_compressor, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read as a session"):
        any_compressor.load_session(tmp_path / "nothing")
    Path(tmp_path / "text").write_text("no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as a session"):
        any_compressor.load_session(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors")
    with pytest.raises(CheckpointError, match="holds no session"):
        any_compressor.load_session(tmp_path / "tensors")
    other = tiny_autocompressor(seed=3)
    other.session().save(tmp_path / "other")
    with pytest.raises(FingerprintMismatch, match=r"autocompressor compressor .* not with"):
        any_compressor.load_session(tmp_path / "other")
    with pytest.raises(StorageError, match="could not be written to"):
        any_compressor.session().save(tmp_path / "no" / "such" / "folder")

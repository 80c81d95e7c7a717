"""AutoCompressor beyond the golden cases: segments, padding, sessions."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError
from ctxdocs.compressors.segments import split_lengths

from .conftest import tiny_autocompressor

IDS = torch.arange(20, 60)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_segment_lengths_are_one_number_or_all_of_them():
    assert split_lengths(10, None) == [10]
    assert split_lengths(10, 4) == [4, 4, 2]
    assert split_lengths(8, 4) == [4, 4]
    assert split_lengths(10, [3, 7]) == [3, 7]
    with pytest.raises(InputError, match="do not add up to 10"):
        split_lengths(10, [3, 3])
    with pytest.raises(InputError, match="at least one token"):
        split_lengths(10, 0)


@pytest.mark.parametrize(("accumulate", "slots"), [(True, 12), (False, 4)])
def test_a_call_with_segments_equals_calls_one_after_another(accumulate, slots):
    compressor = tiny_autocompressor(accumulate_summary=accumulate)
    logits, together = compressor(IDS[None], segment_lengths=16, output_softprompt=True)
    softprompt, pieces = None, []
    for piece in IDS[None].split(16, dim=1):
        out, softprompt = compressor(piece, softprompt=softprompt, output_softprompt=True)
        pieces.append(out)
    assert together.shape == (1, slots, 32)
    close(together, softprompt)
    close(logits, torch.cat(pieces, dim=1))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_padding_anywhere_changes_nothing(architecture):
    compressor = tiny_autocompressor(architecture)
    ids, mask = torch.full((3, 24), 1), torch.zeros(3, 24, dtype=torch.long)
    rows = [(0, torch.arange(24)), (1, torch.arange(10, 24)), (2, torch.tensor([0, 3, 4, 9]))]
    for row, places in rows:
        ids[row, places] = 50 + places
        mask[row, places] = 1
    logits, softprompt = compressor(ids, mask, segment_lengths=12, output_softprompt=True)
    for row, places in rows:
        alone = [50 + places[places < 12], 50 + places[places >= 12]]
        vectors, seen = None, []
        for piece in alone:
            out, vectors = compressor(piece[None], softprompt=vectors, output_softprompt=True)
            seen.append(out[0])
        close(softprompt[row], vectors[0])
        close(logits[row, places], torch.cat(seen))
    assert logits[mask == 0].abs().max() == 0


def test_without_summary_slots_memories_are_empty():
    compressor = tiny_autocompressor(summary_length=0)
    memory = compressor.compress_ids([[5, 6, 7]])[0]
    assert (memory.slots, memory.span, memory.nbytes) == (0, 0, 0)
    close(compressor.logits([8, 9], [memory]), compressor.logits([8, 9]))
    session = compressor.session(segment_tokens=2)
    session.feed([5, 6, 7])
    assert session.memory().slots == 0


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_session_equals_segments_read_at_once(architecture):
    compressor = tiny_autocompressor(architecture)
    logits, _ = compressor(IDS[None], segment_lengths=16)
    session = compressor.session(segment_tokens=16)
    fed = torch.cat([session.feed(piece) for piece in IDS.split([1, 7, 8, 5, 19])])
    close(fed, logits[0])
    close(session.memory().vectors, compressor.compress_ids([IDS], segment_lengths=16)[0].vectors)
    assert session.memory().source_tokens == 40
    session.reset()
    close(session.feed(IDS[:3]), logits[0, :3])


def test_a_session_may_start_from_memories():
    compressor = tiny_autocompressor()
    memories = compressor.compress_ids([IDS, IDS[:9]])
    session = compressor.session(memories)
    close(session.feed(IDS[:5]), compressor.logits(IDS[:5], memories))
    assert session.memory().source_tokens == 54
    assert session.memory().slots == 12


def test_a_session_generates_what_the_compressor_generates_within_a_segment():
    compressor = tiny_autocompressor()
    session = compressor.session(segment_tokens=100)
    with pytest.raises(InputError, match="feed it before"):
        session.generate_ids(1)
    session.feed(IDS[:6])
    assert session.generate_ids(8) == compressor.generate_ids(IDS[:6], max_new_tokens=8, eos_token_ids=())
    assert session.tokens_seen == 14


def test_the_published_session_leaves_a_prompt_that_fills_its_segment_open():
    compressor = tiny_autocompressor()
    ours, theirs = compressor.session(segment_tokens=8), compressor.session(segment_tokens=8, published=True)
    for session in (ours, theirs):
        session.feed(IDS[:16])
        session.feed(IDS[16:20])
    assert ours.softprompt.shape[1] == 8
    assert theirs.softprompt.shape[1] == 4
    assert theirs.running == 12


def test_an_endless_stream_keeps_an_rmt_session_small():
    session = tiny_autocompressor(accumulate_summary=False).session(segment_tokens=8)
    for _ in range(10):
        session.feed(IDS[:8])
    assert session.softprompt.shape[1] == 4
    assert session.memory().slots == 4

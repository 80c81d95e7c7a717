"""What each method minimises: the published losses, and texts behind memories of several documents."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ctxdocs.compressors.ccm_parallel import lay_out
from ctxdocs.errors import InputError
from ctxdocs.modeling.backbone import Backbone
from ctxdocs.prompts import PromptFormat
from ctxdocs.training.distillation import distillation_losses, top_predictions
from ctxdocs.training.losses import IGNORED, next_token_loss
from ctxdocs.training.steps import build_step
from ctxdocs.training.steps.autocompressor import random_segment_lengths, substep_bounds
from ctxdocs.training.steps.documents import KINDS
from tests.conftest import tiny_autocompressor, tiny_ccm, tiny_gist, tiny_rcc

COMPRESSORS = {
    "autocompressor": lambda: tiny_autocompressor(segment_tokens=16),
    "opt": lambda: tiny_autocompressor("opt", segment_tokens=16),
    "rmt": lambda: tiny_autocompressor(accumulate_summary=False, segment_tokens=16),
    "beacon": lambda: tiny_gist("beacon", ratio=[2, 4]),
    "ultragist": lambda: tiny_gist("ultragist", ratio=[2, 4]),
    "ccm-concat": lambda: tiny_ccm(segment_tokens=16),
    "ccm-merge": lambda: tiny_ccm(attn_type="merge_recur", sink=True, segment_tokens=16),
    "ccm-merge-once": lambda: tiny_ccm(attn_type="merge", segment_tokens=16),
    "rcc": lambda: tiny_rcc(),
}
OPTIONS = {"rcc": {"target_tokens": 16, "cue": [2, 4]}}


def random_ids(*shape: int, seed: int = 0):
    return torch.randint(2, 400, shape, generator=torch.Generator().manual_seed(seed))


def published(name: str, rows: int = 3):
    """A method's step and a batch for it."""
    compressor = COMPRESSORS[name]()
    step = build_step(compressor, "published", OPTIONS.get(name, {}))
    texts = random_ids(rows, 48)
    if name.startswith("ccm"):
        examples = [{"segments": list(text.split(16))} for text in texts]
    elif name == "rcc":
        span = texts[:, 8:24]
        labels = span.masked_fill(torch.arange(16) < 3, IGNORED)
        examples = [{"context": t, "span": s, "labels": n} for t, s, n in zip(texts, span, labels, strict=True)]
    else:
        examples = [{"ids": text, "labels": text} for text in texts]
    return step, step.collate(examples)


def documents(name: str, weights: dict, rows: int = 4, **options):
    """A step of the objective ``documents``, and a batch for it."""
    every = dict.fromkeys(("continuation", "reconstruction", "answers", "text", "distillation"), 0.0)
    step = build_step(COMPRESSORS[name](), "documents", {"weights": {**every, **weights}, **options})
    nothing = torch.empty(0, dtype=torch.long)
    examples = []
    for row in range(rows):
        text = random_ids(40 + 3 * row, seed=row)
        examples.append(
            {
                "own": [text[:-10]],
                "near": [],
                "spare": [random_ids(20, seed=90 + row)],
                "left_out": [],
                "kind": ("continuation", "answers")[row % 2],
                "read": text[-10:],
                "targets": 9,
                "memory_frames": (nothing, nothing, torch.tensor([5])),
                "text_frames": (nothing, torch.tensor([6]), torch.tensor([6])),
                "seed": row,
            }
        )
    return step, step.collate(examples)


def back_propagate(step, batch) -> list[float]:
    losses, carried = [], None
    for part in range(step.parts):
        output = step(batch, part, carried)
        output["loss"].backward()
        losses.append(output["loss"].item())
        carried = output["carried"]
    return losses


def gradients(step) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_few_steps_lower_the_loss_of_a_batch(name):
    step, batch = published(name)
    step.compressor.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(step.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        losses.append(sum(back_propagate(step, batch)))
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_documents_lower_the_loss_of_a_batch(name):
    step, batch = documents(name, {"continuation": 1.0, "answers": 1.0, "distillation": 0.5})
    step.compressor.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(step.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        losses += back_propagate(step, batch)
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("objective", ["published", "documents"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_recomputing_activations_changes_no_gradient(name, objective):
    weights = {"continuation": 1.0, "answers": 1.0, "distillation": 1.0}
    step, batch = published(name) if objective == "published" else documents(name, weights)
    step.compressor.requires_grad_(True).train()
    kept = {}
    for recomputes in (False, True):
        for value in vars(step.compressor).values():
            if isinstance(value, Backbone):
                value.recomputes = recomputes
        step.zero_grad()
        torch.manual_seed(0)
        back_propagate(step, batch)
        kept[recomputes] = gradients(step)
    assert kept[True].keys() == kept[False].keys()
    for name_, gradient in kept[False].items():
        torch.testing.assert_close(kept[True][name_], gradient, rtol=1e-5, atol=1e-7)


# AutoCompressor.


def test_segment_lengths_are_random_and_add_up():
    torch.manual_seed(0)
    seen = {tuple(random_segment_lengths(100, 4, 64)) for _ in range(20)}
    assert len(seen) > 10
    assert all(sum(lengths) == 100 and min(lengths) >= 2 and max(lengths) <= 64 for lengths in seen)
    assert random_segment_lengths(7, 1, 4) == [7]
    with pytest.raises(InputError, match="cannot be cut into 4"):
        random_segment_lengths(9, 4, 64)


def test_substeps_are_as_equal_as_integers_allow():
    assert substep_bounds(37, 3) == [0, 12, 24, 37]


def test_gradients_stop_between_substeps_and_add_up():
    step, batch = published("autocompressor")
    step.compressor.requires_grad_(True)
    torch.manual_seed(0)
    back_propagate(step, batch)
    together = gradients(step)
    step.zero_grad()
    torch.manual_seed(0)
    first = step(batch, 0, None)
    assert not first["carried"].requires_grad
    first["loss"].backward()
    one = gradients(step)
    step.zero_grad()
    step(batch, 1, first["carried"])["loss"].backward()
    other = gradients(step)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, one[name] + other[name])


def test_fixed_lengths_read_the_end_of_the_sequence():
    compressor = tiny_autocompressor(accumulate_summary=False)
    step = build_step(compressor, "published", {"substeps": 2, "segment_lengths": [8, 6]})
    here = [step.part_of(40, part)[0] for part in range(2)]
    assert [(part.start, part.stop) for part in here] == [(12, 26), (26, 40)]


def test_the_row_of_no_position_gets_no_gradient():
    step, batch = published("opt")
    step.compressor.requires_grad_(True)
    back_propagate(step, batch)
    gradient = step.compressor.model.get_decoder().embed_positions.weight.grad
    assert gradient[1].abs().max() == 0
    assert gradient[2].abs().max() > 0


# Gist tokens.


def test_rows_of_as_many_windows_are_padded_together():
    step = build_step(tiny_gist(), "published", {})
    assert [step.group(tokens) for tokens in (16, 17, 32, 33, 48)] == [1, 2, 2, 3, 3]
    texts = [random_ids(35, seed=1), random_ids(46, seed=2)]
    rows = [{"ids": text, "labels": text} for text in texts]
    together = float(step(step.collate(rows))["loss"])
    alone = [float(step(step.collate([row]))["loss"]) for row in rows]
    assert together == pytest.approx((34 * alone[0] + 45 * alone[1]) / 79, rel=1e-5)


def test_ratios_are_drawn_from_a_generator_that_goes_on():
    step, batch = published("beacon")
    drawn = []
    choose = step.compressor.ratio_choice

    def spying():
        choice = choose()
        draw = choice.draw
        choice.draw = lambda *args, **options: drawn.append(draw(*args, **options)) or drawn[-1]
        return choice

    step.compressor.ratio_choice = spying
    torch.manual_seed(0)
    for _ in range(8):
        step(batch)
    first = list(drawn)
    torch.manual_seed(0)
    drawn.clear()
    for _ in range(8):
        step(batch)
    assert drawn == first
    assert {2, 4} == set(drawn)
    assert len({tuple(drawn[place : place + 2]) for place in range(0, 16, 2)}) > 1


def test_one_window_at_most_is_kept_in_training_and_none_at_the_end():
    compressor = tiny_gist(ratio=[0, 4], ratio_mix="sequence")
    kept = []
    from ctxdocs.compressors.gist_windows import Windows

    for text in (random_ids(1, 80), random_ids(1, 31)):
        windows = Windows(compressor, 1)
        windows.read(text, last_window="plain")
        kept.append(windows.gist.shape[-2])
    assert kept == [16 + 3 * 4, 4]


def test_the_first_window_is_no_target_where_no_gist_token_is_seen():
    for name, counts in (("beacon", 47), ("ultragist", 31)):
        step, batch = published(name, rows=1)
        targets = batch["labels"][:, (0 if step.first_counts else 16) + 1 :]
        assert targets.numel() == counts


# CCM.


@pytest.mark.parametrize("attn_type", ["concat_recur", "merge_recur", "concat", "merge"])
@pytest.mark.parametrize("sink", [False, True])
def test_one_pass_equals_the_recursion(attn_type, sink):
    compressor = tiny_ccm(attn_type=attn_type, sink=sink)
    compressor.requires_grad_(True)
    segments = [random_ids(n, seed=n) for n in (9, 7, 12, 8)]
    step = build_step(compressor, "published", {})
    output = step(step.collate([{"segments": segments}]))
    output["loss"].backward()
    in_one_pass = gradients(step)
    step.zero_grad()
    lengths = [len(segment) for segment in segments[:-1]]
    memory = compressor.compress_ids([torch.cat(segments[:-1])], segment_lengths=lengths)
    logits = compressor.logits(segments[-1], memory)
    loss = cross_entropy(logits[:-1], segments[-1][1:])
    loss.backward()
    assert output["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in compressor.own_parameters().items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = in_one_pass.get(f"compressor.{name}", torch.zeros_like(parameter))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_left_padding_does_not_change_a_row():
    compressor = tiny_ccm(attn_type="merge_recur", sink=True)
    step = build_step(compressor, "published", {})
    rows = [{"segments": [random_ids(n, seed=n) for n in lengths]} for lengths in ((9, 7, 8), (5, 8))]
    targets = [7, 7]
    together = float(step(step.collate(rows))["loss"])
    alone = [float(step(step.collate([row]))["loss"]) for row in rows]
    assert together == pytest.approx(sum(n * x for n, x in zip(targets, alone, strict=True)) / 14, rel=1e-5)


def test_targets_may_be_all_segments_behind_a_memory():
    compressor = tiny_ccm(segment_tokens=8)
    segments = [random_ids(8, seed=n) for n in range(3)]
    last, every = (
        build_step(compressor, "published", {"targets": targets}).collate([{"segments": segments}])["labels"]
        for targets in ("last", "all")
    )
    assert (last != IGNORED).sum() == 7
    assert (every != IGNORED).sum() == 14
    with pytest.raises(InputError, match="only the last one"):
        build_step(tiny_ccm(attn_type="concat"), "published", {"targets": "all"})


def test_special_tokens_are_laid_out_as_published():
    segments = [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8])]
    layouts = {name: lay_out(tiny_ccm(attn_type=name), segments).tolist() for name in ("concat_recur", "merge")}
    layouts["merge_recur"] = lay_out(tiny_ccm(attn_type="merge_recur"), segments).tolist()
    comp, total = [400, 401], [402, 403]
    assert layouts["concat_recur"] == [5, 6, *comp, 7, *comp, 8]
    assert layouts["merge"] == [5, 6, *comp, 7, *comp, *total, 8]
    assert layouts["merge_recur"] == [5, 6, *comp, *total, 7, *comp, *total, 8]


# Texts behind memories.


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_row_is_what_a_library_reads(name):
    """The loss of a row is that of the prompt read behind the same memories, the way everything else reads them."""
    step, batch = documents(name, {"continuation": 1.0, "answers": 1.0}, memories=[2, 2])
    if batch["ratio"] is not None:
        step.compressor.ratio = [batch["ratio"]]
    losses = step(batch)["losses"]
    memories = step.compressor.compress_ids(batch["documents"])
    for kind in ("continuation", "answers"):
        expected = []
        for row, read, of_kind in zip(batch["rows"], batch["reads"], batch["kinds"], strict=True):
            if KINDS[of_kind] == kind:
                prompt = torch.cat([torch.tensor([5]), read])
                logits = step.compressor.logits(prompt, [memories[index] for index in row])
                expected.append(cross_entropy(logits[1:-1], read[1:]))
        assert float(losses[kind]) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_every_row_reads_its_own_document_among_others():
    _, batch = documents("beacon", {"continuation": 1.0, "answers": 1.0}, memories=[3, 3])
    for number, row in enumerate(batch["rows"]):
        assert len(row) == len(set(row)) == 3
        assert any(batch["documents"][index][:5].equal(random_ids(40 + 3 * number, seed=number)[:5]) for index in row)


def test_a_document_that_is_left_out_is_not_read():
    step, _ = documents("beacon", {"answers": 1.0}, memories=[1, 3])
    frames = (torch.empty(0, dtype=torch.long),) * 3
    hidden, other = random_ids(12, seed=1), random_ids(9, seed=2)
    shared = {"near": [], "kind": "answers", "read": torch.tensor([7, 8, 9]), "targets": 2, "seed": 3}
    shared |= {"memory_frames": frames, "text_frames": frames}
    without = {"own": [], "left_out": [hidden], "spare": [hidden, other], **shared}
    batch = step.collate([without, {"own": [hidden], "left_out": [], "spare": [], **shared}])
    assert [batch["documents"][index].tolist() for index in batch["rows"][0]] == [other.tolist()]
    assert any(batch["documents"][index].equal(hidden) for index in batch["rows"][1])


def test_distillation_is_zero_where_both_predict_alike():
    compressor = tiny_autocompressor()
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    predicted = top_predictions(compressor.backbone, states, 8)
    same = distillation_losses(compressor.backbone, states, *predicted)
    other = distillation_losses(compressor.backbone, states.roll(1, 0), *predicted)
    assert same.abs().max() < 1e-5
    assert other.min() > 0.01


def test_all_tokens_matched_is_the_divergence_itself():
    compressor = tiny_autocompressor()
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    values, tokens = top_predictions(compressor.backbone, states[:1], 399)
    found = distillation_losses(compressor.backbone, states[1:], values, tokens)
    theirs, ours = (compressor.backbone.head(states[row]).log_softmax(-1) for row in (0, 1))
    assert float(found) == pytest.approx(float((theirs.exp() * (theirs - ours)).sum()), rel=1e-3)


def test_a_teacher_predicts_without_its_lora():
    from ctxdocs.training.config import LoraOptions
    from ctxdocs.training.lora import add_lora
    from ctxdocs.training.steps.documents import teaching

    compressor = tiny_autocompressor()
    ids = random_ids(12)
    before = compressor.logits(ids)
    add_lora(compressor, LoraOptions(rank=2))
    for name, parameter in compressor.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    compressor.train()
    assert (compressor.logits(ids) - before).abs().max() > 1e-2
    with teaching(compressor):
        torch.testing.assert_close(compressor.logits(ids), before)
    assert compressor.training
    assert any(parameter.requires_grad for name, parameter in compressor.named_parameters() if "lora" in name)


# Options and limits.


def test_labels_that_do_not_count_leave_no_loss():
    compressor = tiny_autocompressor()
    loss = next_token_loss(compressor.backbone, torch.randn(1, 4, 32), torch.full((1, 4), IGNORED))
    assert float(loss) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "longest", "said"),
    [
        ("autocompressor", {}, 10_000, "positions"),
        ("autocompressor", {"segment_lengths": [40]}, 64, "need sequences of 80"),
        ("beacon", {}, 16, "fit one window"),
        ("beacon", {}, 100_000, "positions"),
        ("ccm-concat", {}, 10_000, "positions"),
        ("ccm-concat", {}, 17, "no two segments"),
        ("rcc", {"target_tokens": 16, "cue": [2, 4]}, 60, "do not fill windows"),
        ("rcc", {"target_tokens": 2000, "cue": [2, 4]}, 1600, "longer than the text"),
    ],
)
def test_sequences_that_do_not_fit_are_refused_before_training(name, options, longest, said):
    step = build_step(COMPRESSORS[name](), "published", options)
    with pytest.raises(InputError, match=said):
        step.check(longest)


@pytest.mark.parametrize(
    ("name", "objective", "options"),
    [
        ("autocompressor", "published", {"substeps": 0}),
        ("ccm-concat", "published", {"segments": [1, 3]}),
        ("rcc", "published", {"cue": [20, 10]}),
        ("beacon", "documents", {"memories": [0, 2]}),
        ("beacon", "documents", {"weights": {"continuation": 0, "reconstruction": 0, "answers": 0}}),
        ("beacon", "documents", {"cue": [10, 200]}),
    ],
)
def test_options_that_cannot_be_used_are_refused(name, objective, options):
    with pytest.raises(InputError):
        build_step(COMPRESSORS[name](), objective, options)


def test_documents_as_text_have_to_fit_the_model():
    step = build_step(tiny_gist(), "documents", {"document_tokens": [1024]})
    with pytest.raises(InputError, match="4 documents of 1024"):
        step.check(0)


def test_formats_frame_sources_as_libraries_do(tokenizer):
    from ctxdocs.training.document_examples import frames_of
    from ctxdocs.training.examples import Asking

    prompt_format = PromptFormat(template="Read:\n{sources}Question: {question}\nAnswer:", memory="{source}|")
    asking = Asking(tokenizer, prompt_format)
    of_memories, of_texts = frames_of(prompt_format, asking, "When?")
    assert [tokenizer.decode(part) for part in of_memories] == ["Read:\n", "|", "|Question: When?\nAnswer:"]
    assert [tokenizer.decode(part) for part in of_texts] == ["Read:\n", "\n\n", "\n\nQuestion: When?\nAnswer:"]
    assert tokenizer.decode(asking.answer("1874")) == " 1874<|end|>"

"""The tiny recipes, run as they come: minutes each, on a CPU."""

from __future__ import annotations

import pytest

import ctxdocs
from ctxdocs.training import load_config, recipes, train
from tests.training_samples import write_documents, write_questions


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", [name for name in recipes() if name.startswith("tiny-")])
def test_a_tiny_run_lowers_the_loss(recipe, tmp_path):
    texts = write_documents(tmp_path / "texts.jsonl", count=400)
    questions = write_questions(tmp_path / "questions.jsonl", count=200)
    files = [str(texts), str(questions)] if recipe == "tiny-documents" else [str(texts)]
    changes = ["data.validation_share=0.05", "device=cpu"]
    result = train(load_config(recipe=recipe, data_files=files, output=str(tmp_path / "out"), changes=changes))
    # A signal (a time limit around the tests sends one) ends a run early and in order: that says nothing of the loss.
    assert not result.interrupted, f"stopped by a signal after step {result.steps} of {result.of_steps}"
    name = "loss_answers" if recipe == "tiny-documents" else "loss"
    losses = [loss for _, loss in result.losses(name)]
    assert losses[-1] < 0.5 * losses[0]
    assert result.losses(f"eval_{name}")[-1][1] < 0.5 * losses[0]
    assert ctxdocs.load_compressor(result.output).compress(["The ferry sails twice a day."])[0].slots

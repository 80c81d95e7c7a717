"""Runs from a configuration to a folder: exact, resumable, and stopped by nothing without saying what and where."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ctxdocs
from ctxdocs.checkpoints import new_compressor
from ctxdocs.errors import CheckpointError, DocumentError, InputError, MissingDependency, StorageError, TrainingError
from ctxdocs.training import train
from ctxdocs.training.trainer import CompressorTrainer
from tests.conftest import tiny_autocompressor, tiny_model
from tests.training_samples import METHODS, tiny_config, write_documents, write_questions


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    write_documents(tmp_path / "documents.jsonl")
    write_questions(tmp_path / "questions.jsonl")
    return tmp_path


@pytest.fixture
def config(folder, tokenizer_folder):
    def make(*changes: str, method: str = "autocompressor", **given):
        return tiny_config(method, folder, tokenizer_folder, *changes, **given)

    return make


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    found = load_file(Path(folder) / "model.safetensors")
    own = Path(folder) / "compressor.safetensors"
    return {**found, **(load_file(own) if own.is_file() else {})}


def same_weights(one: Path | str, other: Path | str) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("method", "objective"),
    [*((method, "published") for method in METHODS), ("beacon", "documents"), ("beacon", "text")],
)
def test_a_run_writes_a_folder_that_loads(config, folder, method, objective):
    changes = [
        f"objective={objective}",
        "documents.document_tokens=[24]",
        "documents.read_tokens=16",
        "documents.cue=[2,4]",
    ]
    files = [str(folder / "documents.jsonl"), str(folder / "questions.jsonl")]
    given = config(*changes, method=method, data_files=files)
    seen: list[dict] = []
    result = train(given, on_log=seen.append)
    assert result.steps == result.of_steps == 4
    assert [line["step"] for line in seen] == [1, 2, 3, 4]
    compressor = ctxdocs.load_compressor(result.output)
    assert compressor.method == method
    assert not compressor.training
    memory = compressor.compress(["The ferry sails twice a day."])[0]
    assert compressor.generate("How often?", [memory], max_new_tokens=2) is not None
    card = (Path(result.output) / "README.md").read_text(encoding="utf-8")
    assert "documents.jsonl | 40" in card
    assert "loss.svg" in card
    assert str(folder) not in card
    assert json.loads((Path(result.output) / "training_log.json").read_text(encoding="utf-8"))[0]["step"] == 1


def test_the_same_seed_gives_the_same_weights(config, folder):
    outputs = [train(config(f"seed={seed}", output=str(folder / name))).output for name, seed in (("a", 1), ("b", 1))]
    outputs.append(train(config("seed=2", output=str(folder / "c"))).output)
    assert same_weights(*outputs[:2])
    assert not same_weights(outputs[0], outputs[2])


@pytest.mark.parametrize("method", ["autocompressor", "beacon"])
def test_an_interrupted_run_goes_on_exactly(config, folder, method):
    """Dropout, drawn lengths and drawn ratios included."""
    files = [str(folder / "documents.jsonl"), str(folder / "questions.jsonl")]
    lora = ["train=lora", "lora.rank=2", "checkpoints.every=100", "steps=6", "accumulation=2", "batch_size=2"]
    whole = config(*lora, method=method, output=str(folder / "whole"), data_files=files)
    train(whole)

    def interrupt(line: dict) -> None:
        if line["step"] == 2:  # the step that is running when Ctrl-C comes is the third
            signal.raise_signal(signal.SIGINT)

    parted = config(*lora, method=method, output=str(folder / "parted"), data_files=files)
    first = train(parted, on_log=interrupt)
    assert first.interrupted
    assert first.steps == 3
    assert not (folder / "parted" / "config.json").exists()
    second = train(parted)
    assert second.resumed_from == 3
    assert second.steps == 6
    assert same_weights(folder / "whole", folder / "parted")
    assert [line["step"] for line in second.log if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_stays_as_it_is(config):
    given = config()
    output = train(given).output
    before = weights(output)
    again = train(given)
    assert again.resumed_from == again.steps == 4
    assert all(tensor.equal(weights(output)[name]) for name, tensor in before.items())


def test_another_configuration_is_refused_by_the_names_that_differ(config):
    train(config())
    with pytest.raises(InputError, match=r"differs in optimizer\.lr, seed"):
        train(config("optimizer.lr=1e-3", "seed=7"))
    train(config("logging.every=2", "checkpoints.every=1", "workers=0"))


def test_changed_data_are_refused(config, folder):
    train(config())
    write_documents(folder / "documents.jsonl", count=41)
    with pytest.raises(InputError, match="the data have changed"):
        train(config())


def test_what_is_held_out_is_measured_and_not_trained_on(config):
    given = config("data.validation_share=0.3", "logging.validate_every=2")
    result = train(given)
    assert [step for step, _ in result.losses("eval_loss")] == [2, 4]
    described = json.loads((Path(result.output) / "data" / "train.json").read_text(encoding="utf-8"))
    held_out = json.loads((Path(result.output) / "data" / "held-out.json").read_text(encoding="utf-8"))
    counts = [described["files"]["documents.jsonl"]["documents"], held_out["files"]["documents.jsonl"]["documents"]]
    assert sum(counts) == 40
    assert 0 < counts[1] < 25


def test_losses_that_are_held_out_bear_the_names_of_those_that_are_trained(config, folder):
    files = [str(folder / "documents.jsonl"), str(folder / "questions.jsonl")]
    changes = ["objective=documents", "documents.document_tokens=[8,16]", "documents.read_tokens=8"]
    changes += ["documents.cue=[1,2]", "data.validation_share=0.3", "data.sequence_tokens=0"]
    result = train(config(*changes, data_files=files))
    trained = {name for line in result.log for name in line if name.startswith("loss_")}
    measured = {name for line in result.log for name in line if name.startswith("eval_")}
    assert {"loss_answers", "loss_continuation"} <= trained
    assert measured == {"eval_loss", *(f"eval_{name}" for name in trained)}


def test_measuring_does_not_change_training(config, folder):
    share = "data.validation_share=0.3"
    train(config(share, "train=lora", output=str(folder / "a")))
    train(config(share, "train=lora", "logging.validate_every=1", output=str(folder / "b")))
    assert same_weights(folder / "a", folder / "b")


def test_a_loss_that_is_no_number_stops_and_keeps_its_batch(config, monkeypatch):
    from ctxdocs.training.steps.autocompressor import AutoCompressorStep

    forward = AutoCompressorStep.forward
    calls = []

    def failing(self, batch, part=0, carried=None):
        output = forward(self, batch, part, carried)
        calls.append(part)
        return {**output, "loss": output["loss"] * float("nan")} if len(calls) == 5 else output

    monkeypatch.setattr(AutoCompressorStep, "forward", failing)
    given = config("checkpoints.every=1")
    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        train(given)
    kept = Path(given.output) / "failed-batch"
    about = json.loads((kept / "batch.json").read_text(encoding="utf-8"))
    assert about["step"] == 2
    assert load_file(kept / "batch.safetensors")["input_ids"].shape == (4, 64)
    assert (Path(given.output) / "checkpoint-2" / "trained.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_last_checkpoint(config, monkeypatch, error):
    given = config("checkpoints.every=1", "checkpoints.keep=1")
    save = CompressorTrainer._save_optimizer_and_scheduler

    def failing(self, output_dir):
        if self.state.global_step == 3:
            raise error
        save(self, output_dir)

    monkeypatch.setattr(CompressorTrainer, "_save_optimizer_and_scheduler", failing)
    with pytest.raises(StorageError, match="earlier checkpoints are intact"):
        train(given)
    assert [path.name for path in Path(given.output).glob("*checkpoint*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(given).resumed_from == 2


def test_a_full_disk_leaves_the_last_model(config, monkeypatch, folder):
    given = config()
    output = Path(train(given).output)
    before = (output / "model.safetensors").read_bytes()

    def failing(self, path):
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ctxdocs.load_compressor(output).__class__, "save", failing)
    with pytest.raises(StorageError, match="the disk is full"):
        train(given)
    assert (output / "model.safetensors").read_bytes() == before
    assert not list(output.glob(".*partial"))


# What a run starts from.


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A plain language model."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["beacon", "ultragist", "ccm"])
def test_only_own_parameters_train_on_a_frozen_model(config, base, method):
    given = config("train=own", method=method, init=str(base))
    given.tokenizer = ""
    result = train(given)
    before, after = load_file(base / "model.safetensors"), weights(result.output)
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert result.trained_parameters < result.parameters / 2
    assert len(after) > len(before)


def test_a_lora_is_merged_into_the_model(config, base):
    given = config("train=lora", "lora.rank=2", "lora.layers=[q_proj,v_proj]", init=str(base))
    given.tokenizer = ""
    before, after = load_file(base / "model.safetensors"), weights(train(given).output)
    changed = {name.rpartition(".self_attn.")[2] for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed == {"q_proj.weight", "v_proj.weight"}


def test_a_compressor_is_trained_further(config, tokenizer, folder):
    compressor = tiny_autocompressor(tokenizer=tokenizer, summary_length=3, segment_tokens=20)
    compressor.save(folder / "start")
    given = config("optimizer.lr=1e-9", init=str(folder / "start"))
    given.tokenizer, given.settings = "", {}
    trained = ctxdocs.load_compressor(train(given).output)
    assert trained.summary_length == 3
    assert trained.segment_tokens == 20
    torch.testing.assert_close(trained.embed_summary.weight, compressor.embed_summary.weight)


def test_the_model_of_another_method_is_a_base_like_any(config, tokenizer, folder):
    tiny_autocompressor(tokenizer=tokenizer).save(folder / "start")
    given = config("train=own", method="beacon", init=str(folder / "start"))
    given.tokenizer = ""
    trained = ctxdocs.load_compressor(train(given).output)
    assert trained.method == "beacon"
    assert not hasattr(trained.model.config, "summary_length")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("autocompressor", {"summary_length": 3}),
        ("beacon", {"window": 16, "ratio": 4}),
        ("ultragist", {"window": 16, "ratio": 4}),
        ("ccm", {"num_comp_tokens": 2, "attn_type": "merge_recur", "sink": True}),
    ],
)
def test_a_method_is_put_onto_a_model(base, method, settings, tmp_path):
    compressor = new_compressor(base, method, device="cpu", **settings)
    assert not any(parameter.requires_grad for parameter in compressor.parameters())
    memory = compressor.compress(["The ferry sails."])[0]
    compressor.save(tmp_path / "saved")
    loaded = ctxdocs.load_compressor(tmp_path / "saved", device="cpu")
    loaded.check_memory(memory)


def test_rcc_starts_from_one_model_twice(tmp_path, tokenizer):
    from tests.conftest import tiny_rcc

    tiny_rcc().model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    compressor = new_compressor(tmp_path, "rcc", device="cpu", window=16, ratio=4)
    ours, theirs = (dict(model.named_parameters()) for model in (compressor.encoder, compressor.model.base_model))
    assert all(tensor.equal(theirs[name]) and tensor is not theirs[name] for name, tensor in ours.items())


def test_a_new_compressor_says_which_setting_it_needs(base):
    with pytest.raises(InputError, match="needs the setting num_comp_tokens"):
        new_compressor(base, "ccm")


# Wrong input.


def test_a_tokenizer_of_another_model_is_refused(config, tokenizer, folder):
    tiny_model(vocab_size=300).save_pretrained(folder / "small")
    with pytest.raises(InputError, match=r"ids up to 399, the model a table of 300"):
        train(config(init=str(folder / "small")))


@pytest.mark.parametrize(
    ("line", "said"),
    [("", "no record"), ('{"text": "cut o', r"documents\.jsonl:1: broken JSON"), ('{"words": 1}', "neither 'text'")],
)
def test_broken_and_empty_data_are_named_by_file_and_line(config, folder, line, said):
    (folder / "documents.jsonl").write_text(line + "\n" if line else "", encoding="utf-8")
    with pytest.raises(DocumentError, match=said):
        train(config())


def test_lines_without_a_record_may_be_skipped(config, folder):
    with (folder / "documents.jsonl").open("a", encoding="utf-8") as file:
        file.write("{\n")
    result = train(config("data.on_error=skip"))
    assert "1 lines held no record" in (Path(result.output) / "README.md").read_text(encoding="utf-8")


def test_texts_that_are_too_short_are_named(config, folder):
    write_documents(folder / "documents.jsonl", count=1)
    with pytest.raises(InputError, match="do not fill a batch of 64"):
        train(config("batch_size=64"))
    with pytest.raises(InputError, match=r"nothing in .* is long enough"):
        train(config("data.packing=documents", "data.shortest=5000", "data.sequence_tokens=200"))


def test_sequences_longer_than_the_model_are_refused(config):
    with pytest.raises(InputError, match="the model has 512"):
        train(config("data.sequence_tokens=4096"))


def test_sequences_are_as_long_as_fits_unless_told(config):
    from ctxdocs.training.run import longest_sequence
    from ctxdocs.training.steps import build_step
    from tests.conftest import tiny_gist

    step = build_step(tiny_gist(model=tiny_model(max_position_embeddings=100), ratio=1), "published", {})
    assert longest_sequence(step, 0) == 64
    assert longest_sequence(step, 90) == 90
    with pytest.raises(InputError, match="do not fit"):
        longest_sequence(step, 110)
    assert train(config("data.sequence_tokens=0")).steps == 4


def test_a_run_does_not_replace_what_it_starts_from(config):
    output = train(config()).output
    with pytest.raises(InputError, match="cannot start from what it replaces"):
        train(config(init=output))


def test_there_has_to_be_something_to_start_from(config, folder):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        train(config(init=str(folder / "nowhere")))
    with pytest.raises(InputError, match="no model can be built"):
        train(config(init={"hidden_size": 32}))
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        given = config()
        given.tokenizer = str(folder / "nowhere")
        train(given)


def test_fields_of_the_trainer_are_checked(config):
    with pytest.raises(InputError, match=r"trainer\.learning_rate is not for you"):
        train(config("trainer.learning_rate=1"))
    with pytest.raises(InputError, match=r"did you mean trainer\.deepspeed"):
        train(config("trainer.deepspeeed=x"))


def test_a_lora_needs_layers_that_exist(config):
    with pytest.raises(InputError, match=r"no layers named wq"):
        train(config("train=lora", "lora.layers=[wq]"))


def test_reports_need_their_package(config):
    with pytest.raises(MissingDependency, match="wandb"):
        train(config("logging.report_to=[wandb]"))
    with pytest.raises(InputError, match="nonsense"):
        train(config("logging.report_to=[nonsense]"))

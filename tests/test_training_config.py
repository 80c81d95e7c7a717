"""Configurations: read, overridden, written out, compared; recipes; the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ctxdocs.cli import main
from ctxdocs.errors import InputError
from ctxdocs.training import TrainingConfig, dump_config, load_config, recipes
from ctxdocs.training.options import differing, free_options
from tests.training_samples import LLAMA, write_documents

RECIPES = list(recipes())


def run(*args: object):
    return CliRunner().invoke(main, ["train", *map(str, args)])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_say_what_they_are(name):
    config = load_config(recipe=name)
    assert config.method in name or name.startswith(("rmt", "rag", "tiny"))
    assert len(recipes()[name]) > 20
    config.init = config.init or "somewhere"
    config.output, config.data.files = "out", ["texts.jsonl"]
    config.check()


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_printed_is_read_back_the_same(name, tmp_path):
    config = load_config(recipe=name)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path).to_mapping() == config.to_mapping()


def test_every_option_is_printed_with_its_meaning():
    for objective in ("published", "documents"):
        text = dump_config(load_config(method="ccm", changes=[f"objective={objective}"]))
        lines = text.splitlines()
        for number, line in enumerate(lines):
            is_value = re.match(r"\s*[a-z_]+: \S", line)
            assert not is_value or lines[number - 1].lstrip().startswith("# "), line


def test_later_sources_count(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: {lr: 1e-3, weight_decay: 0.1}\nseed: 7\n", encoding="utf-8")
    config = load_config(path, recipe="tiny-beacon", method="beacon", changes=["optimizer.lr=5e-4", "steps=9"])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-4, 0.1)
    assert config.optimizer.schedule == "cosine"
    assert (config.seed, config.steps, config.settings["window"]) == (7, 9, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optimizer.lrr=1", "no option 'optimizer.lrr' .*did you mean optimizer.lr"),
        ("optmizer.lr=1", "no option 'optmizer' .*did you mean optimizer"),
        ("published.substep=1", "did you mean published.substeps"),
        ("steps=many", "steps is 'many' .*type int"),
        ("steps=1.5", "steps is 1.5"),
        ("recompute=3", "recompute is 3 .*type bool"),
        ("optimizer=3", "optimizer holds 3, not options"),
        ("steps.x=3", "steps is"),
        ("steps", "sets nothing"),
        ("data.files={", "is no YAML"),
        ("data.files=!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_options_that_cannot_be_used_are_named(change, said):
    with pytest.raises(InputError, match=said):
        load_config(method="autocompressor", changes=[change])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["method=becon"], "method is 'becon'"),
        (["method=kvzip"], "nothing to train"),
        (["train=all"], "train is 'all'"),
        (["objective=text2"], "objective is"),
        (["precision=int8"], "precision is"),
        (["batch_size=0"], "batch_size is 0"),
        (["output="], "output is not given"),
    ],
)
def test_values_are_checked_before_anything_is_loaded(changes, said):
    with pytest.raises(InputError, match=said):
        load_config(method="beacon", init="x", output="y", data_files=["z"], changes=changes).check()


def test_configurations_differ_by_dotted_names():
    one, other = (load_config(method="beacon", changes=[f"optimizer.lr={lr}"]).to_mapping() for lr in (1e-3, 1e-4))
    assert differing(one, other) == ["optimizer.lr"]
    assert {"output", "logging.every", "checkpoints.keep"} <= free_options(TrainingConfig)
    assert "optimizer.lr" not in free_options(TrainingConfig)


def test_yaml_numbers_without_a_point_are_numbers():
    assert yaml.safe_load("1e-4") == "1e-4"  # YAML 1.1
    assert load_config(method="beacon", changes=["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


# The command.


def test_the_command_lists_recipes_and_prints_configurations():
    listed = run("--list-recipes")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in RECIPES)
    printed = run("--recipe", "tiny-rcc", "--print-config", "--set", "seed=3")
    assert yaml.safe_load(printed.output)["seed"] == 3
    as_json = run("--recipe", "tiny-rcc", "--print-config", "--json")
    assert json.loads(as_json.output)["method"] == "rcc"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "method is not given"),
        (["--recipe", "tiny-becon"], "did you mean tiny-beacon"),
        (["--recipe", "tiny-beacon"], "output is not given"),
        (["--recipe", "tiny-beacon", "--output", "x"], "data.files is not given"),
        (["--config", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_the_command_says_what_is_missing(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_the_command_trains_and_goes_on(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_documents(tmp_path / "texts.jsonl")
    (tmp_path / "model.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    write_documents(tmp_path / "more.jsonl", seed=5)
    given = ["--method", "beacon", "--init", tmp_path / "model.json", "--data", tmp_path / "texts.jsonl"]
    given += [
        tmp_path / "more.jsonl",
        "--output",
        tmp_path / "out",
        "--set",
        "settings.window=16",
        "--set",
        "settings.ratio=4",
    ]
    for change in (f"tokenizer={tmp_path / 'tokenizer'}", "data.sequence_tokens=48", "steps=2", "device=cpu"):
        given += ["--set", change]
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "step 1/2  loss" in result.stderr
    assert "parameters" in result.stdout
    assert "more.jsonl" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = json.loads(run(*given, "--json").stdout)
    assert again["steps"] == again["resumed_from"] == 2
    assert Path(again["output"]).is_dir()


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, tmp_path):
    import ctxdocs.training
    from ctxdocs.training import TrainingResult

    stopped = TrainingResult("out", 3, 9, 0, 1, 2, [], interrupted=True)
    monkeypatch.setattr(ctxdocs.training, "train", lambda config, on_log=None: stopped)
    result = run("--recipe", "tiny-beacon", "--data", "x", "--output", tmp_path)
    assert result.exit_code == 130
    assert "Interrupted after 3 of 9 steps" in result.stderr
    assert "run the same command again" in result.stderr


def test_the_manual_knows_every_option():
    from ctxdocs.training.options import documented
    from ctxdocs.training.steps import options_class

    manual = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    options = {name: meaning for name, _, meaning in documented(TrainingConfig())}
    for objective, methods in (("published", ("autocompressor", "ccm", "rcc")), ("documents", ("beacon",))):
        for method in methods:
            known = documented(options_class(method, objective)())
            options |= {f"{objective}.{name}": meaning for name, _, meaning in known}
    assert not [name for name, meaning in options.items() if f"| `{name}` |" not in manual or meaning not in manual]

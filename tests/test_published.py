"""Every published checkpoint loads by its name alone, from a hub that is faked; what is out of reach is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctxdocs import CheckpointError, InputError, Library, load_compressor
from ctxdocs.compressors import METHODS, compressor_class
from ctxdocs.published import CCM_DRIVE, PUBLISHED, PublishedCheckpoint, find_published

from .published_samples import FakeHub, hub_error, write_ccm, write_checkpoint, write_llama

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
ON_HUB = [row for row in PUBLISHED if row.drive is None]
ADAPTERS = [row for row in PUBLISHED if row.drive]
LLAMA, CHAT = "huggyllama/llama-7b", "meta-llama/Llama-2-7b-chat-hf"
BEACON, RCC = "namespace-Pt/beacon-qwen-2-7b-instruct", "fcyp/RCC_Ins_Reconstruction"
ULTRAGIST = "namespace-Pt/ultragist-llama2-7b-chat"


def by_name(row: PublishedCheckpoint) -> str:
    return row.name.rpartition("/")[2]


def kind_of(row: PublishedCheckpoint) -> str:
    """Which of the sample checkpoints is one like this row's."""
    if row.method == "rcc":
        return "rcc"
    architecture = {"facebook": "opt", "meta-llama": "llama", "Qwen": "qwen2", "mistralai": "mistral"}
    family = "full-attention" if row.slots == 0 else "rmt" if row.keeps == "last" else row.method
    return f"{family}-{architecture[row.base.partition('/')[0]]}"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    """A hub with nothing on it."""
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


@pytest.fixture
def drive(tmp_path) -> Path:
    """Where adapters are downloaded to."""
    return tmp_path / "drive"


def download(drive: Path, row: PublishedCheckpoint) -> Path:
    """Lay an adapter out as it lies on the authors' drive."""
    attn_type = row.name.partition("-online-")[2].partition("-ntok")[0]
    return write_ccm(drive / row.drive, attn_type, row.slots)


def adapter_row(name: str) -> PublishedCheckpoint:
    row = find_published(name)
    assert row is not None
    return row


# The table.


def test_the_table_is_sound():
    assert len({row.name for row in PUBLISHED}) == len(PUBLISHED)
    assert [row.method for row in PUBLISHED] == sorted((row.method for row in PUBLISHED), key=list(METHODS).index)
    assert {row.method for row in PUBLISHED} == {name for name in METHODS if compressor_class(name).is_trained}
    for row in PUBLISHED:
        assert row.name.count("/") == (0 if row.drive else 1)
        assert row.base.count("/") == 1
        assert row.note
        assert (row.slots is None) == bool(row.ratios)
        assert row.keeps in ("all", "last", "mean")
        assert find_published(row.name) is row
    assert find_published("owner/model") is None
    assert find_published(f"elsewhere/{ULTRAGIST}") is None


@pytest.mark.parametrize("row", PUBLISHED, ids=by_name)
def test_the_documentation_has_every_row(row):
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{row.name}` |")]
    assert len(lines) == 1
    cells = [cell.strip().strip("`") for cell in lines[0].strip("|").split("|")]
    size = ", ".join(map(str, row.ratios)) if row.ratios else str(row.slots)
    window = str(row.window) if row.window else "-"
    facts = [row.name, row.base, size, window, str(row.positions or "?"), row.licence or "?"]
    assert cells[:6] == facts
    if row.drive:
        assert cells[6] == row.drive.rpartition("/")[0]


# By name.


@pytest.mark.parametrize("row", ON_HUB, ids=by_name)
def test_a_name_is_enough(row, hub, tokenizer):
    write_checkpoint(hub.repository(row.name), kind_of(row))
    # RCC was published without a tokenizer.
    tokenizer.save_pretrained(hub.repository(row.base if row.method == "rcc" else row.name))
    compressor = load_compressor(row.name, device="cpu")
    assert (compressor.method, compressor.name_or_path) == (row.method, row.name)
    assert {name: getattr(compressor, name) for name in row.settings} == dict(row.settings)
    if row.positions:
        assert compressor.backbone.max_positions == row.positions
    if row.method == "autocompressor":
        assert (compressor.summary_length, compressor.segment_tokens) == (row.slots, row.window or 1536)
        assert compressor.accumulate_summary == (row.keeps == "all") or not row.slots
    elif row.method == "rcc":
        assert (compressor.ratio, compressor.window) == (row.ratios[0], row.window)
    else:
        assert set(row.ratios) <= set(compressor.ratio)
        assert compressor.window == compressor.stride == row.window
    memory = compressor.compress(["The ferry sails twice a day."])[0]
    assert memory.source_tokens == len(tokenizer("The ferry sails twice a day.")["input_ids"])
    assert hub.asked == [row.name] + [row.base] * (row.method == "rcc")


def test_arguments_come_before_what_a_name_stands_for(hub, tokenizer):
    rmt = "princeton-nlp/RMT-1.3b-30k"
    for name, kind in ((BEACON, "beacon-qwen2"), (RCC, "rcc"), (rmt, "rmt-opt")):
        tokenizer.save_pretrained(write_checkpoint(hub.repository(name), kind))
    beacon = load_compressor(BEACON, device="cpu", ratio=8, ratio_mix="sequence")
    assert (beacon.ratio, beacon.ratio_mix) == ([8], "sequence")
    rcc = load_compressor(RCC, device="cpu", ratio=64, window=1024)
    assert (rcc.ratio, rcc.window, rcc.layer_map) == (64, 1024, "one")
    assert load_compressor(rmt, device="cpu", segment_tokens=100).segment_tokens == 100
    with pytest.raises(InputError, match="rcc has no setting ratio_mix"):
        load_compressor(RCC, device="cpu", ratio_mix="sequence")


def test_published_gist_models_run_as_evaluated_not_as_trained(hub, tokenizer):
    repository = write_checkpoint(hub.repository(BEACON), "beacon-qwen2")
    tokenizer.save_pretrained(repository)
    assert json.loads((repository / "config.json").read_text())["beacon_ratio_mix"] == "step-random"
    by_its_name = load_compressor(BEACON, device="cpu")
    assert by_its_name.ratio_mix == "adapt-1024"
    # A folder may be anybody's, and is taken at its word.
    folder = load_compressor(repository, device="cpu")
    assert folder.ratio_mix == "step-random"
    assert folder.fingerprint == by_its_name.fingerprint
    # Of what is saved under any name, the settings are known.
    folder.save(hub.repository("owner/saved"))
    assert load_compressor("owner/saved", device="cpu").ratio_mix == "step-random"


def test_a_name_stands_for_a_method_that_the_configuration_does_not_tell(hub, tokenizer):
    tokenizer.save_pretrained(write_checkpoint(hub.repository(RCC), "rcc"))
    with pytest.raises(CheckpointError, match=r"names no compression method, .* \(pass method="):
        load_compressor(hub.repository(RCC), device="cpu")
    assert load_compressor(RCC, device="cpu").method == "rcc"


def test_only_weights_that_are_read_are_fetched_and_only_once(hub):
    both, old = hub.repository("owner/both"), hub.repository("owner/old")
    write_checkpoint(both, "autocompressor-llama")
    write_checkpoint(old, "autocompressor-llama", "sharded bin")
    for path in old.iterdir():
        (both / path.name).write_bytes(path.read_bytes())
    for repository in (both, old):
        (repository / "original").mkdir()
        for name in ("modeling_llama.py", "training_args.bin", "optimizer.bin", "README.md", "original/params.json"):
            (repository / name).write_text("{}")
    (both / "consolidated.safetensors").write_text("")
    first, second = (load_compressor(f"owner/{name}", device="cpu") for name in ("both", "old"))
    assert first.fingerprint == second.fingerprint
    assert hub.asked == ["owner/both", "owner/old", "owner/old"]
    small = {"config.json", "generation_config.json", "pytorch_model.bin.index.json"}
    shards = {f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    files = {name: {path.name for path in hub.snapshot(f"owner/{name}").rglob("*")} for name in ("both", "old")}
    assert files == {"both": small | {"model.safetensors"}, "old": small | shards}


# Adapters, which are on no hub.


@pytest.mark.parametrize("row", ADAPTERS, ids=by_name)
def test_an_adapters_base_is_known_by_the_name_of_its_folder(row, hub, drive, tokenizer):
    tokenizer.save_pretrained(write_llama(hub.repository(row.base), max_position_embeddings=row.positions))
    compressor = load_compressor(download(drive, row), device="cpu")
    assert (compressor.method, compressor.num_comp_tokens) == ("ccm", row.slots)
    assert f"-online-{compressor.attn_type}-" in row.name
    assert compressor.merges == (row.keeps == "mean")
    assert compressor.sink == ("-sink" in row.name)
    assert compressor.backbone.max_positions == row.positions
    assert set(hub.asked) == {row.base}
    memory = compressor.compress(["The ferry sails twice a day."], segment_lengths=4)[0]
    steps = 1 if compressor.merges else -(-memory.source_tokens // 4)
    assert memory.slots == compressor.sink + row.slots * steps


def test_a_base_that_is_given_comes_first(hub, drive, tmp_path):
    folder = download(drive, adapter_row("llama-7b-no-online-merge_recur-ntok8"))
    given = write_llama(tmp_path / "given")
    compressor = load_compressor(folder, base_model=given, device="cpu")
    assert compressor.base_places == {"base_model": str(given)}
    # So does one that the adapter names, if it is there.
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(given)}))
    assert load_compressor(folder, device="cpu").fingerprint == compressor.fingerprint
    assert hub.asked == []


@pytest.mark.parametrize("row", ADAPTERS, ids=by_name)
def test_an_adapters_name_alone_says_where_it_is(row, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (row.name, row.drive, f"finetune/{row.name}"):
        with pytest.raises(CheckpointError, match=r"is not on the hub; .* only as a folder on their drive") as error:
            load_compressor(name)
        assert all(part in str(error.value) for part in (row.name, row.drive, CCM_DRIVE, row.base))
    assert hub.asked == []


def test_a_missing_first_stage_is_told_before_the_base_is_fetched(hub, drive):
    folder = download(drive, adapter_row("llama-7b-no-online-concat_recur-ntok2"))
    (folder.parent / "llama-7b-no").rename(drive / "elsewhere")
    with pytest.raises(CheckpointError, match=r"on top of the LoRA adapter llama-7b-no, .* \(pass finetune"):
        load_compressor(folder)
    with pytest.raises(InputError, match="ccm has no setting ratio"):
        load_compressor(folder, finetune=drive / "elsewhere", ratio=4)
    assert hub.asked == []
    write_llama(hub.repository(LLAMA))
    assert load_compressor(folder, finetune=drive / "elsewhere", device="cpu").num_comp_tokens == 2


def test_a_library_finds_an_adapter_and_its_base_again(hub, drive, tokenizer, corpus, embedder, tmp_path):
    tokenizer.save_pretrained(write_llama(hub.repository(CHAT)))
    folder = download(drive, adapter_row("llama-2-7b-chat-online-merge_recur-ntok8-sink"))
    made_with = load_compressor(folder, device="cpu", segment_tokens=7)
    library = Library.create(tmp_path / "library", made_with, embedder, chunk_tokens=32, overlap_tokens=4)
    assert library.add(corpus).documents == 3
    again = Library.open(tmp_path / "library", embedder=embedder, device="cpu")
    assert again.compressor.fingerprint == made_with.fingerprint
    assert again.compressor.segment_tokens == 7


# Out of reach.


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", r"gated on the hub \(accept its licence at https://huggingface\.co/{name}, .*hf auth login"),
        ("RepositoryNotFoundError", r"there is no model {name} on the hub"),
        ("LocalEntryNotFoundError", r"{name} is not in the local cache and could not be down.* \(check the network"),
        ("HfHubHTTPError", r"{name} could not be downloaded: HfHubHTTPError: 403 Client Error"),
    ],
)
def test_what_is_out_of_reach_is_named(kind, message, hub, drive):
    hub.failures = {ULTRAGIST: hub_error(kind), CHAT: hub_error(kind)}
    with pytest.raises(CheckpointError, match=message.format(name=ULTRAGIST)):
        load_compressor(ULTRAGIST)
    folder = download(drive, adapter_row("llama-2-7b-chat-online-concat_recur-ntok2-sink_pajama"))
    with pytest.raises(CheckpointError, match=message.format(name=CHAT)) as error:
        load_compressor(folder)
    assert str(error.value).startswith(f"the base model of {folder.name} is missing: ")
    assert "pass base_model=..., where a copy lies" in str(error.value)


def test_a_broken_transfer_is_told_from_a_wrong_name(hub):
    hub.failures = {ULTRAGIST: OSError(28, "No space left on device")}
    with pytest.raises(CheckpointError, match=r"could not be downloaded: OSError: .*No space left on device"):
        load_compressor(ULTRAGIST)


def test_a_tokenizer_that_is_out_of_reach_is_named(hub):
    write_checkpoint(hub.repository(RCC), "rcc")
    hub.failures = {"EleutherAI/pythia-1.4b": hub_error("LocalEntryNotFoundError")}
    message = (
        f"{RCC} has no tokenizer, and that of its base is missing: EleutherAI/pythia-1.4b is not in the local cache"
    )
    with pytest.raises(CheckpointError, match=message):
        load_compressor(RCC, device="cpu")


def test_an_adapter_that_names_no_base_or_one_that_is_not_there(drive, hub):
    folder = write_ccm(drive / "mine-online-merge_recur-ntok2", "merge_recur", 2, base=None)
    with pytest.raises(CheckpointError, match=r"does not say of which model \(pass base_model"):
        load_compressor(folder)
    write_ccm(folder, "merge_recur", 2, base="/data/llama-7b")
    with pytest.raises(CheckpointError, match=r"base model of mine-.* is missing: .* no checkpoint folder at /data"):
        load_compressor(folder)

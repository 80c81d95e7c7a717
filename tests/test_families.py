"""Families of models: keys and values kept and placed anew give what the text gives, or the model is refused."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError
from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.compressors.ccm import CCM
from ctxdocs.compressors.rcc import RCC
from ctxdocs.generation import GenerationOptions, generate
from ctxdocs.modeling.backbone import Backbone
from ctxdocs.modeling.probe import check_keys, check_stages

from .conftest import tiny_gist, tiny_model
from .test_reading_kv import GQA, HALF, LLAMA3, TINY, YARN, Exact

IDS = torch.arange(20, 75)
PROMPT = [5, 6, 7, 8]
NO_END = {"eos_token_ids": ()}

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-3.1": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 80}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 8, "rope_parameters": YARN}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 80, "final_logit_softcapping": 3.0}),
    "starcoder2": ("Starcoder2Config", {}),
    "stablelm-partial": ("StableLmConfig", {"rope_parameters": HALF}),
    "smollm3-rotary": ("SmolLM3Config", {"no_rope_layers": [1, 1]}),
    "nemotron": ("NemotronConfig", {}),
}


def family(name, **changes):
    """A causal language model of a family with random weights."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, name)(**{**TINY, **GQA, "bos_token_id": 1, "pad_token_id": 0, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def plain(model, ids):
    return model(torch.as_tensor(ids)[None]).logits[0]


def same(first, second):
    assert (first.slots, first.span, first.source_tokens) == (second.slots, second.span, second.source_tokens)
    close(first.tensors(), second.tensors())


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    name, changes = FAMILIES[request.param]
    return family(name, **changes)


def test_raw_slots_read_back_are_the_text(model):
    gist = tiny_gist("beacon", model=model, ratio=0)
    documents = [IDS[:40], IDS[40:49]]
    memories = gist.compress_ids(documents)
    assert [memory.slots for memory in memories] == [40, 9]
    close(gist.logits(PROMPT, memories[:1]), plain(model, [*IDS[:40].tolist(), *PROMPT])[40:])
    # Behind text too: the memory's keys are turned on by what stands in front of it.
    before, after = torch.tensor([11, 12, 13]), torch.tensor(PROMPT)
    together = gist.prefill([[before, memories[1], after]])[0][0]
    alone = gist.compress_ids([before])[0]
    close(together, gist.logits(PROMPT, [alone, memories[1]])[-1])


def test_text_behind_nothing_is_read_by_the_base_model(model):
    gist = tiny_gist("beacon", model=model, placement="append")
    text = plain(model, IDS[:12])
    close(gist.session().feed(IDS[:12]), text)
    close(gist.logits(IDS[:12]), text)
    ccm = tiny(CCM, model)
    close(ccm.session().feed(IDS[:12]), text)
    close(ccm.logits(IDS[:12]), text)


def test_batches_equal_their_rows_and_pieces_the_whole(model):
    documents = [IDS[:20], IDS[3:6]]
    for compressor in (tiny_gist("beacon", model=model), tiny(CCM, model)):
        together = compressor.compress_ids(documents, batch_tokens=1000)
        for document, memory in zip(documents, together, strict=True):
            same(memory, compressor.compress_ids([document])[0])
        whole, pieces = compressor.session(), compressor.session()
        close(torch.cat([pieces.feed(piece) for piece in IDS[:20].split([9, 11])]), whole.feed(IDS[:20]))
        same(pieces.memory(), whole.memory())


def test_generation_behind_memories_equals_reading_anew(model):
    gist = tiny_gist("beacon", model=model)
    first, second = gist.compress_ids([IDS[:20], IDS[40:47]])
    prompts = [[first, second, torch.tensor(PROMPT)], [torch.tensor([9]), second, torch.tensor([10, 11])]]
    options = GenerationOptions(max_new_tokens=3, **NO_END)
    for prompt, result in zip(prompts, generate(gist, prompts, options), strict=True):
        ids = []
        for _ in range(3):
            ids.append(int(gist.prefill([[*prompt, torch.tensor(ids, dtype=torch.long)]])[0][0].argmax()))
        assert result.ids == ids


def tiny(method, model):
    """A compressor whose own parameters are not those of the start."""
    compressor = method(model, num_comp_tokens=2, sink=True, segment_tokens=12)
    torch.manual_seed(7)
    for parameter in compressor.own_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    return compressor.requires_grad_(False).eval()


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "Olmo2Config"])
def test_rcc_takes_other_families_than_the_published_one(name):
    encoder = family(name)
    rcc = RCC(family(name), encoder, ratio=4, window=16).requires_grad_(False).eval()
    memories = rcc.compress_ids([IDS[:20], IDS[:5]])
    windows = rcc.fill_windows(IDS[:5])[None]
    states = torch.stack(encoder.base_model(windows, output_hidden_states=True).hidden_states, dim=2)[0]
    close(memories[1].states, states[3::4])
    together = rcc(torch.cat([memory.states for memory in memories])[None], torch.tensor([PROMPT]))[0]
    close(rcc.logits(PROMPT, memories), together[-len(PROMPT) :])
    with pytest.raises(InputError, match="GPT2LMHeadModel has no list of layers"):
        RCC(family("GPT2Config"), encoder, ratio=4, window=16)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("CohereConfig", {}, "layer 0 of CohereForCausalLM caches something else .* as in Llama"),
        ("Glm4Config", {}, "layer 0 of Glm4ForCausalLM caches something else"),
        ("Ernie4_5Config", {}, "layer 0 of Ernie4_5ForCausalLM caches something else"),
        (
            "GptOssConfig",
            {"num_local_experts": 2, "num_experts_per_tok": 1},
            "layer 0 of GptOssForCausalLM caches something else",
        ),
        ("SmolLM3Config", {"num_hidden_layers": 4}, "layer 3 of SmolLM3ForCausalLM caches something else"),
        ("Exaone4Config", {}, "layer 0 of Exaone4ForCausalLM caches something else"),
        ("Gemma3TextConfig", {}, "Gemma3ForCausalLM has a rotary embedding for each kind of layer"),
        ("Olmo3Config", {}, "Olmo3ForCausalLM has a rotary embedding for each kind of layer"),
        ("FalconConfig", {}, "attention layers of FalconForCausalLM are of no known layout"),
        ("GPT2Config", {}, "GPT2LMHeadModel has no rotary embedding"),
    ],
)
def test_keys_that_cannot_be_placed_are_refused(name, changes, message):
    model = family(name, **changes)
    check_stages(Backbone(model))  # as text, such models are read right
    with pytest.raises(InputError, match=message):
        check_keys(Backbone(model))
    with pytest.raises(InputError, match=message):
        tiny_gist("beacon", model=model)
    with pytest.raises(InputError, match=message):
        Exact(model)


def test_fused_projections_are_read_and_refused_where_tokens_need_projections_of_their_own():
    model = family("Phi3Config")
    check_keys(Backbone(model))
    with pytest.raises(InputError, match="Phi3ForCausalLM has no q_proj, k_proj, v_proj, which gist tokens replace"):
        tiny_gist("beacon", model=model)
    with pytest.raises(InputError, match="Phi3ForCausalLM has no separate q, k, v and o projections"):
        CCM(model, num_comp_tokens=2)


def test_projections_that_a_model_lacks_are_named():
    with pytest.raises(InputError, match="Starcoder2ForCausalLM has no up_proj, down_proj, which gist tokens replace"):
        tiny_gist("ultragist", model=family("Starcoder2Config"), projections=("q", "mlp"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("CohereConfig", {"logit_scale": 0.3}),
        ("GraniteConfig", {"logits_scaling": 3.0}),
        ("Gemma2Config", {"final_logit_softcapping": 3.0}),
    ],
)
def test_logits_are_scaled_as_the_model_does(name, changes):
    model = family(name, **changes)
    compressor = AutoCompressor(model, summary_length=2)
    close(compressor.logits(PROMPT), plain(model, PROMPT))
    close(compressor.prefill([[torch.tensor(PROMPT)]])[0], plain(model, PROMPT)[-1:])
    close(compressor(torch.tensor([PROMPT]))[0][0], plain(model, PROMPT))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("HyperCLOVAXConfig", {"logits_scaling": 3.0}, "HyperCLOVAXForCausalLM does not compute its logits from"),
        ("BertConfig", {"is_decoder": True}, "BertLMHeadModel does not compute its logits from"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has layers that keep a running"),
    ],
)
def test_models_that_cannot_be_read_in_stages_are_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        AutoCompressor(family(name, **changes), summary_length=2)


def test_a_probe_leaves_the_model_as_it_was():
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = torch.get_rng_state()
    backbone = Backbone(model)
    check_stages(backbone)
    check_keys(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# Layers that see no further than a window.


@pytest.mark.parametrize("name", ["MistralConfig", "Gemma2Config"])
def test_within_its_sliding_window_nothing_is_lost_and_beyond_it_nothing_is_read(name):
    model = family(name, sliding_window=24, **({"head_dim": 8} if name == "Gemma2Config" else {}))
    gist = tiny_gist("beacon", model=model, ratio=0, window=8)
    memories = gist.compress_ids([IDS[:12], IDS[12:20]])
    close(gist.logits(PROMPT, memories[:1]), plain(model, [*IDS[:12].tolist(), *PROMPT])[12:])
    assert gist.logits(PROMPT, memories).shape == (4, 120)
    with pytest.raises(InputError, match="take 25 positions, 1 more than the 24 of its sliding window"):
        gist.logits([*PROMPT, 9], memories)
    with pytest.raises(InputError, match="a document of 25 tokens takes up to 25 positions, 1 more than the 24 of its"):
        gist.compress_ids([IDS[:25]])
    with pytest.raises(InputError, match="positions, 8 more than the 24 of its sliding window"):
        gist.session().feed(IDS[:32])
    assert len(gist.generate_ids(PROMPT, memories[:1], max_new_tokens=50, **NO_END)) == 24 - 16 + 1


def test_padding_of_a_batch_counts_in_a_sliding_window():
    gist = tiny_gist("beacon", model=family("MistralConfig", sliding_window=24), ratio=0, window=8)
    memory = gist.compress_ids([IDS[:16]])[0]
    short, long = [memory, torch.tensor([5, 6])], [torch.arange(20)]
    options = GenerationOptions(max_new_tokens=3, **NO_END)
    assert [len(generate(gist, [prompt], options)[0].ids) for prompt in (short, long)] == [3, 3]
    with pytest.raises(
        InputError, match=r"take 36 places, 12 more than the 24 .* \(read fewer of them, or prompts one"
    ):
        generate(gist, [short, long], options)
    # What the longer prompt leaves is what there is for both.
    prompts = [[torch.tensor([5])], [torch.arange(20)]]
    ended = generate(gist, prompts, GenerationOptions(max_new_tokens=30, **NO_END))
    assert [len(result.ids) for result in ended] == [5, 5]
    assert ended[0].ids == generate(gist, prompts[:1], GenerationOptions(max_new_tokens=5, **NO_END))[0].ids


def test_qwen2_slides_only_where_it_is_told_to():
    assert Backbone(family("Qwen2Config", sliding_window=24)).max_positions == 512
    told = family("Qwen2Config", sliding_window=24, use_sliding_window=True, max_window_layers=1)
    assert Backbone(told).max_positions == 24


# Angles that depend on how much is read.


def test_longrope_is_read_up_to_the_length_of_its_pretraining():
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = family("Phi3Config", rope_parameters=scaling, original_max_position_embeddings=32)
    exact = Exact(model)
    memory = exact.compress_ids([IDS[:20]])[0]
    close(exact.logits(PROMPT, [memory]), plain(model, [*IDS[:20].tolist(), *PROMPT])[20:])
    with pytest.raises(InputError, match="take 33 positions, 1 more than the model's 32"):
        exact.logits(IDS[:13], [memory])


def test_dynamic_scaling_is_read_up_to_the_models_positions():
    model = family("LlamaConfig", rope_parameters=DYNAMIC, max_position_embeddings=32)
    gist = tiny_gist("beacon", model=model, ratio=0, window=8)
    with pytest.raises(
        InputError, match="a document of 33 tokens takes up to 33 positions, 1 more than the model's 32"
    ):
        gist.compress_ids([IDS[:33]])

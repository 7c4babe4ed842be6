"""Decoders of transformers over paged attention give transformers' own logits and tokens: alone, in a batch, in chunks, with few blocks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.attention.interface import CacheShape, Rows, new_cache
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.errors import LoadError
from gpu_worker.loading import transformers_config
from gpu_worker.loading.model_files import fingerprint, open_model
from gpu_worker.loading.transformers_config import TransformersConfig, outline
from gpu_worker.models.transformers_model import load_transformers
from gpu_worker.runners import make_runner
from gpu_worker.settings import WorkerSettings
from tests.gpu_worker.model_driver import Loaded, generate, greedy, load, wander
from tests.gpu_worker.worker_plans import draw_sequences

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VOCABULARY = 211
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, scores divided by the layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 32}),
    "gemma2, windows and caps": (
        "gemma2",
        {**GROUPED, "sliding_window": 24, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("gemma3_text", {**GROUPED, "sliding_window": 20, "query_pre_attn_scalar": 50, "sliding_window_pattern": 3}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi with normed queries and keys": ("phi", {"qk_layernorm": True, "num_key_value_heads": 2}),
    "phi3 with a window": ("phi3", {"num_key_value_heads": 2, "sliding_window": 30}),
    "olmo": ("olmo", {"num_key_value_heads": 2, "clip_qkv": 2.0}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("cohere", {"num_key_value_heads": 2, "logit_scale": 0.3}),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 96}),
    "gpt_neox": ("gpt_neox", {}),
    "granite": ("granite", {"num_key_value_heads": 2, "attention_multiplier": 0.2, "logits_scaling": 3.0}),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 40, "global_attn_every_n_layers": 2}),
    "hunyuan, whose router asks a linear for its dtype": ("hunyuan_v1_moe", {**GROUPED, "num_experts": 4, "moe_topk": 2}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "olmo3": ("olmo3", {"num_key_value_heads": 2, "sliding_window": 20}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 2, "sliding_window": 40}),
}


def _made(folder: Path, kind: str, extra: dict[str, Any]) -> Any:
    """A random model of transformers, written to the folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05 if len(parameter) == VOCABULARY else 0.3)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    return model


def _ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _load(folder: Path, **settings: Any) -> Loaded:
    return load(model=str(folder), **{"num_gpu_blocks": 60, "max_model_len": 200, "max_num_seqs": 8, "threads": 1, **settings})


@torch.inference_mode()
def _logits(folder: Path, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """All of a sequence's logits, in chunks that end where `cuts` say."""
    config = open_model(WorkerSettings(run_dir=folder, model=str(folder))).config
    assert isinstance(config, TransformersConfig)
    model = load_transformers(config, folder, CPU, torch.float32)
    shape = CacheShape(config.layers, 20, config.kv_heads, 16, config.head_dim)
    attention = TorchAttention(new_cache(shape, CPU, torch.float32), shape, config.heads, config.scoring)
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)]):
        table = np.arange(20, dtype=np.int32)[None, ::-1]
        attention.begin(Rows(np.array([start], np.int32), np.array([stop - start], np.int32), table, np.zeros(1, bool)))
        count = torch.arange(stop - start)
        outputs.append(model.logits(model.forward(torch.tensor(ids[start:stop]), count + start, count, attention, lambda: None)))
    return torch.cat(outputs)


def _check_logits(folder: Path, kind: str, extra: dict[str, Any]) -> Any:
    reference = _made(folder, kind, extra)
    assert len(list(folder.glob("*.safetensors"))) > 1, "not sharded"
    ids = _ids(90, 1)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    assert torch.allclose(_logits(folder, ids, [40, 41, 60]), expected, atol=1e-4, rtol=1e-4)
    return reference


def _alone(reference: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers generates, without a choice of its own about the end."""
    with torch.inference_mode():
        made = reference.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    reference = _check_logits(tmp_path, *CASES[case])
    loaded = _load(tmp_path)
    prompts = [_ids(n, n) for n in (30, 1, 90, 47)]
    expected = [_alone(reference, prompt, 24) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 10, "a model that says one thing proves little"
    params = [greedy(24)] * 4
    assert [generate(loaded, [p], params[:1], [0])[0] for p in prompts] == expected, "alone"
    assert generate(loaded, prompts, params, [0] * 4) == expected, "together"
    assert generate(loaded, prompts, params, [0] * 4, chunk=13) == expected, "in chunks"


@pytest.mark.parametrize("case", MORE)
def test_logits_of_more_decoders_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    _check_logits(tmp_path, *MORE[case])


@pytest.mark.parametrize("case", ["gpt2", "gemma2, windows and caps"])
def test_scarce_blocks_shared_prefixes_and_swaps_change_no_token(tmp_path: Path, case: str) -> None:
    reference = _made(tmp_path, *CASES[case])
    loaded = _load(tmp_path, num_gpu_blocks=25, num_cpu_blocks=10, max_num_batched_tokens=64)
    sequences = draw_sequences(Random(3), 8, loaded.description.geometry, [greedy(14)])
    everything = [s for parent in sequences for s in (parent, *parent.children)]
    planner = wander(loaded, sequences, 3)
    assert planner.events["chunk"]
    assert planner.events["shared"]
    assert planner.events["recompute"] + planner.events["swap out"]
    for s in everything:
        assert s.known == _alone(reference, s.prompt, 14), f"sequence {s.record}"


def _raw(kind: str, **extra: Any) -> dict[str, Any]:
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return {**COMMON, "model_type": kind, "architectures": [name], **extra}


PHIMOE_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 8, "long_factor": [2.0] * 8}
PHIMOE_ROPE |= {"short_mscale": 1.2, "long_mscale": 1.2, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"architectures": ["ReplyForCausalLM"]}, "ReplyForCausalLM is not supported: transformers .* has no such causal language model"),
        ({"architectures": []}, "names no architectures; supported are the Llama"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "mamba"}, "model_type 'mamba' is not the type of such a model"),
        (_raw("gpt2", quantization_config={"quant_method": "gptq"}), "quantization_config: its weights must have 16 or 32 bits"),
        (_raw("gpt2", compression_config={"format": "int-quantized"}), "compression_config: its weights must have 16 or 32 bits"),
        (_raw("bart", is_encoder_decoder=True), "is_encoder_decoder"),
        (_raw("bloom"), "transformers gives this model_type no replaceable attention"),  # ALiBi
        (_raw("mamba"), "transformers gives this model_type no replaceable attention"),
        (_raw("bert"), "layer_types: layer 0 does not attend to all that came before"),
        (_raw("gemma3"), "text_config: models of more than text are not served"),
        (
            _raw("gpt_oss", num_key_value_heads=2, num_local_experts=4, layer_types=["full_attention"] * 3),
            "s_aux: its attention takes what ours",
        ),
        (
            _raw("lfm2", layer_types=["conv", "full_attention", "conv"], num_key_value_heads=2),
            "layer_types: 'conv' is none of",
        ),
        (_raw("deepseek_v3", n_routed_experts=4, n_group=1, topk_group=1), "head_dim: queries, keys and values of all layers"),
        (
            _raw("olmo", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rope_parameters: the rope_type 'dynamic'",
        ),
        (
            _raw("phimoe", original_max_position_embeddings=64, rope_parameters=PHIMOE_ROPE),
            "rope_parameters: with the rope_type 'longrope' its code chooses by what tensors hold",
        ),
        (_raw("gpt2", num_attention_heads=5), "GPT2LMHeadModel is not supported: transformers cannot compute it from this config.json"),
        (_raw("gpt2", add_cross_attention="no"), "transformers cannot read this config.json"),
    ],
)
def test_what_paged_attention_cannot_do_is_refused_in_one_line_that_names_the_field(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadError, match=says) as refusal:
        outline(raw)
    assert "\n" not in str(refusal.value)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LoadError, match=r"GPT2LMHeadModel is not supported; .* with the extra pagewire\[transformers\] more"):
        outline({**COMMON, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})


def test_a_folder_says_what_the_model_is_and_every_figure_of_it_counts(tmp_path: Path) -> None:
    _made(tmp_path, *CASES["gemma2, windows and caps"])
    files = open_model(WorkerSettings(run_dir=tmp_path, model=str(tmp_path)))
    config = files.config
    assert isinstance(config, TransformersConfig)
    assert (config.family, config.layers, config.heads, config.kv_heads, config.head_dim) == ("gemma2", 3, 4, 2, 32)
    assert (config.vocab_size, config.hidden, config.intermediate, config.max_length) == (VOCABULARY, 64, 96, 256)
    assert [s.window for s in config.scoring] == [24, 0, 24]
    assert {(s.scale, s.softcap) for s in config.scoring} == {(20**-0.5, 3.0)}
    raw = json.loads((tmp_path / "config.json").read_text())
    other = replace(files, config=outline({**raw, "rms_norm_eps": 1e-3}))
    assert fingerprint(other, "float32", False, "float32", 0) != fingerprint(files, "float32", False, "float32", 0)


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert {s.window for s in outline(_raw("phi3", sliding_window=256)).scoring} == {0}
    assert {s.window for s in outline(_raw("phi3", sliding_window=255)).scoring} == {255}


def test_longrope_is_served_up_to_the_length_at_which_it_turns_otherwise() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = outline(
        _raw("phi3", original_max_position_embeddings=64, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})
    )
    config.check_length(64)
    with pytest.raises(LoadError, match=r"rope_type 'longrope'.*--max-model-len 64"):
        config.check_length(65)


def test_weights_that_lack_a_tensor_or_have_other_sizes_are_refused(tmp_path: Path) -> None:
    _made(tmp_path, *CASES["gpt2"])
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "n_layer": 4, "num_hidden_layers": 4}))
    with pytest.raises(LoadError, match=r"missing keys among the weights: .*h\.3"):
        _load(tmp_path)
    path.write_text(json.dumps({**raw, "n_inner": 80}))
    with pytest.raises(LoadError, match=r"mismatched keys among the weights: .*c_fc"):
        _load(tmp_path)


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_weights_with_scales_that_config_json_is_silent_about_are_refused(tmp_path: Path, dtype: torch.dtype, most: int) -> None:
    _made(tmp_path, *CASES["olmo2"])
    for file in tmp_path.glob("*.safetensors"):
        stored = {}
        for name, values in load_file(file).items():
            stored[name] = values
            if name.endswith("_proj.weight"):
                scale = values.abs().amax(1, keepdim=True) / most
                stored |= {name: (values / scale).to(dtype), name.replace("weight", "weight_scale"): scale}
        save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"_proj\.weight is stored as (I8|F8_E4M3), which is not supported; F64, F32, F16, BF16 are"):
        _load(tmp_path)


def test_masks_and_positions_that_older_tools_stored_too_are_no_weights(tmp_path: Path) -> None:
    _made(tmp_path, *CASES["gpt2"])
    more = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril(),
        "transformer.position_ids": torch.arange(256)[None],
        "transformer.steps": torch.tensor(3),
    }
    file = next(tmp_path.glob("*.safetensors"))
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    assert len(generate(_load(tmp_path), [_ids(9, 1)], [greedy(3)], [0])[0]) == 3


def test_pickled_weights_and_code_that_a_folder_brings_along_are_not_touched(tmp_path: Path) -> None:
    model = _made(tmp_path, *CASES["gpt2"])
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**raw, "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    _load(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"no \*\.safetensors"):
        _load(tmp_path)


def test_random_weights_come_from_the_seed(tmp_path: Path) -> None:
    _made(tmp_path, *CASES["phi"])
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    prompt = [_ids(20, 5)]
    first, again, other = (_load(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    tokens = [generate(loaded, prompt, [greedy(8)], [0]) for loaded in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert first.description.fingerprint == again.description.fingerprint != other.description.fingerprint


def test_a_model_that_comes_out_otherwise_than_from_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _made(tmp_path, *CASES["olmo"])
    read = transformers_config._scoring
    monkeypatch.setattr(transformers_config, "_scoring", lambda call, name: replace(read(call, name), scale=1.0))
    with pytest.raises(LoadError, match=r"OlmoForCausalLM is not supported: over paged attention its logits are .* off"):
        _load(tmp_path)


def test_in_float32_no_token_may_come_out_otherwise_and_in_half_precision_less_than_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 8 changes the last of the 9 tokens that are compared, and no other."""
    _made(tmp_path, *CASES["olmo"])
    read = transformers_config._scoring
    monkeypatch.setattr(transformers_config, "_scoring", lambda call, name: replace(read(call, name), window=8))
    config = outline(json.loads((tmp_path / "config.json").read_text()))
    with torch.inference_mode():
        load_transformers(config, tmp_path, CPU, torch.bfloat16)
        with pytest.raises(LoadError, match=r"OlmoForCausalLM is not supported: over paged attention its logits are .* off"):
            load_transformers(config, tmp_path, CPU, torch.float32)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    _made(tmp_path, *CASES["gpt2"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="adapter"):
        _load(tmp_path)


def test_the_kernels_of_a_card_leave_these_models_to_torch(tmp_path: Path) -> None:
    _made(tmp_path, *CASES["gpt2"])
    settings = WorkerSettings(run_dir=tmp_path, model=str(tmp_path), device="cuda")
    assert type(make_runner(settings, {})).__name__ == "TorchRunner"
    assert type(make_runner(replace(settings, attention="triton"), {})).__name__ == "CudaRunner"
    assert type(make_runner(replace(settings, model=""), {})).__name__ == "CudaRunner"

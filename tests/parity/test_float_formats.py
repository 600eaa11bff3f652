"""Small floats from the recipe to plain transformers: FP8, MXFP8, MXFP4, NVFP4, with and without rounded inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fettle
from fettle.errors import CheckpointError, NonFiniteError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import parse_recipe

from .test_save_and_reload import plain_transformers
from .tiny_models import COMMON, random_ids, reference_output

IDS = random_ids(23, seed=5)
FP8 = {"grid": "float", "bits": 8}
FP4 = {"grid": "float", "bits": 4}
TOKEN = {"activations": "dynamic", "activation_grid": "float"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "fp8 a tensor": ({**FP8, "granularity": "tensor"}, "float-quantized"),
    "fp8 a channel, bfloat16": ({**FP8, "granularity": "channel", "scale_dtype": "bfloat16"}, "float-quantized"),
    "fp8 groups": ({**FP8, "group_size": 16}, "float-quantized"),
    "fp8, inputs fp8 a token": ({**FP8, "granularity": "channel", **TOKEN}, "float-quantized"),
    "fp8, inputs fp8 static": (
        {**FP8, "granularity": "tensor", **TOKEN, "activations": "static", "observer": "mse"},
        "float-quantized",
    ),
    "fp8, inputs int8 a token": ({**FP8, "granularity": "channel", "activations": "dynamic"}, "float-quantized"),
    "int4, inputs fp8 a token": ({"bits": 4, "group_size": 16, **TOKEN}, "pack-quantized"),
    "mxfp8": ({**FP8, "group_size": 32, "scale_dtype": "float8_e8m0fnu"}, "mxfp8-quantized"),
    "mxfp4": ({**FP4, "group_size": 32, "scale_dtype": "float8_e8m0fnu"}, "mxfp4-pack-quantized"),
    "nvfp4": ({**FP4, "group_size": 16, "scale_dtype": "float8_e4m3fn"}, "nvfp4-pack-quantized"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole groups."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**COMMON, "intermediate_size": 64}, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def byte_tokenizer() -> dict[str, Any]:
    """A word a letter: enough to cut a text into windows."""
    vocabulary = {"<unk>": 0, **{chr(96 + letter): letter for letter in range(1, 27)}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}


def compress(base: Path, out: Path, *steps: dict[str, Any]) -> Path:
    text = out.with_name("text.txt")
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    recipe = {"steps": list(steps), "calibration": {"windows": 4, "length": 24, "text": str(text)}}
    fettle.compress(base, out, parse_recipe(recipe, "test"), evaluate=False)
    return out


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_the_same_logits(base: Path, tmp_path: Path, case: str) -> None:
    fields, storage = CASES[case]
    out = compress(base, tmp_path / "out", {"method": "round_to_nearest", **fields})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", storage)
    ours = reference_output(fettle.load(out).model, IDS)
    theirs = reference_output(plain_transformers(out, "AutoModelForCausalLM"), IDS)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-6)
    original = reference_output(fettle.load(base).model, IDS)
    assert 0 < float((ours - original).abs().mean()) < 0.3 * float(original.abs().mean())
    checkpoint = Checkpoint.open(out)
    stored = stored_schemes(checkpoint, read_anatomy(checkpoint))
    assert {found.storage for found in stored.values()} == {storage}
    ledger = json.loads((out / "fettle.json").read_text())["ledger"]
    held = sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith(f"{ledger[0]['linear']}."))
    assert ledger[0]["bits_per_weight"] == 8 * held / (32 * 32)


SEVERAL = [
    {"method": "round_to_nearest", **CASES["fp8, inputs fp8 a token"][0]},
    {"method": "round_to_nearest", **CASES["mxfp4"][0], **TOKEN, "where": {"role": "down"}},
    {"method": "round_to_nearest", **CASES["nvfp4"][0], "where": {"role": "gate"}},
    {"method": "round_to_nearest", "bits": 8, "granularity": "channel", "where": {"role": "up"}},
]


def test_several_formats_in_a_bfloat16_model(base: Path, tmp_path: Path) -> None:
    """The standard decompresses four bits to bfloat16 at the first product: weights are compared, then logits."""
    import transformers

    narrow = tmp_path / "narrow"
    transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(narrow)
    for side in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / side, narrow)
    out = compress(narrow, tmp_path / "out", *SEVERAL)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "mixed-precision")
    plain = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    theirs = reference_output(plain, IDS)
    loaded = fettle.load(out, dtype="bfloat16")
    packed = [linear.name for linear in loaded.anatomy.linears() if linear.role in ("down", "gate")]
    assert len(packed) == 2 * 3
    for name in packed:  # eight bits have float32 scales here, which a bfloat16 loader rounds first
        dense = loaded.model.get_submodule(name).dequantize(torch.bfloat16)
        assert torch.equal(plain.get_submodule(name).weight, dense), name
    torch.testing.assert_close(theirs, reference_output(loaded.model, IDS), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("bits", "preset"), [(4, "MXFP4"), (8, "MXFP8")])
def test_weights_and_inputs_in_the_mx_formats(base: Path, tmp_path: Path, bits: int, preset: str) -> None:
    """The standard's words are its preset's, and plain transformers computes what we do from the same folder."""
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    narrow = tmp_path / "narrow"
    transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(narrow)
    for side in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / side, narrow)
    mx = {"grid": "float", "bits": bits, "group_size": 32, "scale_dtype": "float8_e8m0fnu"}
    inputs = {**TOKEN, "activation_bits": bits, "activation_granularity": "group"}
    out = compress(narrow, tmp_path / "out", {"method": "round_to_nearest", **mx, **inputs})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    wanted = preset_name_to_scheme(preset, ["Linear"]).input_activations
    assert QuantizationArgs(**group["input_activations"]) == wanted
    ours = reference_output(fettle.load(out, dtype="bfloat16").model, IDS)
    alone = compress(narrow, tmp_path / "alone", {"method": "round_to_nearest", **mx})
    weights = reference_output(fettle.load(alone, dtype="bfloat16").model, IDS)
    with torch.compiler.set_stance("force_eager"):
        theirs = reference_output(transformers.AutoModelForCausalLM.from_pretrained(out).eval(), IDS)
    torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.02)
    assert float((ours - weights).abs().mean()) > 2 * float((ours - theirs).abs().mean())  # the inputs are rounded


NVFP4 = {**CASES["nvfp4"][0], **TOKEN, "activation_bits": 4}


def bfloat16(base: Path, folder: Path) -> Path:
    """The same model as its makers would publish it."""
    import transformers

    transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    for side in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / side, folder)
    return folder


def in_float32(folder: Path) -> torch.Tensor:
    """Logits of plain transformers, once it decompressed: in bfloat16 as it does, and then with float32 arithmetic."""
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.compiler.set_stance("force_eager"):  # the standard compiles its rounding
        reference_output(plain, IDS)
        return reference_output(torch.nn.Module.float(plain), IDS)


def test_weights_and_inputs_in_the_nv_format(base: Path, tmp_path: Path) -> None:
    """The standard's words are its preset's, and plain transformers computes what we do from the same folder."""
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    narrow = bfloat16(base, tmp_path / "narrow")
    out = compress(narrow, tmp_path / "out", {"method": "gptq", **NVFP4})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    (group,) = config["config_groups"].values()
    wanted = preset_name_to_scheme("NVFP4", ["Linear"])
    assert QuantizationArgs(**group["input_activations"]) == wanted.input_activations
    assert QuantizationArgs(**group["weights"]) == wanted.weights
    ours = reference_output(fettle.load(out).model, IDS)
    torch.testing.assert_close(in_float32(out), ours, rtol=1e-5, atol=2e-6)
    alone = compress(narrow, tmp_path / "alone", {"method": "gptq", **CASES["nvfp4"][0]})
    weights = reference_output(fettle.load(alone).model, IDS)
    assert float((ours - weights).abs().mean()) > 1e-3  # the inputs are rounded
    checkpoint = Checkpoint.open(out)
    stored = stored_schemes(checkpoint, read_anatomy(checkpoint))
    assert {found.scheme.describe() for found in stored.values()} == {
        "float 4 bits, group 16, float8_e4m3fn scale and a tensor scale; inputs float4 NV, a group of 16"
    }
    evaluated = fettle.evaluate(out, reference=narrow, text=str(tmp_path / "text.txt"), length=32, max_tokens=64)
    assert 0 < evaluated.kl_mean < 0.5  # blocks that are streamed read the stored scale, too


@pytest.mark.parametrize("method", ["round_to_nearest", "gptq", "hqq", "awq", "smoothquant"])
def test_linears_that_runtimes_fuse_share_a_tensor_scale(base: Path, tmp_path: Path, method: str) -> None:
    def scales(name: str, **fields: Any) -> list[dict[str, float]]:
        out = compress(base, tmp_path / name, {"method": method, **CASES["nvfp4"][0], **fields})
        checkpoint = Checkpoint.open(out)
        stem, end = "model.layers.0.", ".weight_global_scale"
        return [
            {part: float(checkpoint.read(f"{stem}{part}{end}")) for part in parts}
            for parts in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("self_attn.o_proj",),
                ("mlp.down_proj",),
            )
        ]

    fused, own = scales("fused"), scales("own", tensor_scale="own")
    for together, each in zip(fused, own, strict=True):
        assert len(set(each.values())) == len(each)
        assert set(together.values()) == {min(each.values())}  # that of the largest weight


def test_several_formats_in_a_float32_model_are_fettles_own(base: Path, tmp_path: Path) -> None:
    out = compress(base, tmp_path / "out", *SEVERAL)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fettle"
    assert "to bfloat16" in config["why"]
    stored = stored_schemes(Checkpoint.open(out), read_anatomy(Checkpoint.open(out)))
    assert len({found.storage for found in stored.values()}) == 4  # in the same tensors
    assert reference_output(fettle.load(out).model, IDS).isfinite().all()


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "MXFP8A16", "MXFP4A16", "NVFP4A16", "NVFP4"])
def test_what_the_standards_own_tools_write_is_read(base: Path, tmp_path: Path, preset: str) -> None:
    """As llm-compressor does it: scales from the largest weights, the standard's compressor, its `save_pretrained`."""
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    dtype = torch.bfloat16 if preset == "NVFP4" else torch.float32
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype).eval()
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])}, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weight = module.weight.data
        parts = weight.unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))
        unit = None
        if hasattr(module, "weight_global_scale"):
            unit = generate_gparam(weight.min(), weight.max()).reshape(1)
            module.weight_global_scale.data = unit
        if scheme.input_activations is not None and hasattr(module, "input_global_scale"):
            module.input_global_scale.data = generate_gparam(torch.tensor(-3.0), torch.tensor(4.0))
        scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights, unit)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    out = tmp_path / "theirs"
    model.save_pretrained(out)
    compressor.update_config(out)
    config_file = json.loads((out / "config.json").read_text())
    if preset not in ("FP8_DYNAMIC", "NVFP4"):  # which round inputs; others become bfloat16 in a float32 model without
        config_file["quantization_config"]["dequantize"] = True
    (out / "config.json").write_text(json.dumps(config_file))
    if preset == "NVFP4":
        theirs = in_float32(out)
    else:
        theirs = reference_output(plain_transformers(out, "AutoModelForCausalLM"), IDS)
    ours = reference_output(fettle.load(out).model, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_damaged_floats_are_named(base: Path, tmp_path: Path) -> None:
    out = compress(base, tmp_path / "out", {"method": "round_to_nearest", **CASES["mxfp4"][0]})
    (out / "fettle.json").unlink()  # as in a folder of somebody else: no hashes that would tell first
    shard = sorted(out.glob("model-*"))[0]
    name = "model.layers.0.mlp.up_proj.weight_scale"

    def changed(target: Path, value: torch.Tensor) -> Path:
        shutil.copytree(out, target)
        save_file({**load_file(shard), name: value}, target / shard.name, {"format": "pt"})
        return target

    scale = load_file(shard)[name]
    with pytest.raises(NonFiniteError, match="weight_scale"):
        fettle.load(changed(tmp_path / "nan", torch.full_like(scale, 255)))
    with pytest.raises(CheckpointError, match=r"dtype torch.float32; of mxfp4-pack-quantized codes fettle reads uint8"):
        fettle.load(changed(tmp_path / "wide", scale.float()))
    config = json.loads((out / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for change, message in (
        ({"group_size": 16}, "which fettle does not read"),
        ({"num_bits": 8}, "which fettle does not read"),
        ({"type": "int"}, "which fettle does not read"),
    ):
        wrong = {
            **config["quantization_config"],
            "config_groups": {"g": group | {"weights": group["weights"] | change}},
        }
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": wrong}))
        with pytest.raises(CheckpointError, match=message):
            fettle.load(out)

"""A base in 4 or 8 bits under adapters: its values, its gradients, its bytes, and what is refused. bitsandbytes' own
kernels for the CPU run here; no GPU has run them."""

import json

import train_direct_distill as direct
from common.direct import pipelines
from common.direct.student import roll_out
from common.errors import UserError
from common.networks import quantized
from tests.cases import one_sentence, train
from tests.direct.test_pipelines import Pairs, student

import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

# Largest relative error of a normal matrix (QLoRA's figure for nf4 is 0.09 to 0.1), and bytes a weight.
ERRORS = {"nf4": (0.11, 0.53), "int8": (0.01, 1.02)}


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_that_of_its_rounded_weights(kind, dtype):
    """Output and gradient of the input, with a bias, under autocast too; nothing of the weights is kept."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 512).to(dtype)
    layer = quantized.QuantizedLinear(plain, kind, "cpu")
    whole, (most, size) = layer.whole(dtype), ERRORS[kind]
    assert whole.dtype == dtype and whole.shape == plain.weight.shape
    assert ((whole - plain.weight).norm() / plain.weight.norm()).item() < most
    parts = [layer.weight, layer.scales, *([layer.state.state2.absmax] if layer.state else [])]
    held = sum(part.nbytes for part in parts)
    assert held < size * plain.weight.numel() and not layer.weight.is_floating_point()
    x, saved = torch.randn(3, 256, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    expected = torch.nn.functional.linear(x, whole, plain.bias)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0])
    assert sum(saved) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("name", ["SD1.5", "Flux", "Qwen-Image", "Wan2.2"])
def test_a_pipeline_with_a_quantized_base_is_near_it_and_its_adapters_train(name, kind):
    pipeline, kwargs, _ = student(name)
    with torch.no_grad():
        expected = pipelines.call(pipeline, Pairs.prompts, Pairs.seeds, **kwargs)
    for network in pipelines.denoisers(pipeline).values():
        blocks = quantized.layers(network)
        assert len(blocks) > 5 and not {"conv_in", "proj_out", "time_embedding.linear_1"} & blocks.keys()
        quantized.quantize([network], kind, "cpu")
        assert not quantized.layers(network) and network.dtype == torch.float32
    pipelines.add_lora(pipeline, 2, 2.0)
    rollout = pipelines.Rollout(pipeline, **kwargs).train()
    made = roll_out(rollout, Pairs(), [0, 1])
    assert ((made - expected).norm() / expected.norm()).item() < (0.05 if kind == "nf4" else 0.002)
    made.square().mean().backward()
    trained = {path: p for path, p in rollout.named_parameters() if p.requires_grad}
    assert all(".lora_" in path and p.dtype == torch.float32 for path, p in trained.items())
    assert sum(p.grad.norm() for p in trained.values() if p.grad is not None) > 1e-3


def test_what_cannot_be_quantized_is_refused(monkeypatch):
    config = {"unet": (UNet2DConditionModel, {"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D",) * 2,
              "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None})}  # fmt: skip
    with pytest.raises(UserError, match="a PixArtAlphaPipeline takes no LoRA in diffusers, so its student is saved"):
        quantized.check("int8", {}, PixArtAlphaPipeline)
    quantized.check(None, {}, PixArtAlphaPipeline)
    quantized.check("int8", config, StableDiffusionPipeline, "cpu")
    quantized.check("nf4", {}, StableDiffusionPipeline, "cpu")

    def no_kernel(*_):
        raise NotImplementedError("no kernel\nbecause of this")

    monkeypatch.setattr(quantized, "pack", no_kernel)
    with pytest.raises(UserError, match="`quantize_base`=nf4 does not run on cpu here .*no kernel.*use a GPU"):
        quantized.check("nf4", {}, StableDiffusionPipeline, "cpu")
    quantized.check("nf4", {}, StableDiffusionPipeline)  # of a dry run, elsewhere
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        quantized.check("nf4", {}, StableDiffusionPipeline)


def test_a_run_on_a_quantized_base(tmp_path, direct_flags, table, capsys):
    """The fingerprint is that of the whole weights; what is saved is a LoRA of the whole teacher."""
    own = {"lora_rank": 4, "max_train_steps": 2, "quantize_base": "nf4"}
    out = tmp_path / "out"
    train(direct_flags(out, "dit", **own), direct)
    result = json.loads((out / "held_out.json").read_text())
    assert 0 < result["relative_mse"] < 2 * result["untrained"]
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    words = direct_flags(tmp_path / "o", lora_rank=4, quantize_base="nf4", pairs_dir=None,
                         dataset_metadata_path=table / "metadata.csv")  # fmt: skip
    assert "--quantize_base: make the pairs first, with encode_pairs" in one_sentence(capsys, train, words, direct)
    words = direct_flags(tmp_path / "o", quantize_base="nf4")
    assert "--quantize_base: --lora_rank=0 trains all weights" in one_sentence(capsys, train, words, direct)

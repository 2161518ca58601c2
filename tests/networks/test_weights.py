"""Folders of weights against what diffusers itself loads, and what is said of those that lack something."""

import shutil
from copy import deepcopy
from pathlib import Path

from common.ct import unet as ct_unet
from common.direct import pipelines
from common.errors import UserError
from common.networks import encoders, teachers
from common.tools import evaluate, sampling
from tests.made import CONFIG as CT_UNET
from tests.made import edit_json
from tests.tiny_pipelines import KWARGS, make, wan_transformer

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DModel, WanPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def rewrite(file, change):
    """Write a file again with what change({name: tensor}) returns."""
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def without(file, part):
    return lambda folder: rewrite(folder / file, lambda s: {k: v for k, v in s.items() if part not in k})


def more(file, name, shape=(1,)):
    return lambda folder: rewrite(folder / file, lambda s: s | {name: torch.zeros(shape)})


def what_no_network_uses(folder):
    """What public checkpoints carry beside their networks: the rest of CLIP, a discriminator, an EMA, buffers."""
    for name in ("text_projection.weight", "vision_model.encoder.layers.0.mlp.fc1.weight", "logit_scale"):
        more(TEXT, name)(folder)
    for file, name in ((VAE, "loss.logvar"), (VAE, "encoder.norm.num_batches_tracked"), (UNET, "model_ema.conv_in")):
        more(file, name)(folder)


def renamed(file, rename):
    def change(tensors):
        assert any(rename(name) != name for name in tensors)
        return {rename(name): tensor for name, tensor in tensors.items()}

    return lambda folder: rewrite(folder / file, change)


def old_name(key):
    for new, old in OLD_NAMES.items():
        key = key.replace(new, old) if "attentions" in key else key
    return key


def with_or_without_prefix(key):
    return key.removeprefix("text_model.") if key.startswith("text_model.") else f"text_model.{key}"


def resave(**options):
    """Save the pipeline again, and remove the plain form of it."""

    def change(folder):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        shutil.rmtree(folder)
        pipeline.save_pretrained(folder, **options)

    return change


def as_variant(*files, variant="fp16", keep=False):
    def change(folder):
        for file in files:
            move = shutil.copy if keep else shutil.move
            move(folder / file, (folder / file).with_suffix(f".{variant}.safetensors"))

    return change


def legacy_index(folder):
    """The index of a variant as diffusers once named it."""
    resave(variant="fp16", max_shard_size="100KB")(folder)
    new = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    (folder / new).rename(folder / "unet/diffusion_pytorch_model.safetensors.fp16.index.json")


def with_lora(component, fuse=False):
    def change(folder):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        names = ["to_q"] if component == "unet" else ["q_proj"]
        part = getattr(pipeline, component)
        part.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=names))
        if fuse:
            pipeline.fuse_lora(components=[component])
        shutil.rmtree(folder / component)
        part.save_pretrained(folder / component)

    return change


LOADS = {  # what stock diffusers loads: (how it is made, variant)
    "plain shards": (resave(max_shard_size="100KB"), None),
    "a variant": (resave(variant="fp16"), "fp16"),
    "shards of a variant": (resave(variant="fp16", max_shard_size="100KB"), "fp16"),
    "shards of a variant, by the old name": (legacy_index, "fp16"),
    "a variant of one part alone": (as_variant(UNET), "fp16"),
    "both, the plain ones": (as_variant(UNET, TEXT, keep=True), None),
    "both, the variant": (as_variant(UNET, TEXT, keep=True), "fp16"),
    "old names of the VAE's attention": (renamed(VAE, old_name), None),
    "position_ids": (more(TEXT, "text_model.embeddings.position_ids", (1, 77)), None),
    "tensors that no network uses": (what_no_network_uses, None),
    "a text encoder with another prefix": (renamed(TEXT, with_or_without_prefix), None),
}
REFUSED = {  # (how it is spoiled, variant, sentence)
    "a text encoder that lacks tensors": (without(TEXT, "mlp.fc1"), None, "text_encoder/model.safetensors lacks"),
    "a U-Net that lacks tensors": (without(UNET, "to_q"), None, f"file {UNET} lacks"),
    "a VAE that lacks tensors": (without(VAE, "quant_conv"), None, f"file {VAE} lacks"),
    "a tensor of another shape": (
        more(UNET, "conv_in.bias", (3,)), None, r"has 1 tensors of another shape \(conv_in.bias is \(3,\), not"
    ),
    "a text tensor of another shape": (
        lambda f: rewrite(f / TEXT, lambda s: s | {next(k for k in s if "final" in k): torch.zeros(3)}),
        None, r"another shape \(.*final_layer_norm.\w+ is \(3,\), not \(64,\)",
    ),
    "a U-Net with its LoRA": (with_lora("unet"), None, "unet/.* was saved with a LoRA on it .*unload_lora_weights"),
    "a U-Net with a fused LoRA": (with_lora("unet", True), None, "unet/.* was saved with a LoRA on it .*fuse_lora"),
    "a text encoder with its LoRA": (with_lora("text_encoder"), None, "text_encoder/ was saved with a LoRA on it"),
    "a shard that is missing": (
        lambda f: [resave(max_shard_size="100KB")(f), next((f / "unet").glob("*-00002-of*")).unlink()],
        None, "partial, unet/diffusion_pytorch_model-00002-of-.* is missing, which",
    ),
    "a damaged index": (
        lambda f: (f / UNET).rename(f / "x") and (f / f"{UNET}.index.json").write_text("{"),
        None, "index.json is damaged",
    ),
    "a variant alone": (as_variant(UNET, TEXT, VAE), None, r"no plain weights, only .*pass its `variant`"),
    "a variant of one part, not asked for": (as_variant(UNET), None, r"folder unet/ has no plain weights.*`variant`"),
    "a variant that is not there": (lambda f: None, "fp16", "no weights of the variant 'fp16'; drop `variant`"),
    "two variants": (
        lambda f: [as_variant(UNET)(f), as_variant(VAE, variant="bf16")(f)],
        "fp16", "neither these nor the variant 'fp16': save the pipeline again",
    ),
}  # fmt: skip


@pytest.fixture
def copy(teacher, tmp_path):
    """copy(change): a teacher's folder after change(folder)."""

    def make(change):
        folder = Path(shutil.copytree(teacher(), tmp_path / "teacher"))
        change(folder)
        return folder

    return make


@pytest.mark.parametrize("row", LOADS)
def test_what_diffusers_loads_is_accepted_and_loaded_alike(copy, row, capsys):
    change, variant = LOADS[row]
    folder = copy(change)
    stock = DiffusionPipeline.from_pretrained(folder, variant=variant)
    teachers.read_teacher_config(str(folder), variant=variant)
    said = capsys.readouterr().out.count("which no ")
    assert said == (3 if row == "tensors that no network uses" else 0)  # one line for each file
    pipelines.read_pipeline_config(str(folder), variant=variant)
    evaluate.check_weights(str(folder), variant=variant)
    ours = teachers.load_teacher(str(folder), variant=variant)
    for part in ("unet", "vae", "text_encoder"):
        expected, got = getattr(stock, part).state_dict(), getattr(ours, part).state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())  # both copy a file's bytes


@pytest.mark.parametrize("row", REFUSED)
def test_what_lacks_something_is_refused_in_one_sentence_before_it_is_loaded(copy, row):
    change, variant, sentence = REFUSED[row]
    folder = str(copy(change))
    for read, flag in (
        (teachers.read_teacher_config, f"`pretrained_teacher_model`={folder}: "),
        (pipelines.read_pipeline_config, f"`pretrained_teacher_model`={folder}: "),
        (evaluate.check_weights, f"--pretrained_model {folder}: "),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            read(folder, variant=variant)
        assert str(error.value).startswith(flag) and "\n" not in str(error.value)


FILE = "diffusion_pytorch_model.safetensors"
ALONE = {  # of a network that is no part of the teacher: (how it is spoiled, sentence)
    "tensors are missing": (without(FILE, "mid_block"), f"{FILE} lacks"),
    "a variant": (as_variant(FILE), "has no plain weights, only diffusion_pytorch_model.fp16.safetensors"),
    "a LoRA": (more(FILE, "a.lora_A.weight"), "was saved with a LoRA on it"),
}


@pytest.mark.parametrize("kind", ["vae", "init_unet", "ct", "evaluate"])
def test_a_network_alone_is_checked_too(teacher, tmp_path, kind):
    config, whole = teachers.read_teacher_config(teacher()), tmp_path / "whole"
    if kind == "ct":
        UNet2DModel.from_config(CT_UNET, sample_size=8).save_pretrained(whole)
    else:
        shutil.copytree(Path(teacher(), "vae" if kind == "vae" else "unet"), whole)
    check = {
        "vae": lambda name: teachers.read_vae_config(name, config),
        "init_unet": lambda name: teachers.check_init_unet(name, config, None),
        "ct": lambda name: ct_unet.read_unet_config(8, pretrained_name=name),
        "evaluate": lambda name: evaluate.check_weights(teacher(), name),
    }[kind]
    check(str(whole))
    for row, (spoil, sentence) in ALONE.items():
        folder = Path(shutil.copytree(whole, tmp_path / row))
        spoil(folder)
        with pytest.raises(UserError, match=sentence) as error:
            check(str(folder))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        if row == "a variant" and kind != "ct":
            assert "save it again without a variant" in str(error.value)
    for pickled in ("model.ckpt", "model.bin", "model.PT"):
        (tmp_path / pickled).write_bytes(b"PK")
        with pytest.raises(UserError, match="is a pickle, which could run code; convert it to .safetensors"):
            check(str(tmp_path / pickled))


def test_a_teacher_in_one_pickled_file_is_refused(tmp_path):
    (tmp_path / "sd.ckpt").write_bytes(b"PK")
    name = str(tmp_path / "sd.ckpt")
    checks = [teachers.read_teacher_config, pipelines.read_pipeline_config]
    checks.append(lambda name: evaluate.check_model(name, "--pretrained_model", "model_index.json"))
    for check in checks:
        with pytest.raises(UserError, match=r"sd.ckpt: a .ckpt file is a pickle.*; convert it to .safetensors"):
            check(name)


def hub(folder, cache, leave_out=()):
    """The folder as the hub's cache has it, under the name a/b."""
    place = cache / "models--a--b"
    shutil.copytree(folder, place / "snapshots/123", ignore=shutil.ignore_patterns(*leave_out))
    (place / "refs").mkdir()
    (place / "refs/main").write_text("123")
    return {"cache_dir": str(cache)}


def test_hub_repositories_are_checked_in_the_cache(copy, tmp_path):
    folder, sentence = copy(without(TEXT, "mlp.fc1")), "text_encoder/model.safetensors lacks"
    options = hub(folder, tmp_path / "whole")
    for read in (teachers.read_teacher_config, pipelines.read_pipeline_config, evaluate.check_weights):
        with pytest.raises(UserError, match=sentence):
            read("a/b", **options)
        read("a/b", **hub(folder, tmp_path / read.__module__, ["*.safetensors"]))  # not downloaded yet
    for load in (teachers.load_teacher, pipelines.load_pipeline):  # between download and loading
        with pytest.raises(UserError, match=sentence):
            load("a/b", **options)
    with pytest.raises(UserError, match=sentence):
        sampling.load_pipeline("a/b", **options)


def test_tokenizers_that_do_not_say_where_they_end(copy, teacher):
    folder = copy(lambda f: edit_json(f / "tokenizer/tokenizer_config.json", model_max_length=None))
    stock = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert stock.model_max_length > 1e9
    expected = encoders.conditioning(teachers.load_teacher(teacher()), ["a three", "3 " * 200])
    for load in (teachers.load_teacher, pipelines.load_pipeline):
        pipeline = load(str(folder))
        assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 77
        got = encoders.conditioning(pipeline, ["a three", "3 " * 200])
        assert torch.equal(got["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert sampling.load_pipeline(str(folder)).tokenizer.model_max_length == 77


@torch.no_grad()
def test_what_is_kept_in_float32_stays_so_and_is_not_cast_under_autocast(tmp_path):
    """T5's wo in float16, and the time embedder of Wan, as stock diffusers has them."""
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20)
    encoder = transformers.T5EncoderModel(config)
    wan = WanPipeline(None, encoder, None, make("Wan").scheduler, transformer=wan_transformer())
    wan.save_pretrained(tmp_path)
    absent = dict.fromkeys(("tokenizer", "vae"))
    tokens, timesteps = torch.arange(8)[None], torch.randn(2, 8)
    for dtype in (torch.float16, torch.bfloat16):
        stock = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype, **absent)
        ours = pipelines.load_pipeline(str(tmp_path), {"default": dtype}, **absent).to("cpu")
        for part in ("text_encoder", "transformer"):
            kept = {name: p.dtype for name, p in getattr(stock, part).named_parameters()}
            assert {name: p.dtype for name, p in getattr(ours, part).named_parameters()} == kept
            assert torch.float32 in kept.values() or (part, dtype) == ("text_encoder", torch.bfloat16)
        expected = stock.text_encoder(tokens)[0], stock.transformer.condition_embedder.time_embedder(timesteps)
        with torch.autocast("cpu", dtype):
            cast = stock.transformer.condition_embedder.time_embedder(timesteps)
            got = ours.text_encoder(tokens)[0], ours.transformer.condition_embedder.time_embedder(timesteps)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert not torch.equal(cast, expected[1])
        # the whole call of the teacher by stock diffusers, and of the student in training, its weights in float32 too
        rollout, made = make("Wan"), []
        whole = pipelines.load_pipeline(str(tmp_path), **absent).transformer
        for transformer, autocast in ((stock.transformer, False), (ours.transformer, True), (whole, True)):
            rollout.transformer = transformer
            with torch.autocast("cpu", dtype, enabled=autocast):
                made.append(pipelines.call(rollout, ["a three"], [0], **KWARGS["Wan"] | {"num_inference_steps": 2}))
        torch.testing.assert_close(made[1], made[0], atol=1e-5, rtol=1e-5)  # equal but for the order of sums
        assert (made[2] - made[0].float()).square().mean() < 1e-3 * made[0].float().var()
        copied = deepcopy(ours.text_encoder)  # computes with its own weights
        copied.shared.weight.data.zero_()
        assert not torch.equal(copied(tokens)[0], got[0])

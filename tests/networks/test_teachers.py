import contextlib
import inspect
import json
import os
import shutil
from pathlib import Path

from common.direct import pipelines
from common.errors import UserError
from common.networks import encoders, teachers
from common.tscd.solver import tcd_scheduler
from tests.made import edit_json

import diffusers
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

T = torch.tensor([999, 19])


@pytest.fixture(scope="session")
def sdxl(teacher):
    return teacher("sdxl")


def copy_teacher(teacher, tmp_path, kind="epsilon"):
    return Path(shutil.copytree(teacher(kind), tmp_path / "teacher"))


def test_teacher_config_needs_no_weights(teacher, tmp_path, monkeypatch):
    folder = copy_teacher(teacher, tmp_path)
    monkeypatch.setattr(teachers.DiffusionPipeline, "from_pretrained", None)  # a load would fail
    config = teachers.read_teacher_config(str(folder))
    assert config["unet"]["in_channels"] == 4 and config["scheduler"]["beta_schedule"] == "scaled_linear"
    assert config["is_sdxl"] is False and "text_encoder_2" not in config


def test_sdxl_is_recognised_from_its_index(sdxl):
    config = teachers.read_teacher_config(sdxl)
    assert config["is_sdxl"] is True and config["unet"]["addition_embed_type"] == "text_time"
    assert config["text_encoder"].hidden_size == 32 and config["text_encoder_2"].projection_dim == 32
    encoders.check_resolution(config, 16)


UNET, INDEX, SCHEDULER = "unet/config.json", "model_index.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(file, **changes):
    return lambda folder: edit_json(folder / file, **changes)


def remove(name):
    return lambda f: shutil.rmtree(f / name) if (f / name).is_dir() else (f / name).unlink()


REFUSED = {
    "epsilon": [
        (edit(UNET, class_embed_type="timestep"), "class_embed_type='timestep'"),
        (edit(UNET, time_cond_proj_dim=256), "already distilled"),
        (edit(SCHEDULER, prediction_type="flow"), "'flow' is none of"),
        (remove(""), "neither a folder nor a model"),
        (remove(INDEX), "no model_index.json"),
        (remove("unet"), r"partial, its folder unet/ is missing"),
        (remove(WEIGHTS), "folder unet/ has no weights"),
        (lambda f: os.truncate(f / WEIGHTS, 9999), f"its file {WEIGHTS} is damaged"),
        (remove(UNET), "a part of the teacher is missing"),
        (lambda f: (f / "vae/config.json").write_text("{"), "missing or unreadable"),
        (edit(UNET, in_channels=9), "maps 9 to 4 channels"),
        (edit(UNET, addition_embed_type="text_time"), "addition_embed_type='text_time'"),
        (edit("vae/config.json", latents_mean=[0.0] * 4), "latents_mean"),
        (edit("vae/config.json", shift_factor=0.1), "its VAE has shift_factor, which Stable"),
        (edit(INDEX, tokenizer=[None, None]), "its tokenizer is None"),
        (edit(INDEX, vae=["diffusers", "VQModel"]), "its vae is VQModel"),
        (edit(INDEX, unet=["diffusers", "UNet3DConditionModel"]), "its unet is"),
        (edit(INDEX, text_encoder=["transformers", "T5EncoderModel"]), "T5Encoder"),
        (edit(INDEX, text_encoder_2=["transformers", "X"]), "text_encoder_2 is X"),
        (edit(SCHEDULER, rescale_betas_zero_snr=True), "zero terminal SNR"),
    ],
    "sdxl": [
        (remove("text_encoder_2"), "partial, its folder text_encoder_2/ is missing"),
        (remove("tokenizer_2"), "partial, its folder tokenizer_2/ is missing"),
        (remove("text_encoder_2/model.safetensors"), "folder text_encoder_2/ has no weights"),
        (edit(INDEX, tokenizer_2=[None, None]), "not an SDXL .* tokenizer_2 is None"),
        (edit(INDEX, text_encoder_2=[None, None]), "its text_encoder_2 is None"),
        (edit(INDEX, text_encoder_2=["transformers", "T5"]), "text_encoder_2 is T5"),
        (edit(INDEX, text_encoder=[None, None]), "the SDXL refiner"),
        (edit(INDEX, requires_aesthetics_score=True), "the SDXL refiner"),
        (edit(UNET, addition_embed_type=None), "=None where SDXL's is 'text_time'"),
        (edit(UNET, addition_embed_type="text"), "='text' where SDXL's is"),
        (edit(UNET, projection_class_embeddings_input_dim=72), "takes 72 .* make 80"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "spoil", "message"), [(k, *row) for k, rows in REFUSED.items() for row in rows])
def test_unusable_teachers_are_refused_in_one_sentence(teacher, tmp_path, kind, spoil, message):
    folder = copy_teacher(teacher, tmp_path, kind)
    spoil(folder)
    check_refusal(folder, message)


def test_direct_distillation_refuses_the_refiner_too(teacher, tmp_path):
    folder = copy_teacher(teacher, tmp_path, "sdxl")
    edit_json(folder / INDEX, requires_aesthetics_score=True, _class_name="StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(UserError, match="the SDXL refiner"):
        pipelines.read_pipeline_config(str(folder))


def sized(sizes, crops):
    return {"original_sizes": torch.tensor(sizes), "crop_top_lefts": torch.tensor(crops)}


def check_refusal(folder, message):
    with pytest.raises(UserError, match=message) as error:
        teachers.read_teacher_config(str(folder))
    assert "`pretrained_teacher_model`=" in str(error.value) and "\n" not in str(error.value)


def test_scheduler_without_betas_is_refused():
    with pytest.raises(UserError, match="no beta schedule"):
        teachers.check_schedule("--x", {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002})


def test_zero_terminal_snr_is_fine_with_v_prediction(teacher, tmp_path):
    folder = copy_teacher(teacher, tmp_path)
    edit_json(folder / SCHEDULER, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    teachers.read_teacher_config(str(folder))


def test_single_file_teacher_goes_through_diffusers_loader(teacher, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        teachers.read_teacher_config(str(tmp_path / "missing.safetensors"))
    pipeline, asked = teachers.load_teacher(teacher()), []

    def from_single_file(path, **options):
        asked.append((path, options["safety_checker"]))
        return pipeline

    monkeypatch.setattr(teachers.StableDiffusionPipeline, "from_single_file", from_single_file)
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(1)}, file)
    config = teachers.read_teacher_config(str(file))
    assert config["unet"]["cross_attention_dim"] == pipeline.unet.config.cross_attention_dim
    assert asked == [(str(file), None)]
    assert teachers.load_teacher(str(file)) is pipeline


def test_single_file_sdxl_goes_through_the_sdxl_loader(sdxl, tmp_path, monkeypatch):
    pipeline = teachers.load_teacher(sdxl)

    def from_single_file(path, cache_dir, dtype):  # takes no safety_checker
        return pipeline

    monkeypatch.setattr(teachers.StableDiffusionXLPipeline, "from_single_file", from_single_file)
    file = tmp_path / "model.safetensors"
    first, second = ("conditioner.embedders.0.model.ln_final.bias", "conditioner.embedders.1.model.ln_final.bias")
    save_file({first: torch.zeros(1), second: torch.zeros(1)}, file)
    config = teachers.read_teacher_config(str(file))
    assert config["is_sdxl"] and config["text_encoder_2"].projection_dim == 32
    save_file({first: torch.zeros(1)}, file)
    check_refusal(file, "the SDXL refiner")
    file.write_bytes(b"<html>")
    check_refusal(file, "damaged")


def test_both_text_encoders_are_loaded_and_frozen(teacher, sdxl):
    pipeline = teachers.load_teacher(sdxl)
    assert isinstance(pipeline, StableDiffusionXLPipeline) and encoders.is_sdxl(pipeline)
    assert encoders.text_encoders(pipeline) == [pipeline.text_encoder, pipeline.text_encoder_2]
    for module in (pipeline.unet, pipeline.vae, *encoders.text_encoders(pipeline)):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    pipeline = teachers.load_teacher(teacher())
    assert encoders.text_encoders(pipeline) == [pipeline.text_encoder] and not encoders.is_sdxl(pipeline)


def test_student_of_a_teacher_whose_configuration_is_older_than_w(teacher, tmp_path):
    """The files of Stable Diffusion 1.5 lack keys that diffusers added later, `time_cond_proj_dim` among them."""
    folder = copy_teacher(teacher, tmp_path)
    path = folder / "unet/config.json"
    unet = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in unet.items() if k not in ("time_cond_proj_dim", "class_embed_type")}))
    student = teachers.make_student(teachers.load_teacher(str(folder)).unet, 64)
    assert student.config.time_cond_proj_dim == student.time_embedding.cond_proj.in_features == 64


def test_sdxl_student_equals_the_teacher_at_step_0_and_samples(sdxl, tmp_path):
    pipeline = teachers.load_teacher(sdxl)
    student = teachers.make_student(pipeline.unet, 256).eval()
    time_ids = encoders.time_ids(sized([[40, 30], [16, 16]], [[3, 0], [0, 0]]), 16)
    cond = encoders.conditioning(pipeline, ["a handwritten four", "zero"], time_ids)
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = pipeline.unet(z, T, **cond).sample  # of weights in other memory: equal up to rounding
        torch.testing.assert_close(student(z, T, timestep_cond=torch.randn(2, 256), **cond).sample, expected)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert not any(p.requires_grad for p in pipeline.unet.parameters())
    student.train()(z, T, timestep_cond=torch.randn(2, 256), **cond).sample.square().mean().backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0

    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    teachers.load_teacher(sdxl, unet=student.eval(), scheduler=scheduler).save_pretrained(tmp_path)
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    images = saved("a handwritten four", num_inference_steps=4, guidance_scale=8.0, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and saved.config.force_zeros_for_empty_prompt


def test_init_unet_continues_an_earlier_student(teacher, tmp_path):
    unet = teachers.load_teacher(teacher()).unet
    first = teachers.make_student(unet, 64)
    torch.nn.init.ones_(first.time_embedding.cond_proj.weight)
    first.save_pretrained(tmp_path / "run" / "unet")
    for folder in (tmp_path / "run", tmp_path / "run" / "unet"):
        again = teachers.make_student(unet, 64, str(folder))
        assert again.training and (again.time_embedding.cond_proj.weight == 1).all()
    config = teachers.read_teacher_config(teacher())
    teachers.check_init_unet(str(tmp_path / "run"), config, 64)
    with pytest.raises(UserError, match="time_cond_proj_dim is 64"):
        teachers.check_init_unet(str(tmp_path / "run"), config, 256)
    edit_json(tmp_path / "run" / "unet" / "config.json", cross_attention_dim=32)
    with pytest.raises(UserError, match="no student of this teacher, its cross_attention_dim is 32"):
        teachers.check_init_unet(str(tmp_path / "run"), config, 64)
    for missing in (tmp_path / "nope", tmp_path / "nope.safetensors"):
        with pytest.raises(UserError, match="`init_unet`=.*neither a U-Net's folder"):
            teachers.check_init_unet(str(missing), config, 64)


def test_another_vae_is_checked_without_loading(teacher, tmp_path):
    config = teachers.read_teacher_config(teacher())
    assert teachers.read_vae_config(teacher(), config)["vae"]["latent_channels"] == 4
    with pytest.raises(UserError, match="`pretrained_vae_model_name_or_path`=.*neither a VAE's folder"):
        teachers.read_vae_config(str(tmp_path / "nope"), config)
    vae = shutil.copytree(Path(teacher(), "vae"), tmp_path / "vae")
    edit_json(vae / "config.json", latent_channels=8)
    with pytest.raises(UserError, match="not an AutoencoderKL with 4 latent channels"):
        teachers.read_vae_config(str(vae), config)


def test_conditioning_of_sd_is_the_prompts_and_the_empty_prompts(teacher):
    pipeline = teachers.load_teacher(teacher())
    captions = ["a photo of the digit three", "", "something else entirely " * 40]  # the last is cut at 77 tokens
    cond, uncond = encoders.conditioning(pipeline, captions, torch.zeros(3, 6)), encoders.uncond_conditioning(pipeline)
    embeds, empty = StableDiffusionPipeline.from_pretrained(teacher()).encode_prompt(captions, "cpu", 1, True)
    torch.testing.assert_close(cond, {"encoder_hidden_states": embeds})
    torch.testing.assert_close(uncond, {"encoder_hidden_states": empty[:1]})
    both = encoders.concat_conditioning(cond, uncond, torch.bfloat16)
    torch.testing.assert_close(both, {"encoder_hidden_states": torch.cat([embeds, empty]).bfloat16()})


@pytest.mark.parametrize("force_zeros", [True, False])
def test_the_guided_teacher_is_asked_what_the_pipeline_asks(sdxl, force_zeros):
    """Every keyword argument of the U-Net, in the pipeline's own call with guidance."""
    pipeline, calls = teachers.load_teacher(sdxl), []
    pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    captions = ["something else entirely " * 40, "seven"]  # the first is cut at 77 tokens
    sizes = {"original_size": (40, 30), "crops_coords_top_left": (5, 7)}
    pipeline(captions, num_inference_steps=1, guidance_scale=3.0, output_type="latent", **sizes)
    cond = encoders.conditioning(pipeline, captions, encoders.time_ids(sized([[40, 30]] * 2, [[5, 7]] * 2), 16))
    both = encoders.concat_conditioning(cond, encoders.uncond_conditioning(pipeline))
    swap = [2, 3, 0, 1]  # the pipeline puts the empty prompts first
    torch.testing.assert_close(both["encoder_hidden_states"][swap], calls[0]["encoder_hidden_states"])
    added = calls[0]["added_cond_kwargs"]
    torch.testing.assert_close(both["added_cond_kwargs"]["text_embeds"][swap], added["text_embeds"])
    assert torch.equal(both["added_cond_kwargs"]["time_ids"].float(), added["time_ids"])


def test_half_precision_conditioning_keeps_the_sizes_exact(sdxl):
    pipeline = teachers.load_teacher(sdxl)
    for module in (pipeline.unet, *encoders.text_encoders(pipeline)):
        module.to(torch.bfloat16)
    cond = encoders.conditioning(pipeline, ["two"], encoders.time_ids(sized([[1001, 1531]], [[257, 0]]), 1024))
    both = encoders.concat_conditioning(cond, encoders.uncond_conditioning(pipeline), torch.bfloat16)
    assert both["encoder_hidden_states"].dtype == both["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16
    assert both["added_cond_kwargs"]["time_ids"].tolist() == [[1001, 1531, 257, 0, 1024, 1024]] * 2
    with torch.no_grad():
        output = pipeline.unet(torch.randn(2, 4, 8, 8).bfloat16(), T, **both).sample
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_time_ids_are_the_pipelines(sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    batch, whole = sized([[400, 300], [1200, 1601]], [[0, 7], [33, 0]]), (1024, 1024)
    stock = lambda *places: torch.cat([pipeline._get_add_time_ids(*p, whole, torch.int64, 32) for p in places])  # noqa: E731
    rows, fixed = stock(((400, 300), (0, 7)), ((1200, 1601), (33, 0))), stock(*[(whole, (0, 0))] * 2)
    assert torch.equal(encoders.time_ids(batch, 1024), rows)
    assert torch.equal(encoders.time_ids(batch, 1024, fix_crop_and_size=True), fixed)
    assert batch["original_sizes"].tolist() == [[400, 300], [1200, 1601]]  # the batch is as it was


@pytest.mark.parametrize(
    ("is_sdxl", "vae", "expected"),
    [
        (True, {"force_upcast": True}, torch.float32),
        (True, {}, torch.float32),  # diffusers' default
        (True, {"force_upcast": False}, torch.float16),  # sdxl-vae-fp16-fix, beside the teacher or in it
        (False, {}, torch.float16),
        (False, {"force_upcast": True}, torch.float16),  # the Stable Diffusion pipeline does not ask
    ],
)
def test_the_vae_of_sdxl_computes_in_float32_where_its_configuration_says_so(is_sdxl, vae, expected):
    assert encoders.vae_dtype({"is_sdxl": is_sdxl, "vae": vae}, torch.float16) == expected
    assert encoders.vae_dtype({"is_sdxl": is_sdxl, "vae": vae}, torch.float32) == torch.float32


def test_latents_are_the_vaes_and_do_not_depend_on_the_chunks(teacher):
    vae = teachers.load_teacher(teacher()).vae
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    encode = [encoders.encode_images(vae, images, torch.Generator().manual_seed(7), n) for n in (1, 2, 5, 32)]
    for latents in encode[1:]:
        torch.testing.assert_close(latents, encode[0], atol=1e-5, rtol=1e-5)
    posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(7)) * vae.config.scaling_factor
    torch.testing.assert_close(encode[-1], expected, atol=1e-5, rtol=1e-5)
    assert encode[0].dtype == torch.float32 and encode[0].shape == (5, 4, 8, 8)


def test_latents_mean_and_std_are_what_the_sdxl_pipeline_undoes(sdxl):
    pipeline = teachers.load_teacher(sdxl)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    encode = lambda: encoders.encode_images(pipeline.vae, images, torch.Generator().manual_seed(0), 2)  # noqa: E731
    plain, scale = encode() / pipeline.vae.config.scaling_factor, 0.5
    mean, std = [-1.6, 1.1, 0.2, 0.0], [8.4, 5.9, 6.2, 5.2]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=scale)
    undone = encode() * torch.tensor(std).view(1, 4, 1, 1) / scale + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(undone, plain)
    with torch.no_grad():
        torch.testing.assert_close(encoders.decode_latents(pipeline.vae, encode()), pipeline.vae.decode(plain).sample)


def test_another_vae_is_used(teacher, tmp_path):
    vae = teachers.load_teacher(teacher()).vae
    torch.nn.init.zeros_(vae.quant_conv.weight)
    vae.save_pretrained(tmp_path / "vae")
    for name in (tmp_path / "vae", tmp_path):
        other = teachers.load_teacher(teacher(), vae=str(name)).vae
        assert other.quant_conv.weight.abs().max() == 0


# --- the class of the pipeline, its own size, the schedulers of exports


SAVED_BY = {
    "StableDiffusionImg2ImgPipeline": {},
    "StableDiffusionControlNetInpaintPipeline": {"controlnet": 2},
    "StableDiffusionPAGPipeline": {"pag_applied_layers": "mid"},
    "StableDiffusionXLInpaintPipeline": {},
    "StableDiffusionXLControlNetPipeline": {"controlnet": 1},
    "StableDiffusionXLPAGPipeline": {"pag_applied_layers": ["mid"]},
}


@pytest.mark.parametrize("name", SAVED_BY)
def test_a_teacher_of_any_class_is_the_plain_text_to_image_pipeline(teacher, sdxl, tmp_path, name):
    """Saved as that class, read without any of its further parts, and what it samples is what the plain class does."""
    is_sdxl, extra = "XL" in name, dict(SAVED_BY[name])
    plain = teachers.load_teacher(sdxl if is_sdxl else teacher())
    if count := extra.pop("controlnet", 0):
        controlnets = [diffusers.ControlNetModel.from_unet(plain.unet) for _ in range(count)]
        extra["controlnet"] = controlnets if count > 1 else controlnets[0]
    safe = {} if is_sdxl else {"requires_safety_checker": False}
    takes = inspect.signature(getattr(diffusers, name).__init__).parameters
    parts = {part: value for part, value in plain.components.items() if part in takes}
    getattr(diffusers, name)(**parts, **safe, **extra).save_pretrained(tmp_path)
    for folder in tmp_path.glob("controlnet*"):
        shutil.rmtree(folder)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == name
    assert teachers.read_teacher_config(str(tmp_path))["is_sdxl"] is is_sdxl
    loaded = teachers.load_teacher(str(tmp_path))
    assert type(loaded) is (StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "return_dict": False}
    both = [p("a three", generator=torch.Generator().manual_seed(1), **options)[0] for p in (plain, loaded)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)  # the same weights in other memory
    loaded.save_pretrained(tmp_path / "again")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")) is type(plain)


@pytest.mark.parametrize(
    ("kind", "unet", "size"),
    [
        ("epsilon", {}, (16, 16)),
        ("epsilon", {"sample_size": 96}, (192, 192)),  # with this VAE's factor of 2; of 8, SD 2.1's 768
        ("epsilon", {"sample_size": [12, 12]}, (24, 24)),
        ("epsilon", {"sample_size": [12, 8]}, (24, 16)),
        ("epsilon", {"sample_size": 32, "_diffusers_version": "0.8.1"}, (128, 128)),
        ("epsilon", {"sample_size": 32, "_diffusers_version": "0.9.0"}, (64, 64)),
        ("epsilon", {"sample_size": None}, None),
        ("sdxl", {}, (16, 16)),
        ("sdxl", {"sample_size": 12, "_diffusers_version": "0.8.1"}, (24, 24)),
        ("sdxl", {"sample_size": [12, 12]}, (24, 24)),
        ("sdxl", {"sample_size": None}, None),
    ],
)
def test_the_default_resolution_is_what_the_stock_pipeline_samples_at(teacher, tmp_path, kind, unet, size):
    folder = copy_teacher(teacher, tmp_path, kind)
    edit_json(folder / UNET, **unet)
    config = teachers.read_teacher_config(str(folder))
    assert teachers.native_size(config) == size
    square = size is None or size[0] == size[1]
    if square:
        side = size[0] if size else 1024 if kind == "sdxl" else 512
        assert teachers.default_resolution(config) == side
    else:
        side = size[0]
        with pytest.raises(UserError, match="`resolution`: the teacher's own images are 24 x 16 pixels"):
            teachers.default_resolution(config)
    made, pipeline = [], diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)

    def prepare_latents(batch_size, channels, height, width, *args):
        made.append((height, width))
        raise StopIteration

    pipeline.prepare_latents = prepare_latents
    with contextlib.suppress(StopIteration, TypeError, ValueError):  # what it has no size for
        pipeline("a three", num_inference_steps=1)
    assert teachers.samples_by_default_at(config, side) == (made == [(side, side)])
    assert not teachers.samples_by_default_at(config, side + 8)


@pytest.mark.parametrize("lacks", ["beta_start beta_end", "num_train_timesteps beta_end", ""])
@pytest.mark.parametrize("kind", ["scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_exported_schedulers_have_the_betas_of_the_training(lacks, kind, rescaled):
    config = dict(diffusers.DDPMScheduler(beta_start=0.001, beta_end=0.03).config)
    config |= {"_class_name": "PNDMScheduler", "beta_schedule": kind, "set_alpha_to_one": False}
    config |= {"rescale_betas_zero_snr": rescaled, "prediction_type": "v_prediction"}
    config = {name: value for name, value in config.items() if name not in ("_use_default_values", *lacks.split())}
    trained = diffusers.DDPMScheduler.from_config(config).alphas_cumprod
    for made in (teachers.lcm_scheduler(config, 50, 10.0), tcd_scheduler(config, 40)):
        again = type(made).from_config(json.loads(made.to_json_string()))  # as a user loads it
        assert torch.equal(made.alphas_cumprod, trained)
        torch.testing.assert_close(again.alphas_cumprod, trained, rtol=0, atol=1e-6)  # betas in decimal digits
        assert again.config.prediction_type == "v_prediction" and not again.config.set_alpha_to_one

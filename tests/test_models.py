import json
import shutil
from pathlib import Path

from common import UserError, models

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

T = torch.tensor([999, 19])


def copy_teacher(teacher, tmp_path):
    return Path(shutil.copytree(teacher(), tmp_path / "teacher"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_teacher_config_needs_no_weights(teacher, tmp_path):
    folder = copy_teacher(teacher, tmp_path)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")  # the files are there, their content is never touched
    config = models.read_teacher_config(str(folder))
    assert config["unet"]["in_channels"] == 4 and config["scheduler"]["beta_schedule"] == "scaled_linear"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "neither a folder nor a model"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: shutil.rmtree(f / "unet"), r"partial, its folder unet/ is missing"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "folder unet/ has no weights"),
        (lambda f: (f / "unet/config.json").unlink(), "a part of the teacher is missing"),
        (lambda f: (f / "vae/config.json").write_text("{"), "missing or unreadable"),
        (lambda f: edit_json(f / "unet/config.json", in_channels=9), "maps 9 to 4 channels"),
        (lambda f: edit_json(f / "unet/config.json", class_embed_type="timestep"), "class_embed_type"),
        (lambda f: edit_json(f / "unet/config.json", time_cond_proj_dim=256), "already distilled"),
        (lambda f: edit_json(f / "model_index.json", vae=["diffusers", "VQModel"]), "its vae is VQModel"),
        (lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]), "its unet is"),
        (lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]), "T5Encoder"),
        (lambda f: edit_json(f / "model_index.json", text_encoder_2=["transformers", "X"]), "text_encoder_2 is X"),
        (lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="flow"), "'flow' is none of"),
        (lambda f: edit_json(f / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "zero terminal SNR"),
    ],
)
def test_unusable_teachers_are_refused_in_one_sentence(teacher, tmp_path, spoil, message):
    folder = copy_teacher(teacher, tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        models.read_teacher_config(str(folder))
    assert "--pretrained_teacher_model=" in str(error.value) and "\n" not in str(error.value)


def test_missing_variant_is_named(teacher):
    with pytest.raises(UserError, match="no weights of the variant 'fp16'"):
        models.read_teacher_config(teacher(), variant="fp16")


def test_scheduler_without_betas_is_refused():
    with pytest.raises(UserError, match="no beta schedule"):
        models.check_schedule("--x", {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002})


def test_zero_terminal_snr_is_fine_with_v_prediction(teacher, tmp_path):
    folder = copy_teacher(teacher, tmp_path)
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    edit_json(folder / "scheduler/scheduler_config.json", **changes)
    models.read_teacher_config(str(folder))


def test_single_file_teacher_goes_through_diffusers_loader(teacher, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        models.read_teacher_config(str(tmp_path / "missing.safetensors"))
    pipeline, asked = models.load_teacher(teacher()), []

    def from_single_file(path, **options):
        asked.append((path, options["safety_checker"]))
        return pipeline

    monkeypatch.setattr(models.StableDiffusionPipeline, "from_single_file", from_single_file)
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(1)}, file)
    config = models.read_teacher_config(str(file))
    assert config["unet"]["cross_attention_dim"] == pipeline.unet.config.cross_attention_dim
    assert asked == [(str(file), None)]
    assert models.load_teacher(str(file)) is pipeline


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_student_equals_the_teacher_at_step_0_for_every_w(teacher, prediction_type):
    unet = models.load_teacher(teacher(prediction_type)).unet
    student = models.make_student(unet, 256).eval()
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, unet.config.cross_attention_dim)
    cond = torch.randn(2, 256)
    with torch.no_grad():
        assert torch.equal(student(z, T, text, timestep_cond=cond).sample, unet(z, T, text).sample)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert not any(p.requires_grad for p in unet.parameters())


def test_student_depends_on_w_once_it_is_trained(teacher):
    unet = models.load_teacher(teacher()).unet
    student = models.make_student(unet, 256)
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, unet.config.cross_attention_dim)
    student(z, T, text, timestep_cond=torch.randn(2, 256)).sample.square().mean().backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_init_unet_continues_an_earlier_student(teacher, tmp_path):
    unet = models.load_teacher(teacher()).unet
    first = models.make_student(unet, 64)
    torch.nn.init.ones_(first.time_embedding.cond_proj.weight)
    first.save_pretrained(tmp_path / "run" / "unet")
    for folder in (tmp_path / "run", tmp_path / "run" / "unet"):
        again = models.make_student(unet, 64, str(folder))
        assert again.training and (again.time_embedding.cond_proj.weight == 1).all()
    with pytest.raises(UserError, match="time_cond_proj_dim is 64"):
        models.make_student(unet, 256, str(tmp_path / "run"))


def test_prompt_embeddings_are_the_pipelines(teacher):
    pipeline = models.load_teacher(teacher())
    prompts = ["a photo of the digit three", "", "something else entirely " * 40]
    ids = pipeline.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    expected = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(models.encode_prompts(pipeline, prompts), expected)
    reference = StableDiffusionPipeline.from_pretrained(teacher()).encode_prompt(prompts, "cpu", 1, False)[0]
    torch.testing.assert_close(models.encode_prompts(pipeline, prompts), reference)


def test_latents_are_the_vaes_and_do_not_depend_on_the_chunks(teacher):
    vae = models.load_teacher(teacher()).vae
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    encode = [models.encode_images(vae, images, torch.Generator().manual_seed(7), n) for n in (1, 2, 5, 32)]
    for latents in encode[1:]:
        torch.testing.assert_close(latents, encode[0], atol=1e-5, rtol=1e-5)
    posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(7)) * vae.config.scaling_factor
    torch.testing.assert_close(encode[-1], expected, atol=1e-5, rtol=1e-5)
    assert encode[0].dtype == torch.float32 and encode[0].shape == (5, 4, 8, 8)


def test_a_vae_with_a_shift_is_shifted(teacher):
    vae = models.load_teacher(teacher()).vae
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    plain = models.encode_images(vae, images, torch.Generator().manual_seed(0), 2)
    vae.register_to_config(shift_factor=0.5)
    shifted = models.encode_images(vae, images, torch.Generator().manual_seed(0), 2)
    torch.testing.assert_close(plain - shifted, torch.full_like(plain, 0.5 * vae.config.scaling_factor))


def test_another_vae_is_used(teacher, tmp_path):
    vae = models.load_teacher(teacher()).vae
    torch.nn.init.zeros_(vae.quant_conv.weight)
    vae.save_pretrained(tmp_path / "vae")
    for name in (tmp_path / "vae", tmp_path):
        other = models.load_teacher(teacher(), vae=str(name)).vae
        assert other.quant_conv.weight.abs().max() == 0


def test_resolution_must_fit_the_vae(teacher):
    config = models.read_teacher_config(teacher())
    models.check_resolution(config, 16)
    with pytest.raises(UserError, match="--resolution=17 is not a multiple of 2"):
        models.check_resolution(config, 17)


def test_parameters_and_flops_of_sd15_are_the_known_ones():
    with torch.device("meta"):
        unet = dict(UNet2DConditionModel(cross_attention_dim=768).config)
        down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        channels = (128, 256, 512, 512)
        vae = AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=channels, layers_per_block=2
        ).config
    text = models.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    counts = models.count_parameters_and_flops({"unet": unet, "vae": vae, "text_encoder": text}, 512)
    assert counts["unet_parameters"] == 859_520_964  # Stable Diffusion 1.5
    assert counts["vae_parameters"] == 83_653_863
    assert counts["unet_forward_flops"] == pytest.approx(803e9, rel=0.01)
    assert counts["vae_encode_flops"] == pytest.approx(1117e9, rel=0.02)
    assert counts["text_encode_flops"] == pytest.approx(13e9, rel=0.1)

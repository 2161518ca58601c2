"""The TSCD scripts: what is theirs alone. What they share with the others is in test_stable_diffusion.py."""

import json
from pathlib import Path

import train_tscd_distill_lora_sd_wds as tscd_lora
import train_tscd_distill_sd_wds as tscd
from common.errors import UserError
from common.keyed_random import keyed_generator, keyed_seed
from common.networks import lora, teachers
from common.run import checkpointing, preemption, simulation
from common.score.matching import check_engine
from common.tscd import adversarial
from common.tscd import segments as segments_module
from common.tscd.discriminator import Discriminator
from tests.cases import digests, finished, micro_batches, one_sentence, scalars, stop_in_warm_up, train, undo

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, TCDScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

both = pytest.mark.parametrize("script", [tscd, tscd_lora], ids=["full", "lora"])


def text_of(card):
    return Path(card, "README.md").read_text()


@both
def test_every_stage_leaves_a_model_for_its_number_of_steps(tmp_path, flags, teacher, script):
    out = tmp_path / "out"
    train(flags(out, script, learning_rate=0.01), script)
    assert checkpointing.read_state(out / "checkpoint-4")["stage_edges"] == [0, 2, 4]
    seen = []
    for name, k in (("stage-0-k2", 2), ("stage-1-k1", 1), (".", 1)):
        folder = out / name
        scheduler = TCDScheduler.from_pretrained(folder, subfolder="scheduler")
        assert scheduler.config.original_inference_steps == 40
        pipeline = DiffusionPipeline.from_pretrained(teacher())
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler
        if script is tscd:
            pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        else:
            pipeline.load_lora_weights(folder)
        options = {"num_inference_steps": k, "guidance_scale": 1, "eta": 0.0, "output_type": "np"}
        image = pipeline("a three", **options, generator=torch.manual_seed(0)).images[0]
        assert np.isfinite(image).all() and (folder / "sample_grid.png").is_file()
        seen.append(image)
        card = text_of(folder)
        if name != "." or script is tscd_lora:  # the card's own snippet loads these weights, and no others of the run
            code = card.split("```python")[1].split("```")[0].replace(', dtype=torch.float16).to("cuda")', ")")
            code = code.replace(", dtype=torch.float16", "").replace('pipe = pipe.to("cuda")\n', "")
            scope = {}
            exec(code.rsplit("image =", 1)[0], scope)
            mine = scope["pipe"].unet.eval().state_dict()
            assert all(torch.equal(mine[key], value) for key, value in pipeline.unet.state_dict().items())
            assert scope["pipe"].scheduler.config == scheduler.config
        assert f"num_inference_steps={k}, guidance_scale=1, eta=0.0" in card and f"samples in {k} step" in card
        assert ('subfolder="stage-' in card or f"{name}/unet" in card) == (name != ".")
    # each stage trained on, and the last one is the result
    # pipelines of their own, in different memory: equal up to rounding
    assert np.abs(seen[0] - seen[1]).max() > 1e-2 and np.abs(seen[1] - seen[2]).max() <= 1e-4
    if script is tscd:
        whole = DiffusionPipeline.from_pretrained(out)
        again = whole("a three", **options, generator=torch.manual_seed(0)).images[0]
        assert np.abs(again - seen[2]).max() <= 1e-4 and (out / "unet_target" / "config.json").is_file()
        return
    trained, stock = teachers.load_teacher(teacher()).unet, DiffusionPipeline.from_pretrained(teacher())
    lora.add_lora(trained, 4, 6)
    for name, tensor in load_file(out / "checkpoint-4" / "adapters.safetensors").items():
        lora.adapter_tensors(trained)[name].data.copy_(tensor)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 24]), torch.randn(2, 77, 64)
    with torch.no_grad():
        base = stock.unet(z, t, text).sample
        with lora.adapters_off(trained):
            torch.testing.assert_close(trained(z, t, text).sample, base)  # in different memory: up to rounding
        torch.testing.assert_close(pipeline.unet(z, t, text).sample, trained(z, t, text).sample)
    assert (trained(z, t, text).sample - base).abs().max() > 1e-2


# --- the method


def reference(teacher_dir, shards, k, boundary_prob, noise_offset, swap, top_prob=0):
    """The draws and both sides of a first update, from diffusers' schedulers instead of our jumps."""
    pipe = DiffusionPipeline.from_pretrained(teacher_dir, safety_checker=None)
    batch, draw = next(micro_batches(shards)), keyed_generator(1, "tscd", 0, "cpu")
    latents = pipe.vae.encode(batch["images"] / 127.5 - 1).latent_dist.sample(draw) * pipe.vae.config.scaling_factor
    length = 40 // k
    i = torch.randint(40, (4,), generator=draw)
    b = i // length * length
    if top_prob:
        i = torch.where(torch.rand(4, generator=draw) < top_prob, b + length - 1, i)
    m = b + (torch.rand(4, generator=draw) * (i - b + 1)).long()
    m = torch.where(torch.rand(4, generator=draw) < boundary_prob, b, m)
    noise = torch.randn(latents.shape, generator=draw)
    noise = noise + noise_offset * torch.randn(4, 4, 1, 1, generator=draw)
    w = 2 * torch.rand(4, generator=draw)
    embeds, uncond = (pipe.encode_prompt(c, "cpu", 1, False)[0] for c in (batch["captions"], [""]))
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(1)

    def jump(output, z, t, s):  # DDIM's own step from t to s
        ddim.num_inference_steps = 1
        ddim.config.num_train_timesteps = t - s  # prev_timestep = t - num_train_timesteps // num_inference_steps
        return z if s == t else ddim.step(output, t, z).prev_sample

    node = lambda j: max(0, 25 * int(j) - 1)  # noqa: E731
    sides, starts = [], []
    for j in range(4):
        t, t_prev, s, text = node(i[j] + 1), node(i[j]), node(m[j]), embeds[j : j + 1]
        z = ddim.add_noise(latents[j : j + 1], noise[j : j + 1], torch.tensor([t]))
        if swap and t == 999:
            z = noise[j : j + 1]
        cond, unc = pipe.unet(z, t, text).sample, pipe.unet(z, t, uncond).sample
        z_prev = jump(unc + (w[j] + 1) * (cond - unc), z, t, t_prev)
        target = jump(pipe.unet(z_prev, t_prev, text).sample, z_prev, t_prev, s)
        sides.append((jump(cond, z, t, s), target))
        starts.append((z, t, s, node(b[j] + length), bool(m[j] == b[j])))
    return pipe, embeds, latents, sides, starts


@pytest.mark.parametrize(
    ("script", "prediction_type", "segments", "boundary_prob", "noise_offset", "swap"),
    [
        (tscd, "epsilon", 4, 0.5, 0.1, True),
        (tscd, "v_prediction", 1, 0.0, 0.0, False),
        (tscd, "sample", 2, 1, 0, True),
        (tscd_lora, "v_prediction", 4, 0.5, 0.1, True),
        (tscd_lora, "sample", 1, 0.0, 0.0, False),
    ],
)
def test_the_first_loss_is_the_one_that_diffusers_schedulers_give(
    tmp_path, flags, teacher, shards, script, prediction_type, segments, boundary_prob, noise_offset, swap
):
    options = {"stage_segments": segments, "boundary_prob": boundary_prob, "noise_offset": noise_offset}
    options |= {"adv_weights": 0, "mse_weights": 0.5, "max_train_steps": 1}
    options |= {} if swap else {"no-swap_terminal_noise": True}
    train(flags(tmp_path, script, pretrained_teacher_model=teacher(prediction_type), **options), script)
    with torch.no_grad():
        _, _, _, sides, _ = reference(teacher(prediction_type), shards, segments, boundary_prob, noise_offset, swap)
    expected = torch.cat([a - b for a, b in sides]).square().mean().item()
    assert scalars(tmp_path, "loss_mse")[1] == pytest.approx(expected, rel=2e-4, abs=1e-8)
    assert scalars(tmp_path, "loss")[1] == pytest.approx(0.5 * expected, rel=2e-4, abs=1e-8)
    assert not scalars(tmp_path, "loss_adv")


def test_pure_noise_at_the_last_timestep(tmp_path, flags, monkeypatch):
    """Without it SD's alpha_T = 0.068 leaks the image into what should be noise."""
    seen, make_student = [], teachers.make_student

    def patched(*args, **kwargs):
        student = make_student(*args, **kwargs)
        student.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs) if torch.is_grad_enabled() else None
        )
        return student

    monkeypatch.setattr(teachers, "make_student", patched)
    options = {"stage_segments": 1, "num_ddim_timesteps": 2, "adv_weights": 0, "max_train_steps": 1, "seed": 3}
    train(flags(tmp_path / "a", tscd, **options), tscd)
    train(flags(tmp_path / "b", tscd, **options, **{"no-swap_terminal_noise": True}), tscd)
    (swapped, t), (leaking, _) = seen
    last = t == 999
    assert last.any() and not last.all()
    assert torch.equal(swapped[~last], leaking[~last])
    difference = (swapped[last] - leaking[last]).abs().flatten(1).amax(1)
    assert (difference > 1e-3).all()


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (tscd, {"adv_real": "target", "adv_unconditional_start": 1.0}),
        (tscd_lora, {"adv_real": "target", "adv_unconditional_start": 0.0}),
        (tscd, {}),
        (tscd_lora, {"adv_real": "data"}),
    ],
    ids=["conditional", "unconditional", "data", "data, LoRA"],
)
def test_the_first_adversarial_losses(tmp_path, flags, teacher, shards, script, changes):
    """softplus of the logits of both sides, noised from s to the same t*, over the samples that end their segment."""
    options = {"stage_segments": 2, "boundary_prob": 0.5, "adv_weights": 0.3, "mse_weights": 2, "max_train_steps": 1}
    is_data = changes.get("adv_real") != "target"
    top_prob = 0.5 if is_data else 0
    train(flags(tmp_path, script, **options, **changes), script)
    with torch.no_grad():
        pipe, embeds, latents, sides, starts = reference(teacher(), shards, 2, 0.5, 0.0, True, top_prob)
        discriminator = Discriminator(pipe.unet, 8)
        discriminator.reset(keyed_seed(1, "discriminator", 0))
        draw = keyed_generator(1, "adversarial", 0, "cpu")
        position, noise = torch.rand(4, generator=draw), torch.randn(4, 4, 8, 8, generator=draw)
        fresh = torch.randn(4, 4, 8, 8, generator=draw)
        a = pipe.scheduler.alphas_cumprod
        generator_losses, discriminator_losses = [], []
        for j, (z, t, s, top, is_whole) in enumerate(starts):
            if not is_whole or is_data and t != top:
                continue
            adv_t = s + int(position[j] * (top - s + 1))
            fake, real = sides[j]
            if is_data:
                real = a[s].sqrt() * latents[j] + (1 - a[s]).sqrt() * fresh[j] if s else latents[j]
            fake, real = (
                (a[adv_t] / a[s]).sqrt() * x.reshape(4, 8, 8) + (1 - a[adv_t] / a[s]).sqrt() * noise[j]
                for x in (fake, real)
            )
            cond = {"encoder_hidden_states": embeds[j : j + 1]}
            context = torch.tensor([adv_t]), cond, z, torch.tensor([t]), changes.get("adv_unconditional_start") == 1.0
            logits = [discriminator([x[None]], *context)[0, 0] for x in (fake, real)]
            generator_losses.append(torch.log1p(torch.exp(-logits[0])))
            discriminator_losses.append(torch.log1p(torch.exp(-logits[1])) + torch.log1p(torch.exp(logits[0])))
    assert 0 < len(generator_losses) < 4
    mean, mse = np.mean(generator_losses), torch.cat([x - y for x, y in sides]).square().mean().item()
    assert scalars(tmp_path, "loss_adv")[1] == pytest.approx(mean, rel=1e-4)
    assert scalars(tmp_path, "loss_discriminator")[1] == pytest.approx(np.mean(discriminator_losses), rel=1e-4)
    share = 0.5 + 0.5 * sum(1 / i for i in range(1, 21)) / 20  # of jumps that end their segment: a sum over 4 x share
    if is_data:  # of those that start at its upper end too
        share = (top_prob + (1 - top_prob) / 20) * (0.5 + 0.5 / 20)
    expected = 2 * mse + 0.3 * np.sum(generator_losses) / (4 * share)
    assert scalars(tmp_path, "loss")[1] == pytest.approx(expected, rel=1e-4)


@both
def test_a_discriminator_that_sees_no_difference_is_told_of(tmp_path, flags, capsys, monkeypatch, script):
    """With the target as real and no rate it is blind; a line for each stage, and the way out in it."""
    monkeypatch.setattr(adversarial, "MIN_UPDATES", 2)
    flat = {"adv_real": "target", "adv_learning_rate": 0, "adv_head_learning_rate": 0}
    train(flags(tmp_path / "a", script, **flat), script)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: the discriminator")]
    assert [line.split(" sees no difference")[0].split()[-1] for line in lines] == ["stage-0-k2", "stage-1-k1"]
    assert all("pass --adv_real=data, raise --adv_learning_rate" in line for line in lines)


def test_the_ratio_of_the_gradients_is_the_one_at_the_students_output(tmp_path, flags):
    """It is linear in the weights; and the weights of both parts reach the student."""
    options = {"stage_segments": 1, "max_train_steps": 1}
    for name, adv, mse in (("a", 0.1, 1), ("b", 0.3, 4)):
        train(flags(tmp_path / name, tscd, **options, adv_weights=adv, mse_weights=mse), tscd)
    a, b = (scalars(tmp_path / name, "grad_norm_ratio")[1] for name in "ab")
    assert a > 0 and b == pytest.approx(3 * a / 4, rel=1e-4)


def test_without_adversarial_weights_there_is_no_discriminator_and_nothing_else_changes(tmp_path, flags, monkeypatch):
    """A run whose discriminator only warms up has, bit for bit, the student of a run without one."""
    common = {"mse_weights": 1, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    train(flags(tmp_path / "a", tscd, **common, adv_weights="0,0"), tscd)
    monkeypatch.setattr(segments_module, "WARMUP_FRACTION", 1.0)
    train(flags(tmp_path / "b", tscd, **common, adv_weights="0.1", adv_real="target"), tscd)
    a, b = (digests(tmp_path / name / "checkpoint-4") for name in "ab")
    assert "discriminator.safetensors" in b and "discriminator.safetensors" not in a
    same = a.keys() - {"objects.pt"}
    assert {k: a[k] for k in same} == {k: b[k] for k in same}
    assert scalars(tmp_path / "a", "loss") == scalars(tmp_path / "b", "loss")
    assert scalars(tmp_path / "b", "loss_discriminator") and not scalars(tmp_path / "b", "loss_adv")
    first, last = (load_file(tmp_path / "b" / f"checkpoint-{n}" / "discriminator.safetensors") for n in (2, 4))
    assert any(not torch.equal(first[k], last[k]) for k in first)


def test_stages_without_an_adversarial_weight_leave_the_discriminator_alone(tmp_path, flags):
    train(flags(tmp_path, tscd, adv_weights="0.1,0"), tscd)
    assert set(scalars(tmp_path, "loss_adv")) == {1, 2}
    one, two = (load_file(tmp_path / f"checkpoint-{n}" / "discriminator.safetensors") for n in (2, 4))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_discriminators_optimizer_is_not_accelerates_and_samples_have_a_cards_number_of_steps(
    tmp_path, flags, monkeypatch
):
    """The trap: clip_grad_norm_ unscales every prepared optimizer."""
    seen, save = [], checkpointing.save_checkpoint

    def watch(accelerator, *args):
        seen.append((len(accelerator._optimizers), len(accelerator._models)))
        return save(accelerator, *args)

    monkeypatch.setattr(checkpointing, "save_checkpoint", watch)
    train(flags(tmp_path, tscd, validation_num_inference_steps="1,4", max_train_steps=2), tscd)
    assert set(seen) == {(1, 1)}
    heights = [Image.open(tmp_path / name / "sample_grid.png").height for name in ("stage-0-k2", "stage-1-k1")]
    assert heights[0] > heights[1] * 1.3  # 1, 2 and 4 steps against 1 and 4
    saved = torch.load(tmp_path / "checkpoint-2" / "objects.pt", weights_only=True)
    assert saved.keys() == {"lr_scheduler", "discriminator_optimizer", "discriminator_scaler"}
    groups = saved["discriminator_optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-6, 1e-3]
    assert all(float(state["step"]) == 1 for state in saved["discriminator_optimizer"]["state"].values())  # re-made


# --- the score

SCORE = {
    "score_weights": "0,0.5",
    "fake_updates": 1,
    "fake_warmup": 2,
    "fake_lora_rank": 4,
    "fake_learning_rate": 1e-2,
}


@both
def test_a_stages_score_is_logged_watched_and_on_its_card(tmp_path, flags, capsys, script):
    """And trains in its stage alone; the stage before is what it is without one."""
    train(flags(tmp_path / "a", script, adv_weights=0), script)
    train(flags(tmp_path / "b", script, adv_weights=0, **SCORE), script)
    for name in ("loss_fake", "score_gradient", "results_std", "fake_error"):
        values = scalars(tmp_path / "b", name)
        assert set(values) == {3, 4} and np.isfinite(list(values.values())).all()
    a, b = (digests(tmp_path / name / "checkpoint-2") for name in "ab")
    weights = "adapters.safetensors" if script is tscd_lora else "model.safetensors"
    assert a[weights] == b[weights] and "fake_score.safetensors" in b and "fake_score.safetensors" not in a
    a, b = (digests(tmp_path / name / "checkpoint-4") for name in "ab")
    assert a[weights] != b[weights]
    assert "0.5 (score)" in text_of(tmp_path / "b") and "(score)" not in text_of(tmp_path / "b" / "stage-0-k2")


def test_a_stop_in_the_fake_scores_warm_up_ends_the_run_at_once(tmp_path, flags, monkeypatch):
    out = tmp_path / "out"
    done = stop_in_warm_up(monkeypatch, out)
    with pytest.raises(SystemExit) as ended:
        train(flags(out, tscd, adv_weights=0, **SCORE), tscd)
    assert ended.value.code == preemption.EXIT_CODE and done == [-2]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_score_that_cannot_be_had_is_refused_in_a_sentence(tmp_path, flags, capsys, monkeypatch):
    sentence = one_sentence(capsys, train, flags(tmp_path, tscd, **SCORE | {"fake_lora_rank": 999}), tscd)
    assert "--fake_lora_rank=999: the largest of the adapted layers has rank" in sentence
    assert "--fake_lora_rank=0 copies all weights" in one_sentence(
        capsys, tscd_lora.parse_args, flags(tmp_path, tscd_lora, **SCORE | {"fake_lora_rank": 0})
    )
    monkeypatch.setattr(Accelerator, "sharding", {}, raising=False)
    check_engine(Accelerator, 4)
    with pytest.raises(UserError, match="`fake_lora_rank`=0: FSDP2 splits the student and the teacher, and no second"):
        check_engine(Accelerator, 0)


# --- stages, resume, flags


def test_a_shorter_and_an_extended_run_keep_the_stages_where_they_were(tmp_path, flags):
    train(flags(tmp_path, tscd, max_train_steps=4), tscd)
    train(flags(tmp_path, tscd, max_train_steps=3, **undo(tmp_path / "checkpoint-4")), tscd)
    assert "Trained for 3 updates" in text_of(tmp_path) and "num_inference_steps=1," in text_of(tmp_path)
    train(flags(tmp_path, tscd, max_train_steps=6, resume_from_checkpoint="latest"), tscd)
    state = checkpointing.read_state(tmp_path / "checkpoint-6")
    assert state["stage_edges"] == [0, 2, 4] and (tmp_path / "stage-1-k1").is_dir()
    assert "Trained for 6 updates" in text_of(tmp_path / "stage-1-k1")
    assert "stage-0-k2" in json.loads((tmp_path / "training_config.json").read_text())["derived"]
    assert list(scalars(tmp_path, "stage").values()) == [0, 0, 1, 1, 1, 1]


def test_finished_stages_are_not_written_over_by_a_run_with_other_flags(tmp_path, flags, capsys):
    """Such as a run that was killed between a stage's model and its checkpoint."""
    train(flags(tmp_path, tscd, max_train_steps=2, checkpointing_steps=100), tscd)
    for name in ("checkpoint-1", "checkpoint-2"):  # a stage's end leaves one too
        (tmp_path / name / "COMPLETE").unlink()
    for name in ("README.md", "model_index.json"):
        (tmp_path / name).unlink()
    before = (tmp_path / "stage-0-k2" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    capsys.readouterr()
    assert "--learning_rate was 0.0001 and is 0.01" in one_sentence(
        capsys, train, flags(tmp_path, tscd, **again, learning_rate=0.01), tscd, alone=True
    )
    assert (tmp_path / "stage-0-k2" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    train(flags(tmp_path, tscd, **again), tscd)  # the run itself starts anew
    assert (tmp_path / "stage-0-k2" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("keep", [False, True])
def test_the_loras_teacher_computes_in_fp32_when_asked(tmp_path, flags, monkeypatch, keep):
    """accelerate puts autocast around the student's forward, which is the teacher's too."""
    seen, add_lora = [], lora.add_lora

    def patched(unet, *args, **kwargs):
        hook = lambda layer, inputs, output: seen.append(output.dtype) if len(output) == 8 else None  # noqa: E731
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(hook)
        add_lora(unet, *args, **kwargs)

    monkeypatch.setattr(lora, "add_lora", patched)
    extra = {"no-cast_teacher_unet": True} if keep else {}
    extra |= {"mixed_precision": "bf16", "max_train_steps": 1, "stage_segments": 1, "adv_weights": 0}
    train(flags(tmp_path, tscd_lora, **extra), tscd_lora)
    assert set(seen) == {torch.float32 if keep else torch.bfloat16}


def test_a_frozen_backbone_stays_the_teachers_and_means_of_the_logits_are_logged(tmp_path, flags, teacher):
    train(flags(tmp_path, tscd, freeze_discriminator_backbone=True), tscd)
    for tag in ("logit_real", "logit_fake", "loss_discriminator", "loss_adv", "grad_norm_ratio"):
        values = list(scalars(tmp_path, tag).values())
        assert len(values) == 4 and np.isfinite(values).all()
    saved = load_file(tmp_path / "checkpoint-4" / "discriminator.safetensors")
    original = load_file(Path(teacher(), "unet", "diffusion_pytorch_model.safetensors"))
    encoder = {k.removeprefix("encoder."): v for k, v in saved.items() if k.startswith("encoder.")}
    assert encoder and all(torch.equal(original[k], v) for k, v in encoder.items())
    heads = [load_file(tmp_path / f"checkpoint-{n}" / "discriminator.safetensors")["head.0.weight"] for n in (2, 4)]
    assert not torch.equal(*heads)


def test_an_embedding_of_w_is_an_option(tmp_path, flags):
    train(flags(tmp_path, tscd, unet_time_cond_proj_dim=32, learning_rate=0.01), tscd)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.time_cond_proj_dim == 32 and "guidance_scale=2," in text_of(tmp_path)
    options = {"num_inference_steps": 1, "output_type": "np"}
    images = [pipeline("a", guidance_scale=g, generator=torch.manual_seed(0), **options).images for g in (1.5, 2.5)]
    assert not np.array_equal(*images)


def test_a_student_goes_on_from_an_earlier_one(tmp_path, flags, teacher):
    unet, start = teachers.load_teacher(teacher()).unet, tmp_path / "start"
    torch.nn.init.normal_(unet.conv_in.weight)
    unet.save_pretrained(start / "unet")
    options = {"learning_rate": 0, "adam_weight_decay": 0, "max_train_steps": 2}
    train(flags(tmp_path / "b", tscd, init_unet=start, **options), tscd)
    a, b = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (start, tmp_path / "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_plan_is_printed(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "begin", finished)
    train(flags(tmp_path / "out", tscd, dry_run=True), tscd)
    out = capsys.readouterr().out
    assert "stage-1-k1" in out and "updates 2 to 4, sampling in 1" in out and "real is the data)" in out
    assert list(tmp_path.iterdir()) == []

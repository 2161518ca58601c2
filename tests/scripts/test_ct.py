"""train_cm_ct_unconditional.py from end to end, on the digits at 8 pixels."""

import io
import json
import shlex
import shutil
import subprocess
import tarfile

import train_cm_ct_unconditional as ct
from common.ct import consistency
from common.ct import flags as ct_flags
from common.ct import unet as ct_unet
from common.ct.data import decode_image_label, open_images
from common.ct.scheduler import PreconditionedConsistencyScheduler
from common.data import cached_latents
from common.data.folders import IMAGE_KEYS
from common.data.stream import TrainingData
from common.errors import UserError
from common.keyed_random import keyed_generator
from common.networks import performance
from common.run import checkpointing, engine, simulation
from common.tools.demo import __main__ as demo
from common.tools.demo import consistency as ct_demo
from common.tools.demo import digits, measuring
from tests.cases import digests, finished, image_tags, one_sentence, scalars
from tests.cases import train as run_script
from tests.made import CONFIG, NUM_IMAGES, rows
from tests.scripts.test_flags import gpu  # noqa: F401

import datasets
import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

# The guide's command, verbatim.
GUIDE_CT = """
accelerate launch examples/research_projects/consistency_training/train_cm_ct_unconditional.py \\
    --dataset_name="cifar10" \\
    --dataset_image_column_name="img" \\
    --output_dir="/path/to/output/dir" \\
    --mixed_precision=fp16 \\
    --resolution=32 \\
    --max_train_steps=1000 --max_train_samples=10000 \\
    --dataloader_num_workers=8 \\
    --noise_precond_type="cm" --input_precond_type="cm" \\
    --train_batch_size=4 \\
    --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 \\
    --use_8bit_adam \\
    --use_ema \\
    --validation_steps=100 --eval_batch_size=4 \\
    --checkpointing_steps=100 --checkpoints_total_limit=10 \\
    --class_conditional --num_classes=10 \\
"""

# name: default, as the public script has them, but for those that the papers set otherwise (OTHER_DEFAULTS).
PUBLIC_FLAGS = {
    "model_config_name_or_path": None, "pretrained_model_name_or_path": None, "revision": None, "variant": None,
    "train_data_dir": None, "dataset_name": None, "dataset_config_name": None, "dataset_image_column_name": "image",
    "dataset_class_label_column_name": "label", "resolution": 64, "interpolation_type": "bilinear",
    "center_crop": False, "random_flip": False, "class_conditional": False, "num_classes": None,
    "class_embed_type": None, "dataloader_num_workers": 0, "overwrite_output_dir": False, "cache_dir": None,
    "seed": None, "train_batch_size": 16, "num_train_epochs": 100, "max_train_steps": None, "max_train_samples": None,
    "learning_rate": 1e-4, "scale_lr": False, "lr_warmup_steps": 500, "use_8bit_adam": False, "adam_beta2": 0.999,
    "adam_weight_decay": 1e-6, "adam_epsilon": 1e-8, "prediction_type": "sample", "sigma_min": 0.002,
    "sigma_max": 80.0, "rho": 7.0, "discretization_s_0": 10, "discretization_s_1": 1280,
    "constant_discretization_steps": False, "p_mean": -1.1, "p_std": 2.0, "noise_precond_type": "cm",
    "input_precond_type": "cm", "skip_steps": 1, "use_ema": False, "ema_min_decay": None, "ema_max_decay": 0.99993,
    "use_ema_warmup": False, "ema_inv_gamma": 1.0, "ema_power": 0.75, "mixed_precision": None, "allow_tf32": False,
    "gradient_checkpointing": "none", "gradient_accumulation_steps": 1,
    "enable_xformers_memory_efficient_attention": False, "local_rank": -1, "validation_steps": 200,
    "eval_batch_size": 16, "checkpointing_steps": 500, "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "report_to": ["tensorboard"], "logging_dir": "logs", "push_to_hub": False, "hub_token": None, "hub_model_id": None,
    "hub_private_repo": False, "tracker_project_name": "consistency-training",
}  # fmt: skip
OTHER_DEFAULTS = {
    "optimizer_type": "radam", "lr_scheduler": "constant", "adam_beta1": 0.9, "max_grad_norm": None,
    "cast_teacher": True, "huber_c": 0.00054 * 3**0.5 * 64, "mid_sigma": 1.526, "output_dir": "consistency-model",
}  # fmt: skip
REQUIRED, SHARDS = ["--dataset_name=d"], "--train_shards_path_or_url=s.tar"


@pytest.fixture(scope="session")
def image_folder(build_once):
    def build(folder):
        for i, (image, label) in enumerate(zip(*rows(), strict=True)):
            (folder / digits.WORDS[label]).mkdir(parents=True, exist_ok=True)
            image.save(folder / digits.WORDS[label] / f"{i}.png")

    return build_once("ct_image_folder", build)


@pytest.fixture(scope="session")
def label_shards(build_once):
    """Shards of images, the class as `cls` in even ones and in the json in odd ones."""

    def build(folder):
        folder.mkdir()
        images, labels = rows()
        for shard in range(4):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for i in range(shard, NUM_IMAGES, 4):
                    png = io.BytesIO()
                    images[i].save(png, "png")
                    text = str(labels[i]) if i % 2 else json.dumps({"label": labels[i]})
                    for name, data in (
                        (f"{i}.png", png.getvalue()),
                        (f"{i}.{'cls' if i % 2 else 'json'}", text.encode()),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    return build_once("ct_shards", build)


@pytest.fixture
def flags(command):
    """flags(output_dir, **changes): a run of eight updates."""
    return lambda folder, **changes: command(
        "ct", folder, **{"max_train_steps": 8, "checkpointing_steps": 4} | changes
    )


def train(words):
    run_script(words, ct)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- flags


def test_the_guides_command_parses_verbatim(gpu):  # noqa: F811
    words = shlex.split(GUIDE_CT.rstrip().removesuffix("\\").replace("\\\n", "")) + ["\\"]  # no line follows the last
    args = ct.parse_args(words[3:])
    assert args.optimizer_type == "adamw" and args.max_train_samples == 10_000 and args.num_classes == 10
    assert args.mid_sigma == 0.821 and args.huber_c == pytest.approx(0.00054 * (3 * 32 * 32) ** 0.5)


def test_the_guides_command_runs_on_a_data_set_with_its_columns(tmp_path, data_set, monkeypatch):
    """Changed: paths, fp16 to bf16 (no fp16 on a CPU), fewer steps, a small network in the 54 M default's place."""
    monkeypatch.setitem(ct_unet.DEFAULT_CONFIGS, 32, CONFIG)
    command = GUIDE_CT.replace("cifar10", str(data_set)).replace("/path/to/output/dir", str(tmp_path / "out"))
    command = command.replace("fp16", "bf16").replace("max_train_steps=1000", "max_train_steps=8")
    command = command.replace("--validation_steps=100", "--validation_steps=8").replace("workers=8", "workers=2")
    train(shlex.split(command.replace("\\\n", ""))[3:])
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    assert pipeline(class_labels=3, num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_every_public_flag_is_there_with_its_default():
    args = vars(ct.parse_args(REQUIRED)) | {"dataset_name": None}
    assert {flag: args[flag] for flag in PUBLIC_FLAGS} == PUBLIC_FLAGS
    assert {flag: args[flag] for flag in OTHER_DEFAULTS} == pytest.approx(OTHER_DEFAULTS)
    assert (
        len(PUBLIC_FLAGS) + len(OTHER_DEFAULTS) - 1 + len(ct_flags.REFUSED) == 79
    )  # mid_sigma is not the public one's


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ddpm_num_steps=1000"], "--ddpm_num_steps: a consistency model has no DDPM schedule"),
        (["--ddpm_num_inference_steps=10"], "--ddpm_num_inference_steps: a consistency model has no DDPM schedule"),
        (["--ddpm_beta_schedule=linear"], "--ddpm_beta_schedule: a consistency model has no DDPM schedule"),
        (["--save_images_epochs=10"], "--save_images_epochs: samples are drawn every --validation_steps"),
        (["--save_model_epochs=10"], "--save_model_epochs: checkpoints are saved every --checkpointing_steps"),
        ([*REQUIRED, "--train_data_dir=x"], "one of --dataset_name, --train_data_dir and --train_shards_path_or_url"),
        (["--num_classes=10"], "--num_classes is for --class_conditional"),
        (["--class_embed_type=timestep"], "--class_embed_type is for --class_conditional"),
        (["--class_conditional", "--class_embed_type=identity"], "--class_embed_type=identity takes a vector"),
        (["--overwrite_output_dir", "--resume_from_checkpoint=latest"], "drop one"),
        (["--pretrained_model_name_or_path=x", "--model_config_name_or_path=y"], "drop --model_config_name_or_path"),
        (["--use_8bit_adam", "--optimizer_type=radam"], "--use_8bit_adam is 8-bit AdamW; drop it"),
        (["--use_ema", "--ema_min_decay=0.9999999"], "is more than --ema_max_decay"),
        (["--use_ema", "--ema_gamma=7", "--use_ema_warmup"], "--ema_gamma is another average"),
        (["--use_ema_warmup", "--ema_max_decay=0.9"], "--ema_max_decay, --use_ema_warmup: there is no average"),
        (["--use_ema", "--ema_gamma=7", "--ema_max_decay=0.9"], "--ema_max_decay: --ema_gamma is an average without"),
        (["--use_ema", "--ema_inv_gamma=2", "--ema_power=1"], "--ema_inv_gamma, --ema_power: there is no warm-up"),
        (["--ect_k=8", "--ect_q=2"], "--ect_q, --ect_k: --objective=ict has no such number; drop it"),
        (
            ["--objective=ect", "--pretrain_steps=1", "--skip_steps=2"],
            "--skip_steps: --objective=ect has no such number",
        ),
        (["--pretrain_p_std=1"], "--pretrain_p_std: there is no diffusion training; add --pretrain_steps"),
        (["--dataset_class_label_column_name=x"], "--dataset_class_label_column_name: no class is read; add"),
        (["--dataset_name="], "--dataset_name is empty (a variable that is not set?); give it a value, or drop it"),
        (["--feature_network=x", "--eval_num_samples=9"], "--feature_network, --eval_num_samples: nothing is"),
        (["--p_mean=nan"], "--p_mean: must be a number, not nan"),
        (["--pretrain_p_mean=inf", "--pretrain_steps=1"], "--pretrain_p_mean: must be a number, not inf"),
        (["--mid_sigma=90"], "--mid_sigma=90.0 must lie between"),
        (["--eval_steps=10"], "--eval_steps needs --feature_network"),
        (["--eval_class_accuracy"], "--eval_class_accuracy needs --eval_steps"),
        (["--eval_steps=1", "--feature_network=x", "--eval_num_samples=1"], "a distance needs at least 2 of each"),
        (["--sigma_min=90"], "--sigma_min=90.0 must be less than"),
        (["--objective=ect"], "--objective=ect tunes a diffusion model"),
        (["--ect_q=1", "--objective=ect", "--pretrain_steps=1"], "--ect_q must be more than 1"),
        (["--ect_q=256", "--objective=ect", "--pretrain_steps=1"], "ect_q^ect_stages at most 65536"),
        (["--discretization_s_1=5"], "--discretization_s_1=5 is less than --discretization_s_0"),
        (["--skip_steps=11"], "--skip_steps=11: at most --discretization_s_0=10"),
        (["--mixed_precision=fp16"], "--mixed_precision=fp16 needs a GPU"),
        (["--prediction_type=epsilon"], "--prediction_type: invalid choice"),
        ([SHARDS, "--class_conditional"], "shards do not tell how many classes there are"),
        ([SHARDS, "--dataset_image_column_name=img"], "--dataset_image_column_name: shards have no columns"),
        (["--train_data_dir=y", "--dataset_config_name=x"], "--dataset_config_name is for --dataset_name"),
    ],
)
def test_mistakes_end_in_one_sentence_and_exit_code_2(words, sentence, capsys):
    assert sentence in one_sentence(
        capsys,
        ct.parse_args,
        words if words[0].startswith(("--train_", "--dataset_name")) else REQUIRED + words,
        alone=True,
    )


@pytest.mark.parametrize(("resolution", "millions"), [(32, 54.3), (64, 295.5)])
def test_default_networks_have_the_papers_sizes(resolution, millions):
    config = ct_unet.read_unet_config(resolution, num_classes=10)
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=1)
        bottom = []
        unet.mid_block.register_forward_hook(lambda module, args, out: bottom.append(out.shape[-1]))
        unet(torch.empty(1, 3, resolution, resolution), torch.empty(1), torch.zeros(1, dtype=torch.long))
    attends = sum("Attn" in name for name in config["down_block_types"])
    assert bottom == [8] and attends == (1 if resolution == 32 else 3)


# --- the method


def first_batch(data_set, seed=1):
    shards, source = open_images(None, data_set, image_column="img", label_column="label")

    def decode(raw, rng):
        return decode_image_label(raw, rng, resolution=8, num_classes=10)

    options = {"batch_size": 4, "seed": seed, "shuffle_block_samples": 16, "source": source}
    return next(iter(TrainingData(shards, decode, required=(IMAGE_KEYS, ("cls", "json")), **options)))


@pytest.mark.parametrize("objective", ["ict", "ict, skipping", "ect", "ect at sigma_min", "pretraining"])
def test_the_first_loss_is_the_papers_with_diffusers_scheduler_as_f(tmp_path, flags, data_set, objective):
    """Everything of step 7 again, f by CMStochasticIterativeScheduler.step, the rest by the formulas."""
    torch.manual_seed(0)
    start = UNet2DModel.from_config(CONFIG | {"num_class_embeds": 10, "sample_size": 8, "dropout": 0.0})
    start.save_pretrained(tmp_path / "start")
    extra = {
        "ict": {},
        "ict, skipping": {"skip_steps": 3},
        "ect": {"objective": "ect", "ect_q": 4.0, "ect_stages": 2},
        "ect at sigma_min": {"objective": "ect", "ect_q": 256.0, "ect_stages": 1, "p_mean": -20.0},
        "pretraining": {"pretrain_steps": 1},
    }[objective]
    extra |= {"model_config_name_or_path": None, "pretrained_model_name_or_path": tmp_path / "start"}
    train(flags(tmp_path / "out", max_train_steps=8, checkpointing_steps=8, **extra))
    logged = scalars(tmp_path / "out", "loss")[1]

    batch, draw = first_batch(data_set), keyed_generator(1, "ct", 0, "cpu")
    x = batch["images"].double() / 127.5 - 1
    skip = extra.get("skip_steps", 1)
    if objective.startswith("ict"):
        grid = consistency.karras_sigmas(11)
        index = torch.multinomial(consistency.sigma_probabilities(grid, skip_steps=skip), 4, True, generator=draw)
        t, r = grid[index + skip].float().double(), grid[index].float().double()
    else:
        mean, std = (-1.2, 1.2) if objective == "pretraining" else (extra.get("p_mean", -1.1), 2.0)
        t = torch.exp(mean + std * torch.randn(4, generator=draw)).clamp(0.002, 80).double()
        r = (t * (1 - (1 + 8 / (1 + torch.exp(t))) / extra.get("ect_q", 4.0))).clamp(min=0)
    z = torch.randn(x.shape, generator=draw).double()
    unet = start.eval().double()

    @torch.no_grad()
    def f(x, sigma, label):
        scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
        scheduler.sigmas, scheduler.timesteps = torch.stack([sigma, sigma]), 250 * sigma.log()[None]
        time = scheduler.timesteps[0]
        output = unet(scheduler.scale_model_input(x, time), time, label).sample
        return scheduler.step(output, time, x).prev_sample

    losses = []
    for i in range(4):
        label = batch["class_labels"][i : i + 1]
        student = f(x[i : i + 1] + t[i] * z[i : i + 1], t[i], label)
        if objective == "pretraining":
            losses.append((student - x[i : i + 1]).square().mean() * (t[i] ** 2 + 0.25) / (0.5 * t[i]) ** 2)
            continue
        x_r = x[i : i + 1] + r[i] * z[i : i + 1]
        target = f(x_r, r[i], label) if r[i] >= 0.002 else x_r  # the identity up to sigma_min; r = 0: the data
        c = 0.00054 * (3 * 8 * 8) ** 0.5 if objective.startswith("ict") else 0.0
        losses.append((((student - target) ** 2).sum() + c**2).sqrt().sub(c) / (t[i] - r[i]))
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=2e-4)
    if objective == "ect at sigma_min":  # f(x_t) - x_r = (t - r) z, whatever the weights are
        assert logged == pytest.approx(z.flatten(1).norm(dim=1).mean().item(), rel=2e-4)


def test_both_sides_have_the_same_dropout_and_every_step_has_another(tmp_path, flags, monkeypatch):
    """At equal noise levels student and target are equal; the global generator is not moved."""
    pairs, masks, states = [], [[]], []
    huber, dropout = consistency.pseudo_huber, torch.nn.Dropout.forward

    def watched_dropout(self, x):
        out = dropout(self, x)
        if self.training and out.device.type != "meta":
            masks[-1].append(((out == 0) & (x != 0)).flatten(1).sum(1).tolist())
        return out

    def watched_loss(a, b, c):
        pairs.append((a.detach(), b))
        states.append(torch.get_rng_state())
        masks.append([])
        return huber(a, b, c)

    monkeypatch.setattr(consistency, "ect_target_sigma", lambda t, *args: t)
    monkeypatch.setattr(consistency, "loss_weight", lambda t, r, *args: torch.ones_like(t))
    monkeypatch.setattr(consistency, "pseudo_huber", watched_loss)
    monkeypatch.setattr(torch.nn.Dropout, "forward", watched_dropout)
    start = {"objective": "ect", "pretrained_model_name_or_path": tmp_path / "a", "model_config_name_or_path": None}
    train(flags(tmp_path / "a", max_train_steps=8, report_to="none"))  # F of a new network is zero
    for values in (pairs, states):
        values.clear()
    masks[:] = [[]]
    train(flags(tmp_path / "b", max_train_steps=3, report_to="none", dropout=0.5, **start))
    assert len(pairs) == 3
    for student, target in pairs:  # with and without gradients, which may take other kernels: equal up to rounding
        torch.testing.assert_close(student, target)
    assert all(torch.equal(state, states[0]) for state in states)
    layers = len(masks[0]) // 2
    assert layers > 4 and masks[0][:layers] == masks[0][layers:] and masks[0][0] != masks[1][-1]
    assert len({str(step[-layers:]) for step in masks[:3]}) == 3


@pytest.mark.parametrize("cast_teacher", [True, False])
def test_images_noise_levels_and_loss_are_float32_under_bf16(tmp_path, flags, monkeypatch, cast_teacher):
    seen, huber = {}, consistency.pseudo_huber

    def watch(self, x, *args, **kwargs):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if x.device.type != "meta":  # the first ones: samples come later
            seen.setdefault("student" if torch.is_grad_enabled() else "target", (x.dtype, self.dtype, dtype))
        return forward(self, x, *args, **kwargs)

    def loss(a, b, c):
        seen["loss"] = (a.dtype, b.dtype)
        return huber(a, b, c)

    forward = UNet2DModel.forward
    monkeypatch.setattr(UNet2DModel, "forward", watch)
    monkeypatch.setattr(consistency, "pseudo_huber", loss)
    extra = {} if cast_teacher else {"no-cast_teacher": True}
    train(flags(tmp_path / "out", mixed_precision="bf16", max_train_steps=4, eval_nfe=1, **extra))
    fp32, bf16 = torch.float32, torch.bfloat16
    assert seen["loss"] == (fp32, fp32) and seen["student"] == (fp32, fp32, bf16)
    assert seen["target"] == (fp32, fp32, bf16 if cast_teacher else None)


def test_a_gradient_scaler_drives_the_step_and_is_resumed(tmp_path, flags, monkeypatch):
    """fp16's path without a GPU: torch's scaler for the CPU, whose first scale overflows, around bf16's autocast."""
    scales, make = [], engine.make_accelerator

    def with_scaler(args):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)
        return accelerator

    monkeypatch.setattr(engine, "make_accelerator", with_scaler)
    save = checkpointing.save_checkpoint

    def saved(accelerator, *args):
        scales.append(accelerator.scaler.get_scale())
        return save(accelerator, *args)

    monkeypatch.setattr(checkpointing, "save_checkpoint", saved)
    options = {"mixed_precision": "bf16", "max_train_steps": 16, "checkpointing_steps": 4, "max_grad_norm": 1.0}
    train(flags(tmp_path / "a", **options))
    assert scales[0] < 2.0**126 and all(torch.isfinite(w).all() for w in weights(tmp_path / "a" / "unet").values())
    expected = digests(tmp_path / "a" / "checkpoint-16")
    (tmp_path / "a" / "checkpoint-16" / "COMPLETE").unlink()
    train(flags(tmp_path / "a", **options, resume_from_checkpoint="latest"))
    assert digests(tmp_path / "a" / "checkpoint-16") == expected


def test_constant_images_are_learnt(tmp_path, flags):
    """Data of one grey value, 0.498: samples of one and two steps are of that value."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    grey = [Image.new("RGB", (8, 8), (191,) * 3)] * 16
    datasets.Dataset.from_dict({"img": grey, "label": [0] * 16}, features).save_to_disk(tmp_path / "grey")
    options = {"dataset_name": tmp_path / "grey", "class_conditional": None, "dropout": 0.0, "discretization_s_1": 10}
    options |= {"max_train_steps": 160, "train_batch_size": 8, "checkpointing_steps": 160, "ema_max_decay": 0.95}
    train(flags(tmp_path / "out", **options | {"learning_rate": 4e-3, "logging_steps": 80}))
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    for timesteps in ([0], [6, 0]):
        images = pipeline(
            batch_size=64, timesteps=timesteps, num_inference_steps=None, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        assert (2 * images - 1).mean().item() == pytest.approx(0.498, abs=0.05)


# --- data


def test_all_sources_give_the_same_images_and_classes(data_set, image_folder, label_shards):
    seen = []
    for where in ({"dataset_name": data_set, "image_column": "img"}, {"train_data_dir": image_folder}):
        seen.append(read_all(*open_images(None, label_column="label", **where)))
    seen.append(read_all(*open_images(str(label_shards))))
    names = sorted(digits.WORDS)  # the classes of an image folder are in alphabetic order
    for images, other in zip(seen[0], seen[1], strict=True):
        assert images[0] == other[0] and digits.WORDS[images[1]] == names[other[1]]
    assert len(seen[0]) == NUM_IMAGES and seen[0] == seen[2]


def read_all(shards, source):
    def decode(raw, rng):
        return decode_image_label(raw, rng, resolution=8, num_classes=10)

    required = (IMAGE_KEYS, ("cls", "json"))
    data = TrainingData(shards, decode, batch_size=1, seed=0, num_lanes=1, source=source, required=required)
    samples = [next_batch for next_batch, _ in zip(data, range(NUM_IMAGES), strict=False)]
    return sorted((batch["images"].numpy().tobytes(), batch["class_labels"].item()) for batch in samples)


def test_unreadable_images_and_classes_are_skipped_and_counted(tmp_path, flags):
    images, labels = rows(40)
    encoded = []
    for image in images:
        png = io.BytesIO()
        image.save(png, "png")
        encoded.append({"bytes": png.getvalue(), "path": None})
    encoded[3]["bytes"], encoded[5]["bytes"] = b"no image", b""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"img": encoded, "label": labels[:7] + [-1] + labels[8:]}, features).save_to_disk(
        tmp_path / "bad"
    )
    train(flags(tmp_path / "out", dataset_name=tmp_path / "bad", max_train_steps=20, checkpointing_steps=20))
    log = [json.loads(line) for line in (tmp_path / "out" / "skipped_samples.jsonl").read_text().splitlines()]
    assert {line["key"] for line in log} == {"00000003", "00000005", "00000007"}
    assert any("`num_classes`=10" in line["detail"] for line in log)


def test_hub_data_sets_are_read_by_name_and_configuration(monkeypatch):
    """What `datasets` is asked for; a download is not possible here."""
    asked, images = [], rows(4)
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", *digits.WORDS])})
    data = datasets.Dataset.from_dict({"img": images[0], "fine": images[1]}, features)

    def load_dataset(path, name=None, revision=None, cache_dir=None):
        asked.append((path, name, revision, cache_dir))
        return datasets.DatasetDict({"test": data.select([0]), "train": data})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"image_column": "img", "label_column": "fine"}
    place = {"cache_dir": "/cache", "revision": "main"}
    shards, source = open_images(None, "cifar100", dataset_config_name="cfg", **columns, **place)
    assert asked == [("cifar100", "cfg", "main", "/cache")] and shards == ["cifar100"]
    assert source.num_classes == 11 and len(source.keys) == 4 and source.read(1)["cls"] == str(images[1][1]).encode()
    monkeypatch.setattr(datasets, "load_dataset", lambda **kwargs: datasets.DatasetDict({"test": data}))
    with pytest.raises(UserError, match="has no split named train, only test"):
        open_images(None, "cifar100", image_column="img")


def test_a_classifier_of_other_classes_is_refused(tmp_path, flags, classifier, capsys):
    options = {"eval_steps": 4, "feature_network": classifier, "eval_class_accuracy": True, "num_classes": 11}
    assert "knows 10 classes and the data have 11" in one_sentence(capsys, train, flags(tmp_path / "out", **options))


def labelled(labels):
    images, _ = rows(len(labels))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"img": images, "label": labels}, features)


def test_a_split_without_classes_is_refused(tmp_path, flags, capsys):
    """Test splits of the hub have -1 in each row; the network then got no class and no embedding for one."""
    labelled([-1] * 20).save_to_disk(tmp_path / "data")
    assert "no row has a class, the column label holds only negative numbers" in one_sentence(
        capsys, train, flags(tmp_path / "out", dataset_name=tmp_path / "data", num_classes=None)
    )


def test_cached_latents_are_called_by_their_name(tmp_path):
    header = {"format": 1, "shape": [4, 8, 8], "dtype": "float32", "seed": 0, "encoder_sha256": "x"}
    header |= dict.fromkeys(cached_latents.IMAGE_FLAGS, 0)
    cached_latents.write_shard(
        tmp_path / "0.tar", json.dumps(header).encode(), [], lambda count, size: {"bytes": size}
    )
    with pytest.raises(UserError, match="holds cached latents, and this script trains on images; name the shards"):
        open_images(str(tmp_path / "0.tar"))


def test_data_of_which_nothing_is_usable_are_called_by_their_flag(tmp_path, flags, capsys):
    (tmp_path / "data").mkdir()
    for i in range(8):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"no image")
    changes = {"dataset_name": None, "train_data_dir": tmp_path / "data", "class_conditional": None}
    changes |= {"dataset_image_column_name": None, "num_classes": None}
    assert f"check --train_data_dir={tmp_path / 'data'}, or pass fewer" in one_sentence(
        capsys, train, flags(tmp_path / "out", **changes)
    )


def test_max_train_samples_limits_the_distinct_images(tmp_path, flags, monkeypatch):
    keys, stream = set(), TrainingData._consume

    def consume(self, item):
        keys.update(item["batch"]["keys"])
        return stream(self, item)

    monkeypatch.setattr(TrainingData, "_consume", consume)
    train(flags(tmp_path / "out", max_train_samples=8, max_train_steps=8))
    assert len(keys) == 8


# --- the result


def test_the_result_is_a_stock_pipeline_of_the_average_and_is_sampled_in_eval_mode(tmp_path, flags, monkeypatch):
    modes, call = [], ConsistencyModelPipeline.__call__

    def watched(self, *args, **kwargs):
        modes.append(self.unet.training)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ConsistencyModelPipeline, "__call__", watched)
    out = tmp_path / "out"
    train(flags(out, validation_steps=4))
    assert image_tags(out) == {f"validation/{name}_{k}_steps" for name in ("raw", "ema") for k in (1, 2)}
    assert len(modes) == 8 and not any(modes)
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(out))
    assert type(pipeline.scheduler) is CMStochasticIterativeScheduler
    assert pipeline.scheduler.config.num_train_timesteps == 41 and pipeline.unet.config.sample_size == 8
    checkpoint = out / "checkpoint-8"
    assert same(weights(out / "unet"), load_file(checkpoint / "ema_unet.safetensors"))
    assert same(weights(out / "unet_raw"), load_file(checkpoint / "model.safetensors"))
    assert not same(weights(out / "unet"), weights(out / "unet_raw"))
    card = (out / "README.md").read_text()
    assert "timesteps=[25, 0]" in card and "Warning" not in card and "unconditional-image-generation" in card
    snippet = card.split("```python\n")[1].split("```")[0].replace('pipe.to("cuda")', "")
    names = {}
    exec(snippet, names)  # as a user would paste it
    assert len(names["one_step"]) == len(names["two_steps"]) == 8
    assert (out / "sample_grid.png").is_file()


def test_a_run_too_short_for_its_average_gives_the_last_weights(tmp_path, flags, capsys):
    train(flags(tmp_path / "out", ema_max_decay=0.999))
    out = tmp_path / "out"
    assert same(weights(out / "unet"), load_file(out / "checkpoint-8" / "model.safetensors"))
    assert same(weights(out / "unet_ema"), load_file(out / "checkpoint-8" / "ema_unet.safetensors"))
    printed = capsys.readouterr().out
    assert "99% of it still its start at the end: too much" in printed.partition("steps:")[0]  # before hours are spent
    assert "WARNING: the run is too short for its average, 99% of which" in printed
    assert "WARNING: the run is too short" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "decays"),
    [
        ({}, [0, 0.5, 0.5, 0.5]),
        ({"ema_max_decay": 0.9, "ema_min_decay": 0.1}, [0, 2 / 11, 3 / 12, 4 / 13]),
        ({"ema_max_decay": 0.9, "use_ema_warmup": True, "ema_power": 1.0}, [0, 1 / 2, 2 / 3, 3 / 4]),
        ({"ema_gamma": 1.0, "ema_max_decay": None}, [0, 1 / 4, 4 / 9, 9 / 16]),
    ],
)
def test_averages(tmp_path, flags, changes, decays):
    train(flags(tmp_path / "out", max_train_steps=4, checkpointing_steps=1, **changes))
    expected = None
    for step, decay in enumerate(decays, 1):
        model, ema = (
            load_file(tmp_path / "out" / f"checkpoint-{step}" / f"{n}.safetensors") for n in ("model", "ema_unet")
        )
        expected = model if expected is None else {n: decay * expected[n] + (1 - decay) * model[n] for n in model}
        for name in model:
            torch.testing.assert_close(ema[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"noise_precond_type": "edm"}, {"noise_precond_type": "none"}, {"input_precond_type": "none"}]
)
def test_other_preconditionings_train_and_are_saved_with_their_scheduler(tmp_path, flags, changes):
    train(flags(tmp_path / "out", validation_steps=4, **changes))
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    assert "WARNING: `noise_precond_type` or `input_precond_type` is not cm" in card
    assert not (out / "model_index.json").exists()
    snippet = card.split("```python\n")[1].split("```")[0].replace('pipe.to("cuda")', "")
    names = {}
    exec(snippet, names)
    assert type(names["pipe"].scheduler) is PreconditionedConsistencyScheduler and len(names["two_steps"]) == 8


def test_unconditional_training(tmp_path, flags):
    train(flags(tmp_path / "out", class_conditional=None, validation_steps=2, use_ema=None, ema_max_decay=None))
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    assert pipeline.unet.config.num_class_embeds is None and not (tmp_path / "out" / "unet_raw").exists()
    assert pipeline(batch_size=2, output_type="np").images.shape == (2, 8, 8, 3)


def test_classes_as_timesteps_reach_the_network(tmp_path, flags):
    train(flags(tmp_path / "out", class_embed_type="timestep"))
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    one, two = (
        pipeline(class_labels=k, output_type="pt", generator=torch.Generator().manual_seed(0)).images for k in (1, 2)
    )
    assert not torch.equal(one, two)


def test_pretraining_alone_is_no_consistency_model_and_a_start_for_ect(tmp_path, flags, capsys):
    train(flags(tmp_path / "a", pretrain_steps=8, objective="ect"))
    assert "WARNING: every update was diffusion training" in (tmp_path / "a" / "README.md").read_text()
    options = {"model_config_name_or_path": None, "pretrained_model_name_or_path": tmp_path / "a"}
    train(flags(tmp_path / "b", objective="ect", learning_rate=0, adam_weight_decay=0, **options))
    assert same(weights(tmp_path / "a" / "unet"), weights(tmp_path / "b" / "unet_raw"))
    train(
        flags(tmp_path / "a", pretrain_steps=8, objective="ect", max_train_steps=16, resume_from_checkpoint="latest")
    )
    assert scalars(tmp_path / "a", "ect_stage") == {9 + i: 1 + i for i in range(8)}
    assert "has 10 classes; pass --class_conditional" in one_sentence(
        capsys, train, flags(tmp_path / "c", **options, class_conditional=None)
    )
    scheduler = tmp_path / "a" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("CMStochasticIterativeScheduler", "DDPMScheduler"))
    assert "was trained for DDPMScheduler" in one_sentence(capsys, train, flags(tmp_path / "c", **options))


def test_an_extended_run_keeps_its_curriculum(tmp_path, flags):
    train(flags(tmp_path / "out", max_train_steps=6, checkpointing_steps=3))
    train(flags(tmp_path / "out", max_train_steps=9, checkpointing_steps=3, resume_from_checkpoint="latest"))
    levels = scalars(tmp_path / "out", "discretization_steps")
    assert [levels[step] for step in range(1, 10)] == [11, 11, 21, 21, 41, 41, 41, 41, 41]


def test_overwriting_moves_the_earlier_run_aside(tmp_path, flags, capsys):
    train(flags(tmp_path / "out", max_train_steps=3))
    train(flags(tmp_path / "out", max_train_steps=4, overwrite_output_dir=True))
    assert (tmp_path / "out.1" / "checkpoint-3").is_dir() and not (tmp_path / "out" / "checkpoint-3").exists()
    train(flags(tmp_path / "new", max_train_steps=3, overwrite_output_dir=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert (
        "holds files but no run" in one_sentence(capsys, train, flags(tmp_path / "mine", overwrite_output_dir=True))
        and (tmp_path / "mine" / "notes.txt").is_file()
    )
    assert "is not empty" in one_sentence(capsys, train, flags(tmp_path / "out"))


def test_steps_follow_from_epochs_by_default(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "begin", finished)
    train(flags(tmp_path / "out", max_train_steps=None, num_train_epochs=1, max_train_samples=16, dry_run=True))
    out = capsys.readouterr().out
    assert "updates             4" in out and "noise levels        11 to 41" in out and not (tmp_path / "out").exists()


def test_average_and_xformers_go_together(tmp_path, flags, monkeypatch):
    asked = []
    monkeypatch.setattr(UNet2DModel, "enable_xformers_memory_efficient_attention", lambda self: asked.append(self))
    monkeypatch.setattr(performance, "xformers_failure", lambda *_: None)
    train(flags(tmp_path / "out", max_train_steps=3, enable_xformers_memory_efficient_attention=True))
    assert len(asked) == 2


# --- samples and evaluation


def test_evaluation_in_the_loop(tmp_path, flags, classifier):
    options = {"eval_steps": 4, "feature_network": classifier, "eval_num_samples": 22, "eval_num_reference": 60}
    train(flags(tmp_path / "a", **options, eval_class_accuracy=True))
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    names = [(row["step"], row["network"], row["num_inference_steps"]) for row in rows]
    assert names == [(step, name, k) for step in (4, 8) for name in ("raw", "ema") for k in (1, 2)]
    assert all(row["frechet_distance"] > 0 and 0 <= row["class_accuracy"] <= 1 for row in rows)
    best = json.loads((tmp_path / "a" / "best_checkpoint.json").read_text())
    two_steps = [row for row in rows if row["num_inference_steps"] == 2]
    assert best["frechet_distance"] == min(row["frechet_distance"] for row in two_steps)
    assert (tmp_path / "a" / best["checkpoint"]).is_dir() and best["metric"] == "frechet_distance"
    logged = scalars(tmp_path / "a", "eval/ema_2_steps/kernel_distance")
    assert logged[8] == pytest.approx(rows[-1]["kernel_distance"], rel=1e-5)
    # It changes nothing of the training, and a resumed run has no row twice.
    train(flags(tmp_path / "b"))
    assert digests(tmp_path / "a" / "checkpoint-8") == digests(tmp_path / "b" / "checkpoint-8")
    (tmp_path / "a" / "checkpoint-8" / "COMPLETE").unlink()
    train(flags(tmp_path / "a", **options, eval_class_accuracy=True, resume_from_checkpoint="latest"))
    assert [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()] == rows


def test_the_distance_to_the_data_themselves_is_nearly_nothing(tmp_path, classifier, data_set, monkeypatch):
    """Samples that are the reference images: distance 0, whatever is measured in between."""
    from common.ct import evaluation
    from common.results.metrics import load_feature_network

    from accelerate import Accelerator

    shards, source = open_images(None, data_set, image_column="img", label_column="label")

    def decode(raw, rng):
        return decode_image_label(raw, rng, resolution=8, num_classes=10)

    data = TrainingData(shards, decode, batch_size=1, seed=0, num_lanes=1, source=source, required=(IMAGE_KEYS,))
    images, labels = evaluation.read_reference(data, 10**6)
    assert len(images) == NUM_IMAGES == len(labels)
    position = iter(range(0, NUM_IMAGES, 16))

    def sample(unet, scheduler, classes, *args):
        start = next(position)
        assert classes == labels[start : start + 16]
        return images[start : start + 16]

    monkeypatch.setattr(evaluation, "sample", sample)
    network = load_feature_network(classifier)
    evaluate = evaluation.Evaluation(Accelerator(cpu=True), network, (images, labels), NUM_IMAGES, 16, 0)
    row = evaluate({"raw": None}, None, {1: [0]})[0]
    assert row["frechet_distance"] < 1e-3 and abs(row["kernel_distance"]) < 0.1


# --- several processes


# --- the demo


def test_the_demo_measures_what_it_was_told_to_train(tmp_path, classifier, monkeypatch):
    """The three runs of the demo, short; the reference is sampled with Heun, the others through the stock pipeline."""
    shutil.copytree(classifier, tmp_path / "classifier")
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 3, "format": demo.FORMAT}))
    short = {"max_train_steps": 8, "train_batch_size": 4, "checkpointing_steps": 8, "validation_steps": 0}
    monkeypatch.setattr(ct_demo, "FLAGS", ct_demo.FLAGS | short)
    changed = {"ict": {}, "ect": {"pretrain_steps": 4}, "diffusion": {"pretrain_steps": 8}}
    monkeypatch.setattr(ct_demo, "RUNS", {name: ct_demo.RUNS[name] | changed[name] for name in ct_demo.RUNS})
    monkeypatch.setattr(measuring, "SET_SIZE", 20)

    def in_process(command, **kwargs):
        train(command[command.index(str(measuring.ROOT / ct_demo.SCRIPT)) + 1 :])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ct_demo.subprocess, "run", in_process)
    demo.main(demo.parse_args([f"--output_dir={tmp_path}", "--method=ct", "--seed=3"]))
    report = (tmp_path / "ct_report.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ") and "model" not in line]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| ict", "1"], ["| ict", "2"], ["| ect", "1"], ["| ect", "2"], ["| diffusion", "18"],
    ]  # fmt: skip
    assert (tmp_path / "ct_report.png").is_file() and "CC BY 4.0" in report
    monkeypatch.setattr(ct_demo, "train", None)  # a second demo reuses all
    demo.main(demo.parse_args([f"--output_dir={tmp_path}", "--method=ct", "--seed=3"]))
    demo.open_output_dir(tmp_path, 4, rebuild=True)
    assert not list(tmp_path.glob("ct_ict")) and not list(tmp_path.glob("ct_digits"))


def test_the_demos_digits_are_those_that_the_classifier_knows(tmp_path):
    ct_demo.write_digits(tmp_path)
    shards, source = open_images(None, train_data_dir=tmp_path, label_column="label")
    (large, labels), _ = digits.load_split()
    assert source.num_classes == 10 and len(source.keys) == len(labels)
    images, small_labels = digits.load_small()
    floats = np.repeat(images[..., None], 3, axis=-1) / 255
    assert np.array_equal(ct_demo.enlarge(floats), large) and np.array_equal(small_labels, labels)
    row = source.read(0)
    assert np.asarray(Image.open(io.BytesIO(row["png"]))).shape == (8, 8) and row["cls"] == b"0"

"""The flags of consistency training: the guide's, the public script's, and mistakes."""

import shlex

import train_cm_ct_unconditional as ct
from common.ct import flags as ct_flags
from common.ct import unet as ct_unet
from tests.cases import one_sentence
from tests.scripts.test_flags import gpu  # noqa: F401

import pytest
import torch
from diffusers import UNet2DModel

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


def test_the_guides_command_parses_verbatim(gpu):  # noqa: F811
    words = shlex.split(GUIDE_CT.rstrip().removesuffix("\\").replace("\\\n", "")) + ["\\"]  # no line follows the last
    args = ct.parse_args(words[3:])
    assert args.optimizer_type == "adamw" and args.max_train_samples == 10_000 and args.num_classes == 10
    assert args.mid_sigma == 0.821 and args.huber_c == pytest.approx(0.00054 * (3 * 32 * 32) ** 0.5)


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

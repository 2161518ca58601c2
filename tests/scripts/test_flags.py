"""Flags: the guides' commands as they stand, every public flag, and mistakes that end in one sentence."""

import argparse
import datetime
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

from common import errors
from common import flags as flags_module
from common.ct import card as ct_card
from common.ct import flags as ct_flags
from common.data.shards import expand_shards
from common.direct import flags as direct_flags
from common.flags import command_line, public_args, resolve_teacher_defaults
from common.run import engine, screen, training_data, training_run
from common.score import flags as score_flags
from common.tscd import flags as tscd_flags
from tests.cases import SD_SCRIPTS, one_sentence

import pytest
import torch
from safetensors import SafetensorError

SCRIPTS = [script.__name__ for script in SD_SCRIPTS.values()]
ALL_SCRIPTS = [*SCRIPTS, "train_direct_distill", "train_cm_ct_unconditional"]

ROOT = Path(flags_module.__file__).parents[1]

# The guide's command, verbatim.
GUIDE_LCM = """
accelerate launch train_lcm_distill_sd_wds.py \\
    --pretrained_teacher_model=$MODEL_DIR \\
    --output_dir=$OUTPUT_DIR \\
    --mixed_precision=fp16 \\
    --resolution=512 \\
    --learning_rate=1e-6 --loss_type="huber" --ema_decay=0.95 --adam_weight_decay=0.0 \\
    --max_train_steps=1000 \\
    --max_train_samples=4000000 \\
    --dataloader_num_workers=8 \\
    --train_shards_path_or_url="pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/{00000..01099}.tar?download=true" \\
    --validation_steps=200 \\
    --checkpointing_steps=200 --checkpoints_total_limit=10 \\
    --train_batch_size=12 \\
    --gradient_checkpointing --enable_xformers_memory_efficient_attention \\
    --gradient_accumulation_steps=1 \\
    --use_8bit_adam \\
    --resume_from_checkpoint=latest \\
    --report_to=wandb \\
    --seed=453645634 \\
    --push_to_hub \\
"""  # noqa: E501

# The guide's command for the LoRA script: its name, a rank, the learning rate of adapters, no EMA.
GUIDE_LCM_LORA = (
    GUIDE_LCM.replace("train_lcm_distill_sd_wds.py", "train_lcm_distill_lora_sd_wds.py")
    .replace(" --ema_decay=0.95", "")
    .replace("--resolution=512", "--resolution=512 --lora_rank=64")
    .replace("--learning_rate=1e-6", "--learning_rate=1e-4")
)

# The guide's two commands of TSCD, verbatim.
GUIDE_TSCD = (
    GUIDE_LCM.replace("train_lcm_distill_sd_wds.py", "train_tscd_distill_sd_wds.py")
    .replace("MODEL_DIR", "MODEL_NAME")
    .replace('"huber"', '"l2"')
    .replace("max_train_steps=1000", "max_train_steps=100000")
    .replace("wandb", "tensorboard")
    .replace("    --push_to_hub \\\n", "")
)
GUIDE_TSCD_LORA = (
    GUIDE_TSCD.replace(
        "accelerate launch train_tscd_distill", "CUDA_VISIBLE_DEVICES=5 accelerate launch train_tscd_distill_lora"
    )
    .replace("--resolution=512 \\\n", "--resolution=512 \\\n    --lora_rank=64 \\\n")
    .replace(" --ema_decay=0.95", "")
    .replace("max_train_steps=100000", "max_train_steps=10000")
)
GUIDES = dict(zip(SCRIPTS, (GUIDE_LCM, GUIDE_LCM_LORA, GUIDE_TSCD, GUIDE_TSCD_LORA), strict=True))

# The guide of direct distillation has no command for this script; its data, with the flags of its text.
GUIDE_DIRECT = """
accelerate launch train_direct_distill.py \\
    --pretrained_teacher_model=Qwen/Qwen-Image \\
    --dataset_base_path=./data/example_image_dataset \\
    --dataset_metadata_path=./data/example_image_dataset/metadata_distill_qwen.csv \\
    --max_pixels=1048576 --train_batch_size=1 \\
    --lora_rank=64 \\
"""

# name: default, as the public script has them (None: no default).
PUBLIC_FLAGS = {
    "pretrained_vae_model_name_or_path": None, "teacher_revision": None, "revision": None, "cache_dir": None,
    "output_dir": "lcm-xl-distilled", "seed": None, "logging_dir": "logs", "report_to": ["tensorboard"],
    "checkpointing_steps": 500, "checkpoints_total_limit": None, "resume_from_checkpoint": None, "resolution": 512,
    "interpolation_type": "bilinear", "center_crop": False, "random_flip": False, "dataloader_num_workers": 0,
    "train_batch_size": 16, "num_train_epochs": 100, "max_train_steps": None, "max_train_samples": None,
    "learning_rate": 1e-4, "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500,
    "gradient_accumulation_steps": 1, "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "proportion_empty_prompts": 0, "w_min": 5.0,
    "w_max": 15.0, "num_ddim_timesteps": 50, "loss_type": "l2", "huber_c": 0.001, "unet_time_cond_proj_dim": 256,
    "vae_encode_batch_size": 32, "timestep_scaling_factor": 10.0, "ema_decay": 0.95, "mixed_precision": None,
    "allow_tf32": False, "enable_xformers_memory_efficient_attention": False, "gradient_checkpointing": "none",
    "local_rank": -1, "validation_steps": 200, "push_to_hub": False, "hub_token": None, "hub_model_id": None,
    "tracker_project_name": "text2image-fine-tune",
}  # fmt: skip
REQUIRED = ["--pretrained_teacher_model=t", "--train_shards_path_or_url=s.tar"]
REQUIRED_BY = {  # others: REQUIRED
    "train_direct_distill": ["--pretrained_teacher_model=t", "--pairs_dir=p"],
    "train_cm_ct_unconditional": ["--dataset_name=d"],
}


def script(name):
    return importlib.import_module(name)


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU, every tracker, and a login."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flags_module, "get_available_trackers", lambda: ["tensorboard", "wandb", "comet_ml"])
    monkeypatch.setattr(flags_module, "get_token", lambda: "hf_x")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guides_command_parses_verbatim(gpu, name):
    words = shlex.split(GUIDES[name].rstrip().removesuffix("\\").replace("\\\n", "")) + ["\\"]  # no line follows
    args = script(name).parse_args(words[words.index(f"{name}.py") + 1 :])
    assert args.max_train_samples == 4_000_000 and args.seed == 453645634 and args.mixed_precision == "fp16"
    assert args.train_shards_path_or_url.endswith("{00000..01099}.tar?download=true")
    tscd = "tscd" in name
    assert (args.report_to, args.loss_type) == (["tensorboard"], "l2") if tscd else (["wandb"], "huber")
    assert args.push_to_hub != tscd and args.max_train_steps == (
        1000 if not tscd else 10_000 if "lora" in name else 100_000
    )


def test_the_guide_of_direct_distillation_parses():
    words = shlex.split(GUIDE_DIRECT.rstrip().removesuffix("\\").replace("\\\n", "")) + ["\\"]
    args = script("train_direct_distill").parse_args(words[3:])
    assert args.lora_rank == 64 and args.lora_alpha == 64 and args.learning_rate == 1e-4 and args.pairs_dir is None
    full = script("train_direct_distill").parse_args(REQUIRED_BY["train_direct_distill"] + ["--lora_rank=0"])
    assert full.learning_rate == 1e-5 and full.train_batch_size * full.gradient_accumulation_steps == 32


def teacher_config(is_sdxl=False):
    unet, vae = {"sample_size": 128 if is_sdxl else 64}, {"block_out_channels": [128, 256, 512, 512]}
    return {"is_sdxl": is_sdxl, "unet": unet, "vae": vae}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_public_flag_is_there_with_its_default(name):
    args = script(name).parse_args(REQUIRED)
    getattr(script(name), "resolve_defaults", resolve_teacher_defaults)(args, teacher_config())
    args, expected = vars(args), dict(PUBLIC_FLAGS)
    if "lora" in name:
        for flag in ("ema_decay", "unet_time_cond_proj_dim"):
            del expected[flag]
        expected |= {"lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_modules": None}
        expected |= {"w_min": 7.5, "w_max": 7.5}  # an exception: the student cannot see w
    if "tscd" in name:
        del expected["timestep_scaling_factor"]
        expected |= {"output_dir": args["output_dir"], "w_min": 4.0, "w_max": 5.0, "num_ddim_timesteps": 40}
        expected |= {"unet_time_cond_proj_dim": None} if "lora" not in name else {}
    assert {flag: args[flag] for flag in expected} == expected
    assert args["cast_teacher_unet"] is True  # an exception: the teacher computes in the run's dtype


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_help_runs_and_every_flag_is_read_somewhere(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).parse_args(["--help"])
    assert stopped.value.code == 0
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)) - {"local_rank"}
    modules = [script(name), flags_module, engine, training_run, training_data]
    if name == "train_cm_ct_unconditional":
        flags, modules = flags - {"prediction_type"}, [*modules, ct_flags, ct_card]
    elif "tscd" in name:
        modules += [tscd_flags, score_flags]
    elif "direct" in name:
        modules += [direct_flags, score_flags]
    source = "".join(open(module.__file__).read() for module in modules)
    dead = [flag for flag in flags if not re.search(rf"args\.{flag}\b|\"{flag}\"[,)\]]", source)]
    assert len(flags) > 55 and not dead


MISTAKES = [
    (["--unknown_flag=1"], "unrecognized arguments: --unknown_flag=1"),
    (["--train_batch_siz=4"], "unrecognized arguments: --train_batch_siz=4"),
    (["--train_batch_size=0"], "--train_batch_size: must be at least 1, not 0"),
    (["--gradient_accumulation_steps=-1"], "--gradient_accumulation_steps: must be at least 1"),
    (["--max_train_steps=0"], "--max_train_steps: must be at least 1"),
    (["--max_train_steps=many"], "--max_train_steps: invalid positive whole number value: 'many'"),
    (["--resolution=0"], "--resolution: must be at least 1"),
    (["--dataloader_num_workers=-1"], "--dataloader_num_workers: must not be negative"),
    (["--learning_rate=nan"], "--learning_rate: must be a number that is not negative"),
    (["--adam_beta1=1.5"], "--adam_beta1: must be at least 0 and less than 1"),
    (["--proportion_empty_prompts=2"], "--proportion_empty_prompts: must be between 0 and 1"),
    (["--adam_beta2=1"], "--adam_beta2: must be at least 0 and less than 1"),
    ([f"--seed={2**64}"], "--seed: must be a whole number from 0 to 2^62"),
    (["--validation_num_inference_steps="], "--validation_num_inference_steps: names no number"),
    (["--num_ddim_timesteps=2", "--validation_num_inference_steps=4"], "_steps: at most --num_ddim_timesteps=2 steps"),
    (["--ema_decay=1"], "--ema_decay: must be at least 0 and less than 1, not 1.0"),  # an average that never moves
    (["--lora_dropout=1"], "--lora_dropout: must be at least 0 and less than 1, not 1.0"),
    (["--report_to=tensorboard,none"], "--report_to=none: no such tracker; use tensorboard, wandb"),
    (["--huber_c=0"], "--huber_c: must be a positive number"),
    (["--lr_scheduler=magic"], "--lr_scheduler: invalid choice: 'magic'"),
    (["--mixed_precision=fp16"], "--mixed_precision=fp16 needs a GPU"),
    (["--report_to=nothing"], "--report_to=nothing: no such tracker"),
    (["--report_to=wandb"], "--report_to=wandb: wandb is not installed"),
    (["--push_to_hub"], "--push_to_hub: not logged in to the hub"),
    (["--validation_prompts=@missing.txt"], "--validation_prompts=@missing.txt cannot be read"),
    (["--validation_num_inference_steps=0"], "--validation_num_inference_steps: must be at least 1"),
    (["--lr_warmup_steps=5", "--lr_scheduler=constant"], "--lr_warmup_steps: constant has no warm-up"),
    (["--cache_dir="], "--cache_dir is empty (a variable that is not set?); give it a value, or drop it"),
    (["--huber_c=0.1", "--loss_type=l2"], "--huber_c: --loss_type=l2 has none; pass --loss_type=huber"),
    (["--hub_token", "hf_x", "--hub_private_repo"], "--hub_token, --hub_private_repo: nothing is uploaded; add"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_mistakes_end_in_one_sentence_and_exit_code_2(name, flags, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(flags_module, "get_token", lambda: None)
    required = REQUIRED_BY.get(name, REQUIRED)
    if flags == ["--huber_c=0"] and name == "train_cm_ct_unconditional":
        assert script(name).parse_args(required + flags).huber_c == 0  # a value there
        return
    if any(flag[2:].split("=")[0] not in vars(script(name).parse_args(required)) for flag in flags if "--" in flag):
        sentence = "unrecognized arguments"
    assert sentence in one_sentence(capsys, script(name).parse_args, required + flags, alone=True)


@pytest.mark.parametrize("name", SCRIPTS[2:])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--stage_steps=1,2"], "--stage_steps=1,2 has 2 numbers for 4 stages; give one, or 4"),
        (["--stage_segments=4,1", "--adv_weights=1,2,3"], "--adv_weights=1,2,3 has 3 numbers for 2 stages"),
        (["--mse_weights=1,0.5,1,-1"], "--mse_weights: must be a number that is not negative"),
        (["--mse_weights=a"], "--mse_weights: invalid list of numbers value: 'a'"),
        (["--stage_segments=8,0"], "--stage_segments: must be at least 1"),
        (["--stage_steps="], "--stage_steps: names no number"),
        (["--w_min=6"], "--w_min=6.0 is larger than --w_max=5.0; swap them"),
        (["--boundary_prob=2"], "--boundary_prob: must be between 0 and 1"),
        (["--freeze_discriminator_backbone", "--adv_learning_rate=1"], "--adv_learning_rate: --freeze_discriminator"),
        (["--adv_real=data", "--adv_unconditional_start=1"], "--adv_unconditional_start: only with --adv_real=target"),
        (["--adv_real=noise"], "--adv_real: invalid choice: 'noise'"),
        (["--stage_segments=4,1", "--score_weights=1,2,3"], "--score_weights=1,2,3 has 3 numbers for 2 stages"),
        (["--fake_updates=3"], "--fake_updates: without --score_weights there is no score; add them, or drop this"),
        (["--score_weights=0", "--score_levels=2"], "--score_levels: without --score_weights there is no score"),
        (["--score_weights=1", "--score_min_time=0.9", "--score_max_time=0.1"], "--score_min_time=0.9 must be below"),
    ],
)
def test_mistakes_about_stages(name, flags, sentence, capsys):
    assert sentence in one_sentence(capsys, script(name).parse_args, REQUIRED + flags, alone=True)


def test_steps_of_stages_decide_the_length_of_a_run():
    name = "train_tscd_distill_sd_wds"
    assert script(name).parse_args(REQUIRED + ["--stage_steps=1,2,3,4"]).max_train_steps == 10
    assert script(name).parse_args(REQUIRED + ["--stage_steps=5"]).max_train_steps == 20
    assert script(name).parse_args(REQUIRED).max_train_steps is None


def test_only_one_process_of_a_node_prints_the_sentence_and_all_tell_the_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        script(SCRIPTS[0]).parse_args(REQUIRED + ["--train_batch_size=0"])
    assert capsys.readouterr().err == ""
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "--train_batch_size: must be at least 1, not 0" in told


def test_an_interrupt_ends_in_one_sentence(capsys):
    @training_run.user_errors
    def main(args):
        raise KeyboardInterrupt

    args = script(SCRIPTS[0]).parse_args(REQUIRED)
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 130 and "--resume_from_checkpoint=latest" in capsys.readouterr().err


def test_a_full_disk_ends_in_one_sentence_and_other_errors_as_they_are(capsys):
    for error, number in [
        (OSError(28, "No space left on device", "/out/README.md"), 2),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), 2),
        (OSError(5, "Input/output error"), None),
    ]:

        @training_run.user_errors
        def main(args, error=error):
            raise error

        with pytest.raises(SystemExit if number else OSError) as stopped:
            main(argparse.Namespace(resume_from_checkpoint=None))
        assert not number or stopped.value.code == number
        err = capsys.readouterr().err
        assert err.count("\n") == bool(number) and ("make room and resume with" in err) == bool(number)


@pytest.mark.parametrize(
    ("num_images", "max_train_samples", "world_size", "lanes"),
    [(None, None, 1, 8), (None, None, 2, 16), (1000, None, 1, 8), (40, None, 1, 3), (3, None, 1, 1), (1000, 30, 2, 2)],
)
def test_default_lanes_hold_at_least_a_batch(num_images, max_train_samples, world_size, lanes):
    args = argparse.Namespace(seed=1, data_seed=None, data_lanes=None, train_batch_size=12)
    args.max_train_samples = max_train_samples
    training_data.resolve_data(args, {}, world_size, num_images)
    assert args.data_lanes == lanes and args.data_seed == 1
    again = argparse.Namespace(**vars(args) | {"data_lanes": None, "data_seed": None})
    training_data.resolve_data(again, {"data_seed": 1, "data_lanes": 5}, world_size, num_images)
    assert again.data_lanes == 5


def test_8bit_adam_without_bitsandbytes(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    without = lambda name: None if name == "bitsandbytes" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(flags_module.importlib.util, "find_spec", without)
    words = REQUIRED + ["--use_8bit_adam"]
    assert "bitsandbytes is not installed" in one_sentence(capsys, script(SCRIPTS[0]).parse_args, words)


def test_prompts_are_repeatable_and_read_from_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\ntwo\n")
    args = script(SCRIPTS[0]).parse_args(REQUIRED + ["--validation_prompts=zero", f"--validation_prompts=@{file}"])
    assert args.validation_prompts == ["zero", "one", "two"]


@pytest.mark.parametrize(("flags", "scale"), [([], 8), (["--w_min=0", "--w_max=2"], 2), (["--w_min=9"], 13)])
def test_default_guidance_of_samples_lies_in_the_trained_range(flags, scale):
    args = script(SCRIPTS[0]).parse_args(REQUIRED + flags)
    script(SCRIPTS[0]).resolve_defaults(args, teacher_config())
    assert args.validation_guidance_scale == scale


def test_defaults_for_sdxl_are_its_own():
    args = script(SCRIPTS[0]).parse_args(REQUIRED + ["--use_fix_crop_and_size"])
    script(SCRIPTS[0]).resolve_defaults(args, teacher_config(is_sdxl=True))
    assert (args.resolution, args.vae_encode_batch_size, args.w_min, args.w_max) == (1024, 2, 3.0, 15.0)
    with pytest.raises(errors.UserError, match="--use_fix_crop_and_size is for SDXL"):
        script(SCRIPTS[0]).resolve_defaults(args, teacher_config())


def test_steps_follow_from_epochs(shards):
    args = argparse.Namespace(train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=None)
    vars(args).update(num_train_epochs=3, data_seed=1, dry_run=False, max_train_samples=None)
    files = expand_shards(shards)

    def resolve_epochs(args, shards, world_size, resumed):
        num_samples = training_data.epoch_size(args, shards, None)
        return training_data.resolve_steps(args, num_samples, world_size, resumed), num_samples

    assert resolve_epochs(args, files, 2, {"args": {}}) == (16, 1437) and args.max_train_steps == 270
    assert resolve_epochs(args, files, 2, {"args": {}}) == (16, None)  # not counted without need
    args.max_train_steps, args.max_train_samples = None, 100
    assert resolve_epochs(args, files, 2, {"args": {}}) == (16, 100) and args.max_train_steps == 21
    args.max_train_steps = None
    assert resolve_epochs(args, ["pipe:cat x"], 2, {"args": {}}) == (16, 100)
    args.max_train_steps, args.max_train_samples = None, None
    with pytest.raises(errors.UserError, match="`max_train_steps` is needed"):
        resolve_epochs(args, ["pipe:cat x"], 2, {"args": {}})


@pytest.mark.parametrize(("more", "rate"), [([], 0.001), (["--scale_lr"], 0.008), (["--use_8bit_adam"], 0.001)])
def test_flags_of_the_optimizer_reach_it(more, rate):
    args = script(SCRIPTS[0]).parse_args(REQUIRED + ["--learning_rate=0.001", "--adam_beta1=0.8", *more])
    optimizer = engine.make_optimizer(args, [torch.nn.Parameter(torch.ones(3))], total_batch_size=8)
    assert optimizer.param_groups[0]["lr"] == rate and optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    assert type(optimizer).__name__ == ("AdamW8bit" if "--use_8bit_adam" in more else "AdamW")


def test_secrets_leave_no_trace(monkeypatch):
    words = [*REQUIRED, "--push_to_hub", "--hub_token=hf_1", "--hub_token", "hf_2", "--hub_model_id=a b", "--seed=1"]
    monkeypatch.setattr(sys, "argv", ["/x/t.py", *words])
    args = script(SCRIPTS[0]).parse_args()
    assert args.hub_token == "hf_2" and "hf_" not in str(public_args(args))
    # wandb and comet record sys.argv by themselves.
    assert "hf_" not in str(sys.argv) and sys.argv[-1] == "--seed=1"
    line = command_line()
    assert line.startswith("accelerate launch t.py --pretrained_teacher_model=t")
    assert line.endswith("'--hub_token=***' --hub_token '***' '--hub_model_id=a b' --seed=1")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("pipe:curl -H 'Authorization: Bearer S3CRET' -s https://h/{0..3}.tar", "Bearer ***' -s https://h/{0..3}.tar"),
        ("https://me:S3CRET@h/{0..3}.tar", "https://***@h/{0..3}.tar"),
        ("https://h/0.tar?X-Amz-Signature=S3CRET&a=b", "?X-Amz-Signature=***&a=b"),
        ("https://h/0.tar?download=true", "https://h/0.tar?download=true"),
    ],
)
def test_credentials_in_addresses_leave_no_trace(text, masked, monkeypatch):
    flags = ["--pretrained_teacher_model=t", f"--train_shards_path_or_url={text}"]
    monkeypatch.setattr(sys, "argv", ["t.py", *flags])
    args = script(SCRIPTS[0]).parse_args()
    assert args.train_shards_path_or_url == text
    recorded = [str(public_args(args)["train_shards_path_or_url"]), command_line(), " ".join(sys.argv)]
    assert all("S3CRET" not in words for words in recorded) and masked in recorded[0]


@pytest.mark.parametrize(
    ("scheduler", "warmup", "updates", "sentence"),
    [
        ("cosine", None, 400, "--lr_warmup_steps=500 is 125% of the run's 400 updates.*never reaches.*80% of it"),
        ("linear", None, 1000, "--lr_warmup_steps=500 is 50% of .* 1000 .*such as --lr_warmup_steps=100$"),
        ("constant_with_warmup", 30, 30, "--lr_warmup_steps=30 is 100% .*never reaches"),
        ("cosine", None, 1001, None),
        ("cosine", 0, 10, None),
        ("constant", None, 10, None),
    ],
)
def test_a_warmup_of_half_the_run_is_said(scheduler, warmup, updates, sentence):
    words = [*REQUIRED, f"--lr_scheduler={scheduler}", f"--max_train_steps={updates}", "--dry_run"]
    args = script(SCRIPTS[0]).parse_args([*words, *([] if warmup is None else [f"--lr_warmup_steps={warmup}"])])
    warning = screen.warmup_warning(args)
    assert re.match(f"WARNING: {sentence}", warning) if sentence else warning is None
    assert args.lr_warmup_steps == (500 if warmup is None else warmup)


@pytest.mark.parametrize(
    ("rate", "precision", "rank", "sentence"),
    [
        ("1e-6", "bf16", 64, "--learning_rate=1e-06 moves the outputs of a LoRA of rank 64 by about 8e-06 .* 4e-03"),
        ("1e-6", "fp16", 64, None),
        ("1e-7", "fp16", 64, "--learning_rate=1e-07 .* fp16 rounds them to 5e-04.*or --mixed_precision=no$"),
        ("1e-4", "bf16", 64, None),
        ("1e-6", "no", 64, None),
        ("0", "bf16", 64, None),
        ("1e-6", "bf16", 0, None),  # all weights
    ],
)
def test_an_update_that_half_precision_does_not_resolve_is_said(monkeypatch, rate, precision, rank, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name = SCRIPTS[1] if rank else SCRIPTS[0]
    words = [*REQUIRED, f"--learning_rate={rate}", f"--mixed_precision={precision}"]
    warning = screen.resolution_warning(script(name).parse_args([*words, *[f"--lora_rank={rank}"] * bool(rank)]))
    assert re.match(f"WARNING: {sentence}", warning) if sentence else warning is None


def test_processes_wait_for_hours(tmp_path):
    args = script(SCRIPTS[0]).parse_args([*REQUIRED, f"--output_dir={tmp_path}"])
    assert engine.make_accelerator(args).init_handler.timeout == datetime.timedelta(hours=3)


@pytest.mark.parametrize(
    ("given", "saved", "resolved"),
    [
        (None, {}, "data"),
        ("target", {}, "target"),
        (None, {"seed": 1}, None),  # a run of before the flag, whose real was the target
        ("target", {"seed": 1}, None),
        ("data", {"seed": 1}, "data"),  # refused where flags are compared
        (None, {"seed": 1, "adv_real": "target"}, "target"),
        (None, {"seed": 1, "adv_real": "data"}, "data"),
    ],
)
def test_what_is_real_stays_what_it_was(given, saved, resolved):
    args = argparse.Namespace(adv_real=given)
    tscd_flags.resolve_real(args, {"args": saved})
    assert args.adv_real == resolved
    args = argparse.Namespace(adv_real=given, lora_rank=4)
    tscd_flags.resolve_real(args, {"args": saved})
    assert args.adv_real == ("target" if not given and not saved else resolved)

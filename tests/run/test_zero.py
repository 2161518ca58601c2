"""What is asked of DeepSpeed, and what cannot be had with it; the runs are in tests/soak/test_deepspeed.py."""

import importlib.util
import json
import os

import train_direct_distill as direct
import train_lcm_distill_lora_sd_wds as lcm_lora
import train_lcm_distill_sd_wds as lcm
from common.errors import UserError
from common.run import engine, zero
from tests.cases import ROOT

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType

ASKED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "RANK": "0"}
PLAIN = "use `distributed_type: MULTI_GPU`"


@pytest.fixture
def asked(tmp_path, flags, monkeypatch):
    """take_settings with the environment of a launcher, as if deepspeed were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "deepspeed" else find(name))

    def take(script=lcm, environment=(), **changes):
        for name, value in (ASKED | dict(environment)).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return zero.take_settings(script.parse_args(flags(tmp_path / "out", script, **changes)))

    return take


def test_without_deepspeeds_variable_there_is_no_zero(tmp_path, flags, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert zero.take_settings(lcm.parse_args(flags(tmp_path / "out"))) is None


def test_what_the_launcher_asks_for_is_taken_out_of_accelerates_sight(asked):
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    settings = asked(environment=environment, gradient_accumulation_steps=4)
    assert settings == {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    assert not {"ACCELERATE_USE_DEEPSPEED", *environment} & os.environ.keys()  # "1" would undo the flag's 4


def test_a_configuration_file_gives_its_zero_block(asked, tmp_path):
    block = {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1000,
        "offload_param": {"device": "none", "pin_memory": True},
    }
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": block, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}))
    settings = asked(environment={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    expected = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": 50_000_000}
    assert settings == expected


@pytest.mark.parametrize(
    ("environment", "changes", "words"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage is 3; .* set it to 2, or " + PLAIN),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer is not supported; set its"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "offload_param is not supported; set its device"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping is 0.5 and `max_grad_norm`=1.0; drop it"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "much"}, {}, "gradient_clipping is much and `max_grad_norm`=1.0; drop it"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, {}, "`gradient_accumulation_steps`=1; drop it from"),
        (
            {},
            {"use_8bit_adam": True},
            "`use_8bit_adam` works on each weight by itself, .*; drop the flag, or " + PLAIN,
        ),
        ({"RANK": None}, {}, "no launcher started this process; start it by `accelerate launch` with docs/ze"),
        ({}, {"channels_last": True}, "`channels_last` works on each weight by itself"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, {}, "deepspeed_config_file=/nowhere.json cannot be"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(asked, environment, changes, words):
    with pytest.raises(UserError, match=words):
        asked(environment=environment, **changes)


def test_fp16_is_refused(asked, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for environment, changes in (({}, {"mixed_precision": "fp16"}), ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {})):
        with pytest.raises(UserError, match="`mixed_precision`=fp16 is not supported with ZeRO-2; pass bf16 or no"):
            asked(environment=environment, **changes)


def test_a_lora_is_refused(asked, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="`lora_rank`=4: a LoRA has hardly any .*; " + PLAIN):
        asked(lcm_lora)
    words = ["--pretrained_teacher_model=x", "--pairs_dir=x", f"--output_dir={tmp_path}", "--lora_rank=8"]
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="`lora_rank`=8: a LoRA has hardly any"):
        zero.take_settings(direct.parse_args(words))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"round_robin_gradients": True}, "round_robin_gradients is not supported; drop it, there are stage, reduce_"),
        ({"cpu_offload": True}, "cpu_offload is not supported; drop it"),  # DeepSpeed's old name of offload_optimizer
        ({"reduce_bucket": 1000}, "reduce_bucket is not supported; drop it"),
        ({"reduce_bucket_size": "5e8"}, "reduce_bucket_size is '5e8'; give a number of values"),
        ({"allgather_bucket_size": 0.5}, "allgather_bucket_size is 0.5; give a number of values"),
        ({"overlap_comm": "yes"}, "overlap_comm is 'yes'; give true or false"),
    ],
)
def test_a_setting_that_breaks_a_run_is_refused_before_any_weight(asked, tmp_path, setting, words):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2} | setting}))
    with pytest.raises(UserError, match=words):
        asked(environment={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


@pytest.mark.parametrize("config", [{"optimizer": {"type": "Adam"}}, {"bf16": {"enabled": True}}])
def test_a_configuration_file_with_what_the_flags_decide_is_refused(asked, tmp_path, config):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | config))
    with pytest.raises(UserError, match=f"zero.json sets {next(iter(config))}, which the script's flags decide"):
        asked(environment={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


def test_a_missing_deepspeed_is_refused(tmp_path, flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(UserError, match="DeepSpeed is not installed; pip install deepspeed, or " + PLAIN):
        zero.take_settings(lcm.parse_args(flags(tmp_path / "out")))


def test_the_documented_configuration_is_one_of_accelerates():
    path = ROOT / "docs" / "zero2.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.distributed_type.value == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == 2
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "bf16"
    assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"  # not pdsh: job files start each node


def test_an_engine_that_would_split_the_student_is_refused(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="FSDP is not supported.* use DeepSpeed's ZeRO-2, or plain data parallel"):
        engine.make_accelerator(lcm.parse_args(flags(tmp_path)))

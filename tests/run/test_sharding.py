"""What is asked of FSDP2, what cannot be had with it, and what split weights are; more is in tests/soak."""

import os

import train_cm_ct_unconditional as ct
import train_direct_distill as direct
import train_lcm_distill_sd_wds as lcm
from common.errors import UserError
from common.results import samples
from common.run import engine, sharding
from tests.cases import ROOT, scalars, train, undo
from tests.fork_server import run_processes
from tests.networks.test_fusing import write_lora
from tests.run import split_weights

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
FSDP2 = f"""
import os
import diffusers
os.environ |= {ASKED}
def refuse(*args, **options):
    raise AssertionError("a network is read whole")
diffusers.UNet2DConditionModel.from_pretrained = diffusers.UNet2DModel.from_pretrained = refuse
"""


@pytest.fixture
def asked(tmp_path, flags, monkeypatch):
    """take_settings with the environment of a launcher of two processes."""

    def take(environment=(), **changes):
        for name, value in (ASKED | {"RANK": "0", "WORLD_SIZE": "2"} | dict(environment)).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        args = lcm.parse_args(flags(tmp_path / "out"))
        vars(args).update(changes)  # which a machine without a GPU refuses for other reasons
        return sharding.take_settings(args)

    return take


def test_what_the_launcher_asks_for_is_taken_out_of_accelerates_sight(asked):
    others = {
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    assert asked(others) == {"reshard_after_forward": True}
    assert not {*ASKED, *others} & os.environ.keys()
    assert asked({"FSDP_RESHARD_AFTER_FORWARD": "false"}) == {"reshard_after_forward": False}
    assert asked({"ACCELERATE_USE_FSDP": None}) is None
    assert asked({"WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "changes", "words"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version is 1; set it to 2, or use `distributed_type: MULTI_GPU`"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is not supported; set it to false, or use"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "set it to false and pass `gradient_checkpointing`"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {}, "_after_forward is FULL_SHARD; give true or false"),
        ({"RANK": None}, {}, "no launcher started this process; start it by `accelerate launch` with docs/fsdp2"),
        ({}, {"use_8bit_adam": True}, "`use_8bit_adam` does not know weights that are split"),
        ({}, {"channels_last": True}, "`channels_last` is no layout that FSDP2 splits; drop the flag"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(asked, environment, changes, words):
    with pytest.raises(UserError, match=words):
        asked(environment, **changes)


def test_packed_weights_are_refused(asked, monkeypatch, tmp_path):
    words = ["--pretrained_teacher_model=x", "--pairs_dir=x", f"--output_dir={tmp_path}", "--quantize_base=int8"]
    for name, value in (ASKED | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="`quantize_base` packs weights in a way that FSDP2 does not split"):
        sharding.take_settings(direct.parse_args(words))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_float32_target_from_weights_gathered_in_half_is_refused(ct_flags, tmp_path, monkeypatch, precision):
    for name, value in (ASKED | {"RANK": "0", "ACCELERATE_MIXED_PRECISION": precision}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"`cast_teacher`: FSDP2 gathers weights in {precision} alone; drop the flag"):
        sharding.take_settings(ct.parse_args([*ct_flags(tmp_path), "--no-cast_teacher", "--dry_run"]))


def test_the_documented_configuration_is_one_of_accelerates():
    path = ROOT / "docs" / "fsdp2.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.distributed_type.value == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "bf16"


def test_another_engine_is_refused(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match="DEEPSPEED is not supported; use FSDP2 .`distributed_type: FSDP`"):
        engine.make_accelerator(lcm.parse_args(flags(tmp_path)))


def test_processes_that_split_weights_do_jobs_of_one_kind_at_a_time():
    """Whose forwards wait for each other: as many jobs on each, left-over ones twice."""

    class Three:
        sharding, num_processes = {}, 3

    jobs, orders = ["a1", "a2", "a3", "a4", "b1"], []
    for Three.process_index in range(3):
        orders.append(samples._order(Three, jobs, kind=lambda job: job[0]))
    assert orders == [
        [(0, True), (3, True), (4, True)],
        [(1, True), (3, False), (4, False)],
        [(2, True), (3, False), (4, False)],
    ]


def test_split_weights_are_those_of_one_process(tmp_path, teacher):
    (tmp_path / "teacher").symlink_to(teacher())
    unet = UNet2DConditionModel.from_pretrained(teacher(), subfolder="unet")
    for seed, name in enumerate(("style", "other")):
        write_lora(tmp_path / name, unet, seed)
    split_weights.expected(tmp_path)
    split_weights.save_networks(tmp_path)
    prelude = f"from tests.run.split_weights import body\nbody({str(tmp_path)!r})\nraise SystemExit(0)"
    done = run_processes([], direct, 2, prelude)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_run_is_that_of_one_process_and_each_goes_on_from_the_other(tmp_path, flags):
    both = {"train_batch_size": 2, "data_lanes": 8}
    one, two = tmp_path / "one", tmp_path / "two"
    own = {"gradient_accumulation_steps": 2}
    done = run_processes(flags(two, **both), lcm, 2, FSDP2)
    assert done.returncode == 0, done.stderr[-4000:]
    train(flags(one, **both, **own))
    losses = scalars(one, "loss")
    assert scalars(two, "loss") == pytest.approx(losses, rel=1e-5) and len(losses) == 4

    def check():
        names = {path.relative_to(one) for path in one.rglob("*.safetensors")}
        assert names == {path.relative_to(two) for path in two.rglob("*.safetensors")} and len(names) > 6
        for name in names:
            a, b = load_file(one / name), load_file(two / name)
            assert max((a[key] - b[key]).abs().max().item() for key in a) < 5e-6
        for name in ("unet/config.json", "model_index.json", "unet_target/config.json"):
            assert (one / name).read_text() == (two / name).read_text()

    check()
    train(flags(two, **both, **own, **undo(two / "checkpoint-4")))
    done = run_processes(flags(one, **both, **undo(one / "checkpoint-4")), lcm, 2, FSDP2)
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr[-4000:]
    check()


def test_a_students_score_beside_split_weights_is_that_of_one_process(tmp_path, direct_flags):
    """Each process draws another step of the student's call, and an adversary's backward pass begins half-way in a
    network. A large eps, so that Adam magnifies no rounding."""
    own = {"train_batch_size": 2, "adam_epsilon": 1e-3, "score_weight": 1, "adv_weight": 0.2}
    own |= {"fake_lora_rank": 4, "fake_updates": 1, "fake_warmup": 1, "fake_learning_rate": 1e-3}
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_processes(direct_flags(two, "dit", **own), direct, 2, FSDP2)
    assert done.returncode == 0, done.stderr[-4000:]
    train(direct_flags(one, "dit", **own, gradient_accumulation_steps=2), direct)
    assert scalars(two, "loss") == pytest.approx(scalars(one, "loss"), rel=1e-5)
    for name in ("checkpoint-4/fake_score.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5

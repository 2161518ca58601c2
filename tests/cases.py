"""A quick run of each script, for the tests that walk over all of them, and all that a checkpoint of it holds."""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import train_cm_ct_unconditional as ct
import train_direct_distill as direct
from common.run import checkpointing
from tests.scripts.test_stable_diffusion import OWN_FLAGS, SCRIPTS, fingerprint

import accelerate
import torch


class Case(NamedTuple):
    """A script with the flags of a run of four updates; "{name}" in a flag is a path that the test has made."""

    script: ModuleType
    flags: dict


SHARED = {
    "resolution": 16, "train_batch_size": 4, "max_train_steps": 4, "seed": 1, "validation_steps": 0,
    "logging_steps": 1, "checkpointing_steps": 2,
}  # fmt: skip
SD = {
    "pretrained_teacher_model": "{teacher}", "train_shards_path_or_url": "{shards}", "shuffle_block_samples": 16,
    "validation_num_inference_steps": "1",
}  # fmt: skip
CT = {
    "dataset_name": "{data_set}", "dataset_image_column_name": "img", "class_conditional": True, "resolution": 8,
    "model_config_name_or_path": "{unet}", "discretization_s_1": 40, "use_ema": True, "ema_max_decay": 0.5,
    "shuffle_block_samples": 16, "learning_rate": 1e-3, "eval_batch_size": 5,
}  # fmt: skip
DIRECT = {
    "pretrained_teacher_model": "{direct_teacher}", "pairs_dir": "{pairs}", "num_held_out": 4, "ema_decay": 0.5,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "resolution": None,
}  # fmt: skip
CASES = {name: Case(script, SHARED | SD | OWN_FLAGS[script]) for name, script in SCRIPTS.items()} | {
    "ct": Case(ct, SHARED | CT),
    "ct ect": Case(ct, SHARED | CT | {"objective": "ect", "ect_stages": 3, "pretrain_steps": 1}),
    "direct": Case(direct, SHARED | DIRECT | {"lora_rank": 0}),
    "direct lora": Case(direct, SHARED | DIRECT | {"lora_rank": 4, "lora_dropout": 0.3}),
}


def command(case, made, folder, **changes):
    """The words of a run into `folder`; None drops a flag, True is a bare one. made: {name: path}."""
    values = {k: v.format_map(made) if isinstance(v, str) else v for k, v in case.flags.items()}
    values |= {"output_dir": folder} | changes
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items() if v is not None]


def contents(checkpoint):
    """{name: value} of everything in a checkpoint but what names the run: equal for runs that are equal.

    Left out: the states of Python's and numpy's generators, which each process seeds anew and no run draws from.
    """
    state = checkpointing.read_state(checkpoint)
    found = {name: value for name, value in state.items() if name not in ("args", "run_id")}
    optimizer = torch.load(Path(checkpoint, "optimizer.bin"), weights_only=True)
    found |= {"optimizer": fingerprint(optimizer["state"]), "groups": str(optimizer["param_groups"])}
    others = {checkpointing.STATE, checkpointing.COMPLETE, "optimizer.bin"}
    for path in sorted(Path(checkpoint).iterdir()):
        if path.name.startswith("random_states"):
            states = accelerate.utils.load(path)
            found[path.name] = fingerprint({"torch": states["torch_manual_seed"], "step": states["step"]})
        elif path.name not in others:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads(Path(checkpoint, checkpointing.COMPLETE).read_text())
    assert set(manifest["files"]) == {path.name for path in Path(checkpoint).iterdir()} - {checkpointing.COMPLETE}
    return found

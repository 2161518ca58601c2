"""What users bring that is wrong: each ends in one sentence and exit code 2, or is skipped and counted.

The table is walked with every script.

Flags that argparse alone can judge are in test_args.py; here are those that `main` meets.
"""

import contextlib
import functools
import io
import json
import pickle
import shutil
import socket
import tarfile
import time
from pathlib import Path

import train_lcm_distill_sd_wds as lcm
import train_tscd_distill_lora_sd_wds as tscd_lora
import train_tscd_distill_sd_wds as tscd
from common import checkpointing, models
from common.data import TrainingData
from common.images import decode_image_text
from common.shards import SKIP_CLASSES
from tests.test_data import encode, pickle_members, png_header, random_image, write_tar
from tests.test_models import edit_json
from tests.test_scripts import SCRIPTS, flags, train

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

__all__ = ["flags"]


class World:
    """What a row of the table may spoil: a copy of the teacher, shards, folders, the environment."""

    def __init__(self, tmp_path, teacher, flags, monkeypatch, script):
        self.tmp_path, self.teacher_dir, self.flags, self.env = tmp_path, teacher, flags, monkeypatch.setenv
        self.script, self.out = script, tmp_path / "out"

    def teacher(self):
        return Path(shutil.copytree(self.teacher_dir(), self.tmp_path / "teacher"))

    def spoiled_teacher(self, spoil):
        folder = self.teacher()
        spoil(folder)
        return {"pretrained_teacher_model": folder}

    def tar(self, contents):
        write_tar(self.tmp_path / "bad.tar", contents)
        return {"train_shards_path_or_url": self.tmp_path / "bad.tar", "data_lanes": 1}

    def file(self, name, content):
        path = self.tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def images(self, metadata=None, content=b"", captions=True):
        for i in range(8):
            self.file(f"images/{i}.png", encode(random_image(i, 20, 20)))
            if captions:
                self.file(f"images/{i}.txt", b"a caption")
        if metadata:
            self.file(f"images/{metadata}", content)
        return {"train_shards_path_or_url": self.tmp_path / "images"}

    def checkpoint(self, spoil=lambda folder: None, name="latest", **state):
        """A checkpoint as far as it is read before any weight is loaded."""
        with contextlib.redirect_stdout(io.StringIO()):
            train(self.flags(self.tmp_path / "plan", self.script, dry_run=True), self.script)
        folder = self.out / "checkpoint-2"
        folder.mkdir(parents=True)
        (self.out / checkpointing.CONFIG).write_text("{}")
        content = {"global_step": 2, "args": {}, "data": {}, "rng_digests": [1], "total_batch_size": 4} | state
        (folder / checkpointing.STATE).write_text(json.dumps(content))
        (folder / "model.safetensors").write_bytes(bytes(100))
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / checkpointing.COMPLETE).write_text(json.dumps({"files": sizes}))
        spoil(folder)
        return {"resume_from_checkpoint": name}


PAIR = [("a.png", b"no image"), ("a.txt", b"a caption")]
ROWS = {
    # --- flags that need the teacher or the data
    "resolution": (lambda w: {"resolution": 17}, "--resolution=17 is not a multiple of 8"),
    "grid": (lambda w: {"num_ddim_timesteps": 30}, "--num_ddim_timesteps=30 must divide 1000"),
    "range of w": (lambda w: {"w_min": 9, "w_max": 3}, "--w_min=9.0 is larger than --w_max=3.0; swap them"),
    "sdxl's flag": (lambda w: {"use_fix_crop_and_size": True}, "--use_fix_crop_and_size is for SDXL"),
    "too few samples": (
        lambda w: {"max_train_samples": 3, "data_lanes": 8},
        "--max_train_samples must be at least 8",
    ),
    "steps of unknown data": (
        lambda w: {"train_shards_path_or_url": "pipe:cat /nope.tar", "max_train_steps": None},
        "--max_train_steps is needed",
    ),
    # --- teacher folders
    "no such teacher": (lambda w: {"pretrained_teacher_model": "/nope"}, "--pretrained_teacher_model=/nope: neither"),
    "a hub name offline": (
        lambda w: {"pretrained_teacher_model": "some/model"},
        "--pretrained_teacher_model=some/mod",
    ),
    "an empty folder": (lambda w: {"pretrained_teacher_model": w.tmp_path}, "the folder has no model_index.json"),
    "index that is no json": (
        lambda w: w.spoiled_teacher(lambda f: (f / "model_index.json").write_text("{")),
        "--pretrained_teacher_model=",
    ),
    "index that is a list": (
        lambda w: w.spoiled_teacher(lambda f: (f / "model_index.json").write_text("[]")),
        "its model_index.json is no pipeline's",
    ),
    "configuration that is a list": (
        lambda w: w.spoiled_teacher(lambda f: (f / "unet/config.json").write_text("[]")),
        "--pretrained_teacher_model=",
    ),
    "configuration without its numbers": (
        lambda w: w.spoiled_teacher(lambda f: (f / "unet/config.json").write_text("{}")),
        "--pretrained_teacher_model=",
    ),
    "a scheduler that is a list": (
        lambda w: w.spoiled_teacher(lambda f: (f / "scheduler/scheduler_config.json").write_text("[]")),
        "--pretrained_teacher_model=",
    ),
    "another kind of model": (
        lambda w: w.spoiled_teacher(
            lambda f: edit_json(f / "model_index.json", unet=["diffusers", "SanaTransformer"])
        ),
        "not a text-to-image latent diffusion teacher, its unet is SanaTransformer",
    ),
    "inpainting": (
        lambda w: w.spoiled_teacher(lambda f: edit_json(f / "unet/config.json", in_channels=9)),
        "maps 9 to 4 channels",
    ),
    "no weights": (
        lambda w: w.spoiled_teacher(lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink()),
        "its folder unet/ has no weights",
    ),
    "truncated weights": (
        lambda w: w.spoiled_teacher(lambda f: truncate(f / "unet/diffusion_pytorch_model.safetensors")),
        "its file unet/diffusion_pytorch_model.safetensors is damaged",
    ),
    "weights that are pickles": (
        lambda w: w.spoiled_teacher(lambda f: as_pickle(f / "vae/diffusion_pytorch_model.safetensors", w)),
        "its folder vae/ has its weights only as diffusion_pytorch_model.bin",
    ),
    "an unknown prediction": (
        lambda w: w.spoiled_teacher(lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="x")),
        "prediction_type 'x' is none of",
    ),
    "a single file that is none": (
        lambda w: {"pretrained_teacher_model": w.file("model.safetensors", b"\xff" * 64)},
        "the file is damaged or no safetensors file",
    ),
    "a missing variant": (lambda w: {"variant": "fp16"}, "--variant"),
    "no such VAE": (
        lambda w: {"pretrained_vae_model_name_or_path": "/nope"},
        "--pretrained_vae_model_name_or_path=/n",
    ),
    # --- shards
    "no shard": (lambda w: {"train_shards_path_or_url": "/no/{0..3}.tar"}, "4 of 4 paths match no file"),
    "braces": (lambda w: {"train_shards_path_or_url": "/no/{0..3.tar"}, "the braces of"),
    "an empty file": (lambda w: {"train_shards_path_or_url": w.file("a.tar", b"")}, "no usable sample"),
    "no tar": (lambda w: {"train_shards_path_or_url": w.file("a.tar", b"text" * 999)}, "shard_read"),
    "a tar of nothing": (lambda w: w.tar([]), "found no usable sample"),
    "a tar without captions": (lambda w: w.tar([("a.png", encode(random_image(0)))]), "missing_caption"),
    "a tar without images": (lambda w: w.tar([("a.txt", b"caption")]), "decode"),
    "a tar of pickles": (lambda w: w.tar(pickle_members(w.tmp_path / "trap")), "found no usable sample"),
    "a tar of broken images": (lambda w: w.tar(PAIR), "found no usable sample"),
    "a pipe that fails": (lambda w: {"train_shards_path_or_url": "pipe:exit 3"}, "exit code 3"),
    "a server that is not there": (
        lambda w: {"train_shards_path_or_url": f"http://127.0.0.1:{free_port()}/a.tar"},
        "shard_open",
    ),
    "a scheme that nobody knows": (lambda w: {"train_shards_path_or_url": "gopher://a/b.tar"}, "gopher"),
    "fewer images than lanes": (
        lambda w: w.images() | {"data_lanes": 16},
        "holds 8 images and the data have 16 lanes",
    ),
    # --- captions and metadata of a folder
    "no captions": (lambda w: w.images(captions=False), "have no captions: add metadata.csv"),
    "a csv without its columns": (lambda w: w.images("metadata.csv", b"a,b\n1,2\n"), "has no column 'file_name'"),
    "a csv that is binary": (lambda w: w.images("metadata.csv", b"file_name,text\n\xff\xfe,x\n"), "cannot be read"),
    "a csv with short rows": (lambda w: w.images("metadata.csv", b"text,file_name\nx\n"), "cannot be read"),
    "lines that are no json": (lambda w: w.images("metadata.jsonl", b"{\n"), "metadata.jsonl' cannot be read"),
    "lines that are no objects": (lambda w: w.images("metadata.jsonl", b"[1]\n"), "metadata.jsonl' cannot be read"),
    "captions that are numbers": (
        lambda w: w.images("metadata.jsonl", b'{"file_name": "0.png", "text": 7}\n'),
        "metadata.jsonl' cannot be read",
    ),
    # --- checkpoints and the output folder
    "no checkpoint": (lambda w: {"resume_from_checkpoint": "checkpoint-7"}, "there is no such checkpoint"),
    "a checkpoint without its end": (
        lambda w: w.checkpoint(lambda f: (f / "COMPLETE").unlink(), "checkpoint-2"),
        "it has no COMPLETE file: the save did not finish",
    ),
    "a checkpoint with a truncated file": (
        lambda w: w.checkpoint(lambda f: truncate(f / "model.safetensors"), "checkpoint-2"),
        "its file model.safetensors has 50 bytes instead of 100",
    ),
    "a checkpoint without a file": (
        lambda w: w.checkpoint(lambda f: (f / "model.safetensors").unlink(), "checkpoint-2"),
        "its file model.safetensors is missing",
    ),
    "a checkpoint of something else": (
        lambda w: w.checkpoint(lambda f: (f / "COMPLETE").write_text("{}"), "checkpoint-2"),
        "its COMPLETE file cannot be read",
    ),
    "a checkpoint of another run": (lambda w: w.checkpoint(args={"seed": 9}), "--seed was 9 and is 1"),
    "a result in the way": (
        lambda w: w.file("out/README.md", b"mine") and {"resume_from_checkpoint": "latest"},
        "holds files but no complete checkpoint",
    ),
    "a folder in use": (lambda w: w.file("out/notes", b"mine") and {}, "is not empty"),
    "a file in the way": (lambda w: w.file("out", b"mine") and {}, "is a file; name a folder"),
    "a place that cannot be written": (lambda w: {"output_dir": "/proc/x"}, "--output_dir=/proc/x cannot be written"),
    # --- environment
    "a time that is none": (
        lambda w: w.env("SLURM_JOB_END_TIME", "soon") or {},
        "SLURM_JOB_END_TIME='soon' is no time in seconds; unset it",
    ),
    "a job that is over": (
        lambda w: w.env("SLURM_JOB_END_TIME", str(int(time.time()) + 9)) or {},
        "--stop_margin=300: the job ends in",
    ),
    "a precision that is none": (
        lambda w: w.env("ACCELERATE_MIXED_PRECISION", "fp12") or {},
        "ACCELERATE_MIXED_PRECISION",
    ),
    "half precision without a GPU": (
        lambda w: w.env("ACCELERATE_MIXED_PRECISION", "fp16") or {},
        "--mixed_precision=fp16 needs a GPU",
    ),
    "processes that cannot join": (lambda w: w.env("WORLD_SIZE", "2") or {}, "2 processes were started but did not"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(path, world):
    path.unlink()
    content = pickle.dumps([Trap(str(world.tmp_path / "trap"))])
    path.with_suffix(".bin").write_bytes(content)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@functools.cache
def remembered():
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same answers sooner: no waits between tries, and what is derived from equal configurations only once."""
    for module, name in ((models, "count_parameters_and_flops"), (tscd, "discriminator_summary")):
        derive = getattr(module, name)

        def once(*args, derive=derive, **options):
            key = repr((derive.__name__, args, options))
            if key not in remembered():
                remembered()[key] = derive(*args, **options)
            return remembered()[key]

        monkeypatch.setattr(module, name, once)
    monkeypatch.setattr(tscd_lora, "discriminator_summary", tscd.discriminator_summary)
    monkeypatch.setattr("common.shards.DOWNLOAD_BACKOFF", 0.0)
    monkeypatch.setattr("common.data.MAX_EMPTY_EPOCHS", 2)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(("make", "sentence"), ROWS.values(), ids=ROWS)
def test_one_sentence_and_exit_code_2_before_any_weight(
    tmp_path, teacher, flags, monkeypatch, capsys, make, sentence, script
):
    teacher()
    monkeypatch.setattr(models, "load_teacher", None)
    changes = make(World(tmp_path, teacher, flags, monkeypatch, script))
    users = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(flags(tmp_path / "out", script, **changes), script)
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stopped.value.code == 2 and len(err) == 1 and sentence in err[0], err
    assert err[0].startswith(("pytest", "__main__", "-c", "xdist")) or ": error: " in err[0]
    assert all(path.read_bytes() == content for path, content in users.items())  # nothing of theirs was touched
    assert not (tmp_path / "trap").exists()


def test_the_table_is_long_enough():
    assert len(ROWS) >= 40


WEIGHTS = {
    "weights of another shape": lambda f: edit_json(f / "unet/config.json", cross_attention_dim=32),
    "a tokenizer that is none": lambda f: [path.write_bytes(b"{") for path in (f / "tokenizer").iterdir()],
    "a class that is not there": lambda f: edit_json(f / "model_index.json", scheduler=["diffusers", "NoScheduler"]),
}


@pytest.mark.parametrize("script", [lcm, tscd_lora], ids=["lcm", "tscd_lora"])
@pytest.mark.parametrize("spoil", WEIGHTS.values(), ids=WEIGHTS)
def test_one_sentence_where_the_weights_cannot_be_loaded(tmp_path, teacher, flags, capsys, spoil, script):
    folder = Path(shutil.copytree(teacher(), tmp_path / "teacher"))
    spoil(folder)
    with pytest.raises(SystemExit) as stopped:
        train(flags(tmp_path / "out", script, pretrained_teacher_model=folder), script)
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stopped.value.code == 2 and len(err) == 1, err
    assert f"--pretrained_teacher_model={folder}" in err[0]


BAD_SAMPLES = {  # name: (image, caption, class)
    "empty image": (b"", b"caption", "decode"),
    "text as an image": (b"text", b"caption", "decode"),
    "cut png": (encode(random_image(0, 40, 40))[:-200], b"caption", "decode"),
    "cut jpeg": (encode(random_image(0, 40, 40), "JPEG")[:-200], b"caption", "decode"),
    "gif by another name": (encode(random_image(0, 40, 40), "GIF"), b"caption", "decode"),
    "no pixels": (png_header(100, 100), b"caption", "decode"),
    "a bomb": (png_header(20000, 10050), b"caption", "too_big"),
    "small": (encode(random_image(0, 5, 40)), b"caption", "too_small"),
    "empty caption": (encode(random_image(0, 40, 40)), b"", "missing_caption"),
    "blank caption": (encode(random_image(0, 40, 40)), b" \n\t", "missing_caption"),
    "caption that is no utf-8": (encode(random_image(0, 40, 40)), b"\xff\xfe\xfa", "decode"),
    "no caption": (encode(random_image(0, 40, 40)), None, "missing_caption"),
    "no image": (None, b"caption", "decode"),
}


@pytest.mark.parametrize("script", [lcm, tscd_lora], ids=["lcm", "tscd_lora"])
def test_bad_samples_are_skipped_and_counted(tmp_path, flags, script):
    contents = []
    for i, (name, (image, caption, _)) in enumerate(BAD_SAMPLES.items()):
        name = name.replace(" ", "_")
        contents += [(f"{name}.png", image)] if image is not None else []
        contents += [(f"{name}.txt", caption)] if caption is not None else []
        contents += [(f"good{i}.png", encode(random_image(i, 20, 20))), (f"good{i}.txt", b"good")]
    write_tar(tmp_path / "mixed.tar", contents)
    options = {"max_train_steps": 3, "min_image_size": 6, "max_skip_ratio": 1, "data_lanes": 1, "adv_weights": 0}
    options |= {"stage_segments": 1} if "tscd" in script.__name__ else {"adv_weights": None}
    out = tmp_path / "out"
    train(flags(out, script, train_shards_path_or_url=tmp_path / "mixed.tar", **options), script)
    entries = list(map(json.loads, (out / "skipped_samples.jsonl").read_text().splitlines()))
    found = {entry["key"].split("/")[1].replace("_", " "): entry["reason"] for entry in entries}
    counters = checkpointing.read_state(out / "checkpoint-3")["data"]["counters"]
    assert found and found == {name: BAD_SAMPLES[name][2] for name in found}
    assert counters["read"] == 12 + sum(counters[name] for name in SKIP_CLASSES) and len(entries) == len(found)
    assert sum(counters[name] for name in SKIP_CLASSES) == len(found) >= 8


SOURCES = [encode(random_image(1, 24, 20), kind) for kind in ("PNG", "JPEG", "WEBP")]
edits = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def image_shard(tmp_path_factory):
    return tmp_path_factory.mktemp("images") / "a.tar"


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutations=st.lists(st.tuples(st.sampled_from(SOURCES), edits, st.floats(0.5, 1.2)), min_size=1, max_size=3))
def test_no_image_can_do_harm(image_shard, mutations):
    """Byte-mutated images and captions among good ones: a batch, or a count, and never anything else."""
    with tarfile.open(image_shard, "w") as tar:
        for i, (source, changes, cut) in enumerate(mutations):
            content = bytearray(source)
            for place, new in changes:
                start = int(place * (len(content) - len(new)))
                content[start : start + len(new)] = new
            caption = b"caption" + (changes[0][1] if i == 1 else b"")
            for name, data in ((f"{i}.png", content[: int(len(content) * cut)]), (f"{i}.txt", caption)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(bytes(data)))
        for name, data in (("good.png", SOURCES[0]), ("good.txt", b"good")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    options = {"batch_size": 1, "seed": 1, "num_lanes": 1, "max_skip_ratio": 1.0}
    data = TrainingData([str(image_shard)], lambda raw, rng: decode_image_text(raw, rng, resolution=16), **options)
    batches, used = iter(data), 0
    while data.counters["read"] <= len(mutations):
        batch = next(batches)
        used += 1
        assert batch["images"].shape == (1, 3, 16, 16) and batch["images"].dtype == torch.uint8
        assert batch["captions"][0].strip()
    assert data.counters["read"] == used + sum(data.counters[name] for name in SKIP_CLASSES)

"""What users bring that is wrong, as the scripts meet it: one sentence and exit code 2, or it is skipped and counted.

Flags that argparse alone can judge are in test_flags.py; what else is wrong with shards, folders, tables, teachers and
checkpoints in the tests of the rooms that read them.
"""

import contextlib
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

from common import lock
from common.ct import unet as ct_unet
from common.data.images import FORMATS, decode_image_text
from common.data.shards import SKIP_CLASSES
from common.data.stream import TrainingData
from common.direct import pipelines
from common.networks import teachers
from common.run import checkpointing, simulation
from common.tools.demo import stable_diffusion
from tests.cases import CASES, command, finished, one_sentence, train
from tests.data.making import BAD, Trap, bad_members, encode, pickle_members, random_image, write_tar
from tests.made import CONFIG, edit_json

import datasets
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save


class World:
    """What a row of the table may spoil: a copy of the teacher, shards, folders, the environment."""

    def __init__(self, tmp_path, made, monkeypatch, name):
        self.tmp_path, self.made, self.env = tmp_path, made, monkeypatch.setenv
        self.name, self.script, self.out = name, CASES[name].script, tmp_path / "out"

    def flags(self, folder, **changes):
        return command(CASES[self.name], self.made, folder, **changes)

    def copy(self, name, spoil):
        """A spoiled copy of something that is made for all tests."""
        source, copy = Path(self.made[name]), self.tmp_path / Path(self.made[name]).name
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        spoil(copy)
        return copy

    def teacher(self, spoil):
        return {"pretrained_teacher_model": self.copy(f"{'direct_' * (self.name == 'direct')}teacher", spoil)}

    def pairs(self, spoil):
        return {"pairs_dir": self.copy("pairs", spoil)}

    def data_set(self, spoil):
        return {"dataset_name": self.copy("data_set", spoil)}

    def feature_network(self, spoil):
        """A classifier of the digits that would do, spoiled."""
        stable_diffusion.build_classifier(self.tmp_path / "classifier", steps=1)
        spoil(self.tmp_path / "classifier")
        return {"eval_steps": 2, "feature_network": self.tmp_path / "classifier"}

    def table(self, *rows, header="image,prompt,seed", image=b""):
        """A csv beside 0.png, an image, and 1.png, whatever is given."""
        self.file("images/1.png", image)
        self.file("images/0.png", encode(random_image(0, 16, 16)))
        path = self.file("images/metadata.csv", "\n".join([header, *rows]).encode())
        return {"pairs_dir": None, "dataset_metadata_path": path}

    def network(self, spoil):
        """A start for consistency training, its weights spoiled."""
        unet = UNet2DModel.from_config(CONFIG | {"num_class_embeds": 10, "sample_size": 8})
        unet.save_pretrained(self.tmp_path / "network")
        spoil(self.tmp_path / "network")
        return {"model_config_name_or_path": None, "pretrained_model_name_or_path": self.tmp_path / "network"}

    def new_data_set(self, **columns):
        datasets.Dataset.from_dict(columns).save_to_disk(self.tmp_path / "new")
        return {"dataset_name": self.tmp_path / "new"}

    def image_folder(self, **files):
        for name, content in files.items():
            self.file(f"folder/{name.replace('__', '/').replace('_', '.')}", content)
        own = {"dataset_name": None, "dataset_image_column_name": None}
        return own | {"train_data_dir": self.tmp_path / "folder"}

    def shards(self, value):
        own = {"dataset_name": None, "dataset_image_column_name": None, "num_classes": 10}
        return (own if self.name == "ct" else {}) | {"train_shards_path_or_url": value}

    def tar(self, *contents):
        write_tar(self.tmp_path / "bad.tar", contents)
        return self.shards(self.tmp_path / "bad.tar") | {"data_lanes": 1}

    def net(self, path):
        return {"model_config_name_or_path": path}

    def file(self, name, content):
        path = self.tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def checkpoint(self, spoil=lambda folder: None, name="latest", **state):
        """A checkpoint as far as it is read before any weight is loaded."""
        with contextlib.redirect_stdout(io.StringIO()):
            train(self.flags(self.tmp_path / "plan", dry_run=True), self.script)
        folder = self.out / "checkpoint-2"
        folder.mkdir(parents=True)
        (self.out / checkpointing.CONFIG).write_text("{}")
        content = {"global_step": 2, "args": {}, "data": {}, "rng_digests": [1], "total_batch_size": 4} | state
        (folder / checkpointing.STATE).write_text(json.dumps(content))
        for file in ("model.safetensors", "random_states_0.pkl"):
            (folder / file).write_bytes(bytes(100))
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / checkpointing.COMPLETE).write_text(json.dumps({"files": sizes, "world_size": 1}))
        spoil(folder)
        return {"resume_from_checkpoint": name}


# What is done to a copy of a folder.


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edit(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def pickled(name):
    def change(folder):
        (folder / name).unlink()
        torch.save([Trap(folder / "trap")], (folder / name).with_suffix(".bin"))

    return change


def members(shard, suffix, content):
    """A tar is written again, each member of that suffix with other content, or without it for None."""

    def change(folder):
        with tarfile.open(folder / shard) as tar:
            found = [(member.name, tar.extractfile(member).read()) for member in tar]
        changed = [(name, content if name.endswith(suffix) else data) for name, data in found]
        write_tar(folder / shard, [(name, data) for name, data in changed if data is not None])

    return change


def spoiled(method, table):
    """Rows of {name: (what is done to a copy of the folder, sentence)}."""
    return {name: (lambda w, s=spoil: getattr(w, method)(s), sentence) for name, (spoil, sentence) in table.items()}


PNG, CUT = encode(random_image(0)), encode(random_image(0, 16, 16))[:-300]
TEACHER, WEIGHTS = "--pretrained_teacher_model=", "diffusion_pytorch_model.safetensors"
INDEX, PAIRS, SHARD, CUDA = "model_index.json", "dataset_config.json", "00001.tar", "image,prompt,seed,rand_device"
PAIR = [("a.png", b"no image"), ("a.txt", b"a caption"), ("a.cls", b"1")]
STABLE_DIFFUSION = {
    "resolution": (lambda w: {"resolution": 17}, "--resolution=17 is not a multiple of 8"),
    "grid": (lambda w: {"num_ddim_timesteps": 30}, "--num_ddim_timesteps=30 must divide 1000"),
    "range of w": (lambda w: {"w_min": 9, "w_max": 3}, "--w_min=9.0 is larger than --w_max=3.0; swap them"),
    "sdxl's flag": (lambda w: {"use_fix_crop_and_size": True}, "--use_fix_crop_and_size is for SDXL"),
    "too few samples": (lambda w: {"max_train_samples": 3, "data_lanes": 8}, "--max_train_samples must be at least 8"),
    "steps of unknown data": (lambda w: {"train_shards_path_or_url": "pipe:cat /nope.tar", "max_train_steps": None},
                              "--max_train_steps is needed"),
    "a single file that is none": (lambda w: {"pretrained_teacher_model": w.file("model.safetensors", b"\xff" * 64)},
                                   "the file is damaged or no safetensors file"),
    "no such VAE": (lambda w: {"pretrained_vae_model_name_or_path": "/no"}, "--pretrained_vae_model_name_or_path=/n"),
    "a tar without captions": (lambda w: w.tar(("a.png", PNG)), "missing_caption"),
} | spoiled("teacher", {
    "configuration without its numbers": (write("unet/config.json", b"{}"), TEACHER),
})  # fmt: skip
FULL = {"no such start": (lambda w: {"init_unet": "/nope"}, "--init_unet=/nope: neither")}
LORA = {"a rank that no layer has": (lambda w: {"lora_rank": 6400},
                                     "--lora_rank=6400: the largest of the adapted layers has rank 64")}  # fmt: skip
TEACHERS = {  # of direct distillation as well
    "no such teacher": (
        lambda w: {"pretrained_teacher_model": "/nope"},
        f"{TEACHER}/nope: neither a folder nor a model that the hub gives (no such folder",
    ),
    "a hub name offline": (
        lambda w: {"pretrained_teacher_model": "some/model"},
        f"{TEACHER}some/model: neither a folder nor a model that the hub gives (it is not in the "
        "hub's cache, and HF_HUB_OFFLINE forbids to download it)",
    ),
} | spoiled(
    "teacher",
    {
        "index that is no json": (write(INDEX, b"{"), TEACHER),
        "configuration that is a list": (write("unet/config.json", b"[]"), TEACHER),
        "a scheduler that is a list": (write("scheduler/scheduler_config.json", b"[]"), TEACHER),
    },
)
SHARDS = {  # of consistency training as well
    "no shard": (lambda w: w.shards("/no/{0..3}.tar"), "4 of 4 paths match no file"),
    "a tar without images": (lambda w: w.tar(("a.txt", b"caption")), "decode"),
    "a tar of pickles": (lambda w: w.tar(*pickle_members(w.tmp_path / "trap")), "found no usable sample"),
    "a tar of broken images": (lambda w: w.tar(*PAIR), "; skipped_samples.jsonl has the first"),
}
ANY = {
    "a checkpoint of another run": (lambda w: w.checkpoint(args={"seed": 9}), "--seed was 9 and is 1"),
    "a checkpoint without a node's state": (
        lambda w: w.checkpoint(edit("COMPLETE", world_size=2), "checkpoint-2"), "it lacks random_states_1.pkl, the st"
    ),
    "a result in the way": (lambda w: w.file("out/README.md", b"mine") and {"resume_from_checkpoint": "latest"},
                            "holds files but no complete checkpoint"),
    "a folder in use": (lambda w: w.file("out/notes", b"mine") and {}, "is not empty"),
    "a folder with a run in it": (
        lambda w: w.file("out/RUNNING", json.dumps(lock._me()).encode()) and {"resume_from_checkpoint": "latest"},
        f"/out is in use by process {os.getpid()} on ",
    ),
    "a device": (lambda w: {"output_dir": "/dev/null/sub", "dry_run": True}, "--output_dir=/dev/null/sub"),
    "a job that is over": (lambda w: w.env("SLURM_JOB_END_TIME", str(int(time.time()) + 9)) or {},
                           "--stop_margin=300: the job ends in"),
    "half precision without a GPU": (lambda w: w.env("ACCELERATE_MIXED_PRECISION", "fp16") or {},
                                     "--mixed_precision=fp16 needs a GPU"),
    "processes that cannot join": (lambda w: w.env("WORLD_SIZE", "2") or {}, "2 processes were started but did not"),
}  # fmt: skip
CONSISTENCY = {
    # --- data sets and image folders
    "no such data set": (lambda w: {"dataset_name": "/no/data"}, "--dataset_name=/no/data cannot be loaded"),
    "a data set of the hub offline": (lambda w: {"dataset_name": "some/data"}, "--dataset_name=some/data cannot be l"),
    "a table that is damaged": (lambda w: w.data_set(lambda f: [cut_short(a.name)(f) for a in f.glob("*.arrow")]),
                                "data_set cannot be loaded"),
    "a configuration of what has none": (lambda w: {"dataset_config_name": "plain_text"},
                                         "was saved to disk without configurations; drop it"),
    "no rows": (lambda w: w.new_data_set(img=[], label=[]), "new cannot be loaded"),
    "a column that is not there": (lambda w: {"dataset_image_column_name": "image"},
                                   "has no column image: --dataset_image_column_name is one of img, label"),
    "images that are numbers": (lambda w: w.new_data_set(img=[1, 2], label=[0, 1]), "does not hold images"),
    "classes that are not there": (lambda w: {"dataset_class_label_column_name": "fine"}, "has no column fine"),
    "classes that are images": (lambda w: {"dataset_class_label_column_name": "img"}, "must hold a whole number"),
    "more classes than said": (lambda w: {"num_classes": 5}, "--num_classes=5: the data have 10 classes"),
    "no such folder of images": (lambda w: {"dataset_name": None, "train_data_dir": "/nope"},
                                 "--train_data_dir=/nope: there is no such folder"),
    "a folder of no images": (lambda w: w.image_folder(a_heic=b""), "it holds no images (jpg, png"),
    "classes of a data set from 1": (
        lambda w: w.new_data_set(img=[random_image(0)] * 2, label=[1, 2]) | {"num_classes": None},
        "its classes run from 1 to 2",
    ),
    "a folder of images as shards": (lambda w: w.shards(w.file("x/a.png", PNG).parent), "pass images as --train_dat"),
    "a tar without classes": (lambda w: w.tar(("a.png", PNG)), "found no usable sample"),
    "classes of a tar from 1": (
        lambda w: w.tar(("a.png", PNG), ("a.cls", b"1"), ("b.json", b'{"label": 10}')),
        "--num_classes=10: samples have the class 10, and classes count from 0 to 9; if these run from 1 to 10",
    ),
    "what is no run to be overwritten": (lambda w: w.file("out/notes", b"mine") and {"overwrite_output_dir": True},
                                         "--overwrite_output_dir: --output_dir="),
    # --- networks
    "no such network": (lambda w: w.net("/nope"), "--model_config_name_or_path=/nope: neither"),
    "a network that is no json": (lambda w: w.net(w.file("net.json", b"{")), "the file is not JSON"),
    "a network that is a list": (lambda w: w.net(w.file("net.json", b"[]")), "is not the configuration of a UNet2DMo"),
    "no network for this size": (lambda w: w.net(None), "there are default networks for 32 and 64 pixels only"),
    "a resolution that does not fit": (lambda w: {"resolution": 9}, "2 levels need a --resolution that 2 divides, no"),
    "no such weights": (lambda w: w.net(None) | {"pretrained_model_name_or_path": "/nope"},
                        "--pretrained_model_name_or_path=/nope"),
    "weights cut short": (lambda w: w.network(cut_short(WEIGHTS)), "is damaged"),
    "weights that are a pickle": (lambda w: w.network(pickled(WEIGHTS)), "a pickle"),
    "weights that are missing": (lambda w: w.network(remove(WEIGHTS)), "has no weights"),
    # --- the curriculum, measurements
    "too few steps for the levels": (lambda w: {"discretization_s_1": 1280},
                                     "--max_train_steps=4 is too short for the 8 levels"),
    "more pretraining than steps": (lambda w: {"pretrain_steps": 9}, "--pretrain_steps=9 is more than"),
    "noise that is never drawn": (lambda w: {"p_mean": 50}, "--p_mean=50.0, --p_std=2.0: no pair of noise levels"),
    "a power that is no number": (lambda w: {"rho": 1e-5},
                                  "--rho=1e-05: --sigma_max=80.0 to the power of 1 / rho is no number; raise rho"),
    "more steps than levels": (lambda w: {"eval_nfe": "1,50"},
                               "--eval_nfe=50 is more steps than there are noise levels"),
    "no such feature network": (lambda w: {"eval_steps": 2, "feature_network": "/nope"},
                                "--feature_network=/nope cannot be used"),
    "a feature network that is none": (
        lambda w: {"eval_steps": 2, "feature_network": w.file("x/config.json", b"{}").parent}, "x cannot be used"
    ),
} | {
    f"a network of {changes}": (lambda w, changes=changes: w.net(w.copy("unet", edit("", **changes))), sentence)
    for changes, sentence in (
        ({"norm_num_groups": 7}, "describes no network that can be built"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type fourier cannot be trained here"),
        ({"in_channels": 1, "out_channels": 1}, "must be 3, the colours"),
        ({"_class_name": "UNet2DConditionModel"}, "is not the configuration of a UNet2DModel"),
    )
}  # fmt: skip
DIRECT = {
    # --- flags
    "a scheduler that nobody knows": (lambda w: {"student_scheduler": "Magic"}, "has no such scheduler"),
    "a scheduler that draws": (lambda w: {"student_scheduler": "LCMScheduler"}, "draws noise at its steps"),
    "layers that are not there": (lambda w: {"lora_rank": 4, "lora_target_modules": "to_x"},
                                  "--lora_target_modules: 'to_x' does not select"),
    "more held out than there are": (lambda w: {"num_held_out": 24}, "leaves none of the 24 pairs"),
    "a rank that no layer has": (lambda w: {"lora_rank": 6400}, "--lora_rank=6400: the largest of the adapted layers"),
    "no such pairs": (lambda w: {"pairs_dir": "/nope"}, "--pairs_dir=/nope: no dataset_config.json"),
    # --- tables of images
    "no such table": (lambda w: {"pairs_dir": None, "dataset_metadata_path": "/nope.csv"},
                      "--dataset_metadata_path=/nope.csv cannot be read"),
    "a table without seeds": (lambda w: w.table("0.png,a", header="image,prompt"),
                              "has no column seed; its first row names image, prompt,"),
    "seeds that are words": (lambda w: w.table("0.png,a,one", "0.png,a,2"), "are numbers"),
    "noise of a GPU": (lambda w: w.table("0.png,a,1,cuda", header=CUDA), "only noise of the cpu"),
    "an image that is not there": (lambda w: w.table("0.png,a,1", "2.png,b,2"),
                                   "1 of 2 rows name no file, the first is '2.png'"),
    "an image that is none": (lambda w: w.table("0.png,a,1", "1.png,b,2", image=b"no image"), "1.png cannot be read"),
    "an image of another size": (lambda w: w.table("0.png,a,1", "0.png,b,2") | {"height": 32, "width": 32},
                                 "--height=32 --width=32: 0.png has 16 x 16 pixels"),
} | spoiled("teacher", {
    "a pipeline that nobody knows": (edit(INDEX, _class_name="NoPipeline"), "has no NoPipeline"),
    "a denoiser that is a pickle": (pickled(f"unet/{WEIGHTS}"), "unet/ has its weights only as diffusion_pytorch_mo"),
    "no scheduler": (remove("scheduler/scheduler_config.json"), TEACHER),
}) | spoiled("pairs", {
    "pairs whose description is no json": (write(PAIRS, b"{"), f"its {PAIRS} cannot be read"),
    "pairs whose description lacks the scheduler": (edit(PAIRS, scheduler=None), f"its {PAIRS} cannot be read"),
    "pairs of no samples a shard": (edit(PAIRS, samples_per_shard=0), f"its {PAIRS} cannot be read"),
    "pairs of another format": (edit(PAIRS, format=9), "its format is 9"),
    "pairs of another pipeline": (edit(PAIRS, pipeline="FluxPipeline"), "a FluxPipeline made these pairs"),
    "pairs with half a shard": (cut_short(SHARD), "00001.tar is damaged"),
    "pairs whose shards are swapped": (lambda f: shutil.copy(f / "00002.tar", f / "00000.tar"),
                                       "00000.tar is damaged (pair 0 is not in its place"),
    "pairs with a shard of pickles": (lambda f: write_tar(f / SHARD, pickle_members(f / "trap")), f"{SHARD} is damag"),
    "pairs whose records are lists": (lambda f: write_tar(f / SHARD, [("000000008.json", b"[]")]), f"{SHARD} is dama"),
    "pairs without latents": (members(SHARD, ".safetensors", None), f"{SHARD} is damaged"),
    "pairs without records": (members(SHARD, ".json", None), "00002.tar is damaged (pair 8 is not in its place"),
})  # fmt: skip
# What each copy of the Stable Diffusion scripts asks for in its own `main`; the first has all rows.
OWN = ("resolution", "range of w", "no such VAE", "no such teacher", "no shard", "a checkpoint of another run",
       "a folder in use")  # fmt: skip
OF_EACH = ("no shard", "a checkpoint of another run", "a folder in use", "a device")
STAGES = {
    "too few updates for stages": (lambda w: {"max_train_steps": 1}, "--max_train_steps=1 is too few for 2 stages"),
    "a grid that no stage fits": (lambda w: {"stage_segments": "7,1"}, "--stage_segments=7,1: no grid of 1000 times"),
}
COMMON = STABLE_DIFFUSION | TEACHERS | SHARDS | ANY
APPLY = {  # the script's name: its rows
    "lcm": COMMON | FULL,
    "lcm_lora": {row: COMMON[row] for row in OWN} | LORA,
    "tscd": {row: COMMON[row] for row in OWN} | FULL | STAGES,
    "tscd_lora": {row: COMMON[row] for row in OWN} | LORA | STAGES,
    "ct": CONSISTENCY | {row: (SHARDS | ANY)[row] for row in OF_EACH},
    "direct": DIRECT | TEACHERS | {row: ANY[row] for row in OF_EACH[1:]},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same answers sooner: no waits between tries, and a dry run ends with its checks."""
    monkeypatch.setattr(simulation, "begin", finished)
    monkeypatch.setattr("common.data.fetch.BACKOFF", 0.0)
    monkeypatch.setattr("common.data.lanes.MAX_EMPTY_EPOCHS", 2)


@pytest.mark.parametrize(
    ("name", "row"), [pytest.param(name, row, id=f"{row}-{name}") for name, rows in APPLY.items() for row in rows]
)
def test_one_sentence_and_exit_code_2_before_any_weight(tmp_path, made_for_all, monkeypatch, capsys, name, row):
    world, (make, sentence) = World(tmp_path, made_for_all, monkeypatch, name), APPLY[name][row]
    world.flags(tmp_path)  # makes what there is to make
    for module, load in ((teachers, "load_teacher"), (ct_unet, "make_unet"), (pipelines, "load_pipeline")):
        monkeypatch.setattr(module, load, None)
    changes = make(world)
    users = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = world.flags(tmp_path / "out", **changes)
    assert sentence in one_sentence(capsys, train, words, world.script, alone=True)
    assert all(path.read_bytes() == content for path, content in users.items())  # nothing of theirs was touched
    assert not list(tmp_path.rglob("trap"))


LOADED = {  # what is found out while things are loaded, or later: (scripts, how, sentence)
    "a tokenizer that is none": (
        ("lcm", "direct"),
        lambda w: w.teacher(lambda f: [path.write_bytes(b"{") for path in (f / "tokenizer").iterdir()]), TEACHER,
    ),
    "a class that is not there": (
        ("tscd_lora",), lambda w: w.teacher(edit(INDEX, scheduler=["diffusers", "NoScheduler"])), TEACHER
    ),
    "latents that are none": (
        ("direct",), lambda w: w.pairs(members("00002.tar", ".safetensors", b"x" * 99)), "00002.tar cannot be read"
    ),
    "latents of a wrong name": (
        ("direct",), lambda w: w.pairs(members("00002.tar", ".safetensors", save({"z": torch.ones(1)}))),
        "00002.tar cannot be read",
    ),
    "an image cut short": (
        ("direct",), lambda w: w.table("1.png,a,1", "1.png,b,2", image=CUT) | {"num_held_out": 1},
        "1.png cannot be read",
    ),
    "a feature network that is a pickle": (
        ("ct",), lambda w: w.feature_network(pickled("model.safetensors")), "--feature_network="
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row"), [pytest.param(name, row, id=f"{row}-{name}") for row, (on, *_) in LOADED.items() for name in on]
)
def test_one_sentence_where_something_cannot_be_loaded(tmp_path, made_for_all, monkeypatch, capsys, name, row):
    world, (_, make, sentence) = World(tmp_path, made_for_all, monkeypatch, name), LOADED[row]
    assert sentence in one_sentence(capsys, train, world.flags(tmp_path / "out", **make(world)), world.script)
    assert not list(tmp_path.rglob("trap"))


def test_bad_samples_are_skipped_and_counted(tmp_path, flags, capsys):
    """How each is found out: tests/data/test_images.py, and of classes test_folders.py."""
    write_tar(tmp_path / "mixed.tar", bad_members(0))
    options = {"max_train_steps": 3, "min_image_size": 6, "max_skip_ratio": 1, "data_lanes": 1}
    out = tmp_path / "out"
    train(flags(out, train_shards_path_or_url=tmp_path / "mixed.tar", **options))
    found = [json.loads(line) for line in (out / "skipped_samples.jsonl").read_text().splitlines()]
    counters = checkpointing.read_state(out / "checkpoint-3")["data"]["counters"]
    assert {(e["key"], e["reason"]) for e in found} == {(f"mixed.tar/0{k}", r) for k, r in BAD.items()}
    assert counters["read"] == 12 + len(found) and len(found) == sum(counters[name] for name in SKIP_CLASSES)
    assert f" read, {len(found)} skipped (skipped_samples.jsonl)\n" in capsys.readouterr().out  # the end of the run


SOURCES = [encode(random_image(1, 24, 20), kind) for kind in FORMATS]
edits = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def image_shard(tmp_path_factory):
    return tmp_path_factory.mktemp("images") / "a.tar"


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutations=st.lists(st.tuples(st.sampled_from(SOURCES), edits, st.floats(0.5, 1.2)), min_size=1, max_size=3))
def test_no_image_can_do_harm(image_shard, mutations):
    """Byte-mutated images and captions among good ones: a batch, or a count, and never anything else."""
    contents = []
    for i, (source, changes, cut) in enumerate(mutations):
        content = bytearray(source)
        for place, new in changes:
            start = int(place * (len(content) - len(new)))
            content[start : start + len(new)] = new
        caption = b"caption" + (changes[0][1] if i == 1 else b"")
        contents += [(f"{i}.png", content[: int(len(content) * cut)]), (f"{i}.txt", caption)]
    write_tar(image_shard, [*contents, ("good.png", SOURCES[0]), ("good.txt", b"good")])
    options = {"batch_size": 1, "seed": 1, "num_lanes": 1, "max_skip_ratio": 1.0}
    data = TrainingData([str(image_shard)], lambda raw, rng: decode_image_text(raw, rng, resolution=16), **options)
    batches, used = iter(data), 0
    while data.counters["read"] <= len(mutations):
        batch = next(batches)
        used += 1
        assert batch["images"].shape == (1, 3, 16, 16) and batch["images"].dtype == torch.uint8
        assert batch["captions"][0].strip()
    assert data.counters["read"] == used + sum(data.counters[name] for name in SKIP_CLASSES)

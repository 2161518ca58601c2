"""Cached latents: what encode_shards writes, that a run trains from it as from the images, and what is refused."""

import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import types
from pathlib import Path

import train_lcm_distill_sd_wds as lcm
from common.data import cached_latents
from common.data.shards import SampleError, check_members, expand_shards
from common.errors import UserError
from common.networks import encoders, teachers
from common.run import simulation
from common.tools import encode_shards, latent_shards
from tests.cases import ROOT, SD_SCRIPTS, finished, one_sentence, scalars, soak_but, train
from tests.data.making import Trap, encode, random_image, write_tar
from tests.forks import end_of, fork
from tests.made import edit_json
from tests.made import members as content

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file


def words(shards, out, teacher, **changes):
    values = {"pretrained_teacher_model": teacher, "resolution": 16} | changes
    return [str(shards), str(out)] + [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items()]


def ask_with(command):
    encode_shards.main(encode_shards.parse_args(command))


def ask(*args, **changes):
    ask_with(words(*args, **changes))


def refused(capsys, *args, **changes):
    return one_sentence(capsys, ask, *args, **changes)


FLAGS = {"center_crop": True, "vae_encode_batch_size": 1}  # of the shards that most tests read


@pytest.fixture(scope="session")
def shards(build_once, shards):
    """48 images of each of the digits' first three shards."""

    def build(folder):
        folder.mkdir()
        for path in expand_shards(shards)[:3]:
            few = list(read_tar(path).items())[:48]
            write_tar(folder / Path(path).name, [(f"{key}.{e}", c) for key, raw in few for e, c in raw.items()])

    return tars(build_once("few_shards", build))


@pytest.fixture(scope="session")
def cached(build_once, teacher, shards):
    """cached(kind): the digits' shards, encoded by the teacher of this kind with a centre crop."""

    def get(kind="epsilon"):
        return build_once(f"cached_{kind}", lambda folder: ask(shards, folder, teacher(kind), **FLAGS))

    return get


def tars(folder):
    return f"{folder}/{{00000..00002}}.tar"


def read_tar(path):
    """{key: {extension: bytes}} of a shard, without this project's reader."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def array(data):
    return np.load(io.BytesIO(data), allow_pickle=False)


def stock_posterior(teacher, images):
    """Mean and std of uint8 images (B, H, W, 3), by diffusers alone."""
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    return posterior.mean.numpy(), posterior.std.numpy()


# --- what is written


def test_latents_are_the_ones_of_the_stock_vae_in_float16(cached, teacher, shards):
    source = read_tar(expand_shards(shards)[2])
    made = read_tar(cached() / "00002.tar")
    manifest = json.loads(made.pop("__manifest__")[""])
    assert list(made) == list(source) and manifest == json.loads((cached() / "manifest.json").read_text())
    assert manifest["vae"] == teacher() and manifest["dtype"] == "float32" and manifest["shape"] == [4, 8, 8]
    images = [np.asarray(Image.open(io.BytesIO(source[key]["png"])).convert("RGB")) for key in made]
    means, stds = stock_posterior(teacher(), images)
    for key, mean, std in zip(made, means, stds, strict=True):
        members = made[key]
        assert members.keys() == {"mean.npy", "std.npy", "txt", "json"} and members["txt"] == source[key]["txt"]
        for name, expected in (("mean.npy", mean), ("std.npy", std)):
            assert array(members[name]).dtype == np.float16
            assert np.abs(array(members[name]) - expected).max() <= 2**-10 * np.abs(expected).max()
        record = json.loads(members["json"])
        assert (record["original_size"], record["crop_top_left"], record["flip"]) == ([16, 16], [0, 0], False)
    stats = json.loads((cached() / "00002_stats.json").read_text())
    assert stats["successes"] == stats["count"] == len(made) and not stats["skipped"]


def test_crops_and_flips_are_said_and_hang_on_seed_shard_and_key_alone(tmp_path, teacher):
    """Sizes that are not square, with an odd side; the shorter one is the resolution, so that a crop is a slice."""
    sizes = [(16, 23), (31, 16), (16, 16), (16, 40), (45, 16), (16, 17)] * 3
    images = {f"k{i:02d}": random_image(i, *size) for i, size in enumerate(sizes)}
    contents = [(f"{k}.{e}", c) for k, image in images.items() for e, c in (("png", encode(image)), ("txt", b"a"))]
    for name in ("00000.tar", "00001.tar"):
        write_tar(tmp_path / name, contents if name == "00000.tar" else contents[::-1])
    ask(tmp_path / "{00000..00001}.tar", tmp_path / "out", teacher(), random_flip=True, seed=5)
    first, second = (read_tar(tmp_path / "out" / name) for name in ("00000.tar", "00001.tar"))
    records, views = {key: json.loads(first[key]["json"]) for key in images}, []
    for key, record in records.items():
        (top, left), pixels = record["crop_top_left"], np.asarray(images[key])
        assert record["original_size"] == list(pixels.shape[:2])
        pixels = pixels[:, ::-1] if record["flip"] else pixels
        views.append(pixels[top : top + 16, left : left + 16].copy())
    mean, _ = stock_posterior(teacher(), views)
    assert all(np.abs(array(first[key]["mean.npy"]) - m).max() < 4e-3 for key, m in zip(images, mean, strict=True))
    assert len({tuple(r["crop_top_left"]) for r in records.values()}) > 5
    assert {r["flip"] for r in records.values()} == {True, False}
    others = [json.loads(second[key]["json"]) for key in images]
    assert others != list(records.values())  # another shard, other draws
    ask(tmp_path / "00001.tar", tmp_path / "again", teacher(), random_flip=True, seed=5, vae_encode_batch_size=3)
    again = read_tar(tmp_path / "again" / "00001.tar")  # alone, in other batches: the same draws
    assert [json.loads(again[key]["json"]) for key in images] == others


def test_a_cached_sample_of_sd15_takes_70_kilobytes(tmp_path):
    """The number in docs/cached_latents.md, by what stands in a tar; SDXL's at 1024 pixels is 4 x the latents."""
    for side, expected in ((64, 69_632), (128, 266_240)):
        half = np.ones((4, side, side), np.float16)
        manifest = json.dumps({"format": 1}).encode()
        samples = [(f"{i:09d}", "a caption", {"flip": False}, half, half) for i in range(100)]
        latent_shards.write_shard(tmp_path / f"{side}.tar", manifest, samples, lambda count, size: {"bytes": size})
        size = (tmp_path / f"{side}.tar").stat().st_size
        assert size / 100 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("nth", "left"), [(3, {"manifest.json"}), (5, {"manifest.json", "00000.tar"})])
def test_kill_9_leaves_nothing_that_passes_for_complete(tmp_path, cached, shards, teacher, nth, left):
    """In the middle of a shard, and between the shard and its json. The manifest takes the first two syncs."""
    expected = content(cached())
    command = words(shards, tmp_path / "out", teacher(), **FLAGS)

    def dies_at_a_sync():
        calls, fsync = [], os.fsync

        def dying(descriptor):
            calls.append(1)
            os.kill(os.getpid(), signal.SIGKILL) if len(calls) == nth else fsync(descriptor)

        cached_latents.os.fsync = dying

    assert end_of(fork(lambda: [dies_at_a_sync(), ask_with(command)])) == -signal.SIGKILL
    assert {name for name in content(tmp_path / "out") if not name.endswith(".tmp")} == left | {"RUNNING"}
    assert cached_latents.shard_stats(tmp_path / "out" / "00000.tar") is None
    ask_with(command)
    assert content(tmp_path / "out") == expected  # the leftovers are gone too


def test_bytes_are_the_same_for_any_split_and_only_missing_shards_are_made(tmp_path, cached, shards, teacher, capsys):
    for index in (2, 0, 1):
        ask(shards, tmp_path, teacher(), **FLAGS, shard_index=index, num_shards=3)
    assert "1 of its 1 shards are done" in capsys.readouterr().out
    assert content(tmp_path) == content(cached())
    (tmp_path / "00000_stats.json").unlink()
    (tmp_path / "00002.tar").write_bytes(b"cut off")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    ask(shards, tmp_path, teacher(), **FLAGS)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    made = {name for name in after if after[name] != before.get(name)}
    assert made == {"00002.tar", "00002_stats.json", "00000.tar", "00000_stats.json"}
    assert content(tmp_path) == content(cached())


ARRAY = "SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_COUNT SLURM_ARRAY_TASK_STEP"
RANKS = "RANK WORLD_SIZE"


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        ("", "", (0, 1)),
        (RANKS, "1 4", (1, 4)),
        (ARRAY, "7 5 3", (2, 3)),
        (f"{ARRAY} {RANKS}", "6 2 3 2 1 2", (5, 6)),
        (ARRAY, "9 3 2", "unbroken --array"),
        ("SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT", "9 10", "SLURM_ARRAY_TASK_MIN='' is no number"),
        (RANKS, "2 2", "pass --shard_index and --num_shards"),
    ],
)
def test_the_part_of_a_task(names, values, expected, monkeypatch, capsys):
    for name in ARRAY.split():
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(names.split(), values.split(), strict=False):
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        args = encode_shards.parse_args(words("in", "out", "t"))
        assert (args.shard_index, args.num_shards) == expected
    else:
        assert expected in one_sentence(capsys, encode_shards.parse_args, words("in", "out", "t"))


def test_a_wrapper_for_ray_as_the_guide_has_it(tmp_path, cached, shards, teacher, monkeypatch):
    """The guide's lines, with a stand-in for ray that calls at once."""
    lines = re.search(r"```python\n(import ray\n.*?)```", (ROOT / "docs" / "cached_latents.md").read_text(), re.S)[1]

    def remote(**options):
        return lambda function: types.SimpleNamespace(remote=function)

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(remote=remote, get=list))
    monkeypatch.setattr(sys, "argv", ["encode.py", *words(shards, tmp_path / "out", teacher(), **FLAGS)])
    assert "--num_shards" in lines
    exec(compile(lines.replace("TASKS = 16", "TASKS = 2"), "docs/cached_latents.md", "exec"), {"__name__": "__main__"})
    assert content(tmp_path / "out") == content(cached())


def test_a_folder_of_images(tmp_path, teacher):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    names = ["a.png", "b.c.png", "sub/a.png", "sub/d.png", "z.png"]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(encode(random_image(i, 16, 16)))
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"caption {i}")
    (tmp_path / "in" / "z.txt").unlink()
    ask(tmp_path / "in", tmp_path / "out", teacher(), samples_per_shard=3)
    first, second = (read_tar(tmp_path / "out" / f"0000{i}.tar") for i in range(2))
    assert list(first) == ["__manifest__", "a", "b_c", "sub/a"] and list(second) == ["__manifest__", "sub/d"]
    assert first["b_c"]["txt"] == b"caption 1"
    assert json.loads((tmp_path / "out" / "00001_stats.json").read_text())["skipped"] == {"missing_caption": 1}


def test_rows_of_one_image_are_samples_with_keys_of_their_own(tmp_path):
    for name in ("a.png", "b.bmp"):
        (tmp_path / name).write_bytes(encode(random_image(0)))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\nb.bmp,two\na.png,three\n")
    (tmp_path / "a.json").write_text('{"seed": 7}')
    args = encode_shards.parse_args([str(tmp_path), "out", "--pretrained_teacher_model=x"])
    units = encode_shards.list_units(args)
    samples = [sample for unit in units for sample in encode_shards.raw_samples(unit, args, {})]
    assert [(key, raw["txt"]) for key, raw in samples] == [("a", b"one"), ("a_row1", b"three"), ("b", b"two")]
    assert [encode_shards.source_seed(raw) for _, raw in samples] == [7, 7, None]


# --- what cannot be used


def test_bad_samples_are_left_out_counted_and_said(tmp_path, teacher, capsys, monkeypatch):
    good = [("a.png", encode(random_image(0, 20, 20))), ("a.txt", b"caption")]
    bad = [("b.png", b"no image"), ("b.txt", b"x"), ("c.png", encode(random_image(1))), ("d.txt", b"no image")]
    bad += [("e.png", encode(random_image(2, 9, 9))), ("e.txt", b"small")]
    write_tar(tmp_path / "00000.tar", [*good, *good, *bad])  # the first key twice
    write_tar(tmp_path / "00001.tar", [])
    whole = Path(write_tar(tmp_path / "00002.tar", [*good, ("z.png", encode(random_image(3))), ("z.txt", b"z")]))
    whole.write_bytes(whole.read_bytes()[:2600])  # in the middle of z
    ask(tmp_path / "{00000..00002}.tar", tmp_path / "out", teacher(), min_image_size=10)
    stats = [json.loads((tmp_path / "out" / f"0000{i}_stats.json").read_text()) for i in range(3)]
    assert stats[0]["skipped"] == {"decode": 2, "missing_caption": 1, "too_small": 1}
    assert (stats[0]["count"], stats[0]["successes"]) == (6, 2)
    assert [entry["key"] for entry in stats[0]["first_skipped"]] == ["b", "c", "d", "e"]
    assert (stats[1]["count"], stats[1]["successes"], stats[1]["skipped"]) == (0, 0, {})
    assert (stats[2]["successes"], stats[2]["skipped"]) == (1, {"shard_read": 1})
    out = capsys.readouterr().out
    assert "3 samples, skipped: decode 2, missing_caption 1, shard_read 1, too_small 1\n" in out

    # A VAE that overflows for one image costs that sample.
    posterior = encoders.posterior

    def overflowing(vae, images, batch_size):
        mean, std = posterior(vae, images, batch_size)
        mean[0] *= 1e6
        return mean, std

    monkeypatch.setattr(encoders, "posterior", overflowing)
    ask(tmp_path / "00000.tar", tmp_path / "overflow", teacher())
    stats = json.loads((tmp_path / "overflow" / "00000_stats.json").read_text())
    assert (stats["successes"], stats["skipped"]["decode"]) == (2, 3)
    assert "not finite in no; see --mixed_precision" in stats["first_skipped"][-1]["detail"]


def test_a_shard_that_cannot_be_read_costs_itself_alone(tmp_path, teacher, capsys):
    write_tar(tmp_path / "00000.tar", [("a.png", encode(random_image(0))), ("a.txt", b"caption")])
    (tmp_path / "00001.tar").write_bytes(b"no tar at all" * 99)
    write_tar(tmp_path / "00002.tar", [("a.png", b"x"), ("a.txt", b"caption")])
    write_tar(tmp_path / "00003.tar", [("a.png", encode(random_image(1))), ("a.txt", b"caption")])
    sentence = refused(capsys, tmp_path / "{00000..00003}.tar", tmp_path / "out", teacher())
    assert "IN: 2 of 4 shards could not be encoded, the first is" in sentence and "00001.tar" in sentence
    assert {p.name for p in (tmp_path / "out").glob("*.tar")} == {"00000.tar", "00003.tar"}
    assert {p.name for p in (tmp_path / "out").glob("0*.json")} == {"00000_stats.json", "00003_stats.json"}
    write_tar(tmp_path / "00001.tar", [("a.png", encode(random_image(1))), ("a.txt", b"repaired")])
    sentence = refused(capsys, tmp_path / "{00000..00003}.tar", tmp_path / "out", teacher())
    assert "1 of 4 shards" in sentence and (tmp_path / "out" / "00001_stats.json").exists()


def other_vae(teacher, folder, **config):
    """A copy of the teacher with an encoder whose weights differ a little, or with other entries in the VAE's file."""
    folder = Path(shutil.copytree(teacher, folder))
    if config:
        edit_json(folder / "vae" / "config.json", **config)
        return folder
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.bias"] += 0.01
    save_file(weights, path, {"format": "pt"})
    return folder


def test_other_settings_in_the_same_folder_are_refused(tmp_path, cached, shards, teacher, capsys, monkeypatch):
    out = Path(shutil.copytree(cached(), tmp_path / "out"))
    before = content(out)
    assert "encoder_sha256 was" in refused(capsys, shards, out, other_vae(teacher(), tmp_path / "t"), center_crop=True)
    monkeypatch.setattr(teachers, "load_teacher", None)  # the rest is found before any weight is loaded
    assert "--samples_per_shard: IN are shards, which" in refused(capsys, shards, out, teacher(), samples_per_shard=3)
    assert "center_crop was True and is False" in refused(capsys, shards, out, teacher())
    assert "seed was 0 and is 3" in refused(capsys, shards, out, teacher(), center_crop=True, seed=3)
    assert "shape was [4, 8, 8] and is" in refused(capsys, shards, out, teacher(), center_crop=True, resolution=32)
    assert "dtype was" in refused(capsys, shards, out, teacher(), center_crop=True, mixed_precision="bf16")
    assert "holds cached latents already" in refused(capsys, tars(out), tmp_path / "twice", teacher())
    folder = Path(expand_shards(shards)[0]).parent
    assert "holds other files and no manifest.json" in refused(capsys, shards, folder, teacher())
    assert "OUT=" in refused(capsys, shards, out / "00000.tar", teacher())
    assert "--device=cuda:7 cannot be used here" in refused(capsys, shards, out, teacher(), device="cuda:7")
    assert "is not a multiple of 8" in refused(capsys, shards, tmp_path / "o", teacher(), resolution=17)
    write_tar(tmp_path / "00001.tar", [("a.png", encode(random_image(0, 16, 16))), ("a.txt", b"other data")])
    said = refused(capsys, tmp_path / "00001.tar", out, teacher(), center_crop=True)
    assert "00001.tar was made of a source of" in said and "is 10240 bytes; name a new folder" in said
    both = f"{folder}/{{00000,00000}}.tar"
    assert "would both become 00000.tar" in refused(capsys, both, tmp_path / "o", teacher())
    assert "IN: 4 of 4 paths match no fi" in refused(capsys, tmp_path / "{0..3}.none", tmp_path / "o", teacher())
    (out / "manifest.json").write_text("{")
    assert "its manifest.json cannot be read" in refused(capsys, shards, out, teacher(), center_crop=True)
    (out / "manifest.json").write_bytes(before["manifest.json"])
    assert content(out) == before and not (tmp_path / "o").exists()


def test_a_name_for_every_kind_of_address():
    names = {
        "/a/b/00012.tar": "00012", "x.tar.gz": "x", "https://h/d/00003.tar?download=true": "00003",
        "pipe:curl -L -s https://h/main/00001.tar?x=a.b || exit 1": "00001", "s3://bucket/part-7.v2.tar": "part-7.v2",
        "/a b/my 1.TAR": "my 1", "x.tgz": "x", "pipe:zcat /a/2.TGZ": "2",
    }  # fmt: skip
    assert {shard: encode_shards.output_name(shard) for shard in names} == names
    unit = encode_shards.Unit("1", "https://u:pw@h/1.tar?X-Amz-Date=2&X-Amz-Signature=s", None)
    assert encode_shards.source(unit) == "https://***@h/1.tar"
    with pytest.raises(UserError, match="has no name that ends in .tar"):
        encode_shards.output_name("pipe:cat shard")


# --- training


@pytest.mark.parametrize("name", soak_but("lcm", names=SD_SCRIPTS))
def test_a_run_on_latents_differs_by_the_rounding_alone(tmp_path, flags, cached, monkeypatch, name):
    """From images whose posterior is rounded to float16 the losses are the same: the posterior's noise, dropped
    captions and all other draws are. The VAE encodes one image at a time in both, but in different memory: a latent
    may be rounded the other way, which changes a loss by far less than another draw would."""
    script = SD_SCRIPTS[name]
    options = {"center_crop": True, "proportion_empty_prompts": 0.3, "train_batch_size": 8, "max_train_steps": 2}
    train(flags(tmp_path / "b", script, **options, train_shards_path_or_url=tars(cached())), script)
    posterior = encoders.posterior
    monkeypatch.setattr(encoders, "posterior", lambda *args: [x.half().float() for x in posterior(*args)])
    train(flags(tmp_path / "a", script, **options, vae_encode_batch_size=1), script)
    a, b = (scalars(tmp_path / name, "loss") for name in "ab")
    assert len(a) == 2 and a == pytest.approx(b, rel=1e-4)


def test_sdxl_is_told_the_same_of_a_cached_sample(tmp_path, flags, cached, teacher):
    options = {"pretrained_teacher_model": teacher("sdxl"), "center_crop": True, "max_train_steps": 1}
    train(flags(tmp_path / "a", lcm, **options))
    train(flags(tmp_path / "b", lcm, **options, train_shards_path_or_url=tars(cached("sdxl"))))
    a, b = (scalars(tmp_path / name, "loss") for name in "ab")
    assert list(b.values()) == pytest.approx(list(a.values()), rel=1e-3)
    assert (tmp_path / "b" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size == (
        Path(teacher("sdxl")) / "vae" / "diffusion_pytorch_model.safetensors"
    ).stat().st_size  # the result has an encoder, though the run had none


def rewritten(cached, folder, change, shards=3):
    """Cached shards whose manifests were changed, with the digests that they then have."""
    folder.mkdir()
    manifest = json.loads((cached / "manifest.json").read_text())
    change(manifest)
    for index in range(shards):
        samples = []
        for key, raw in read_tar(cached / f"{index:05d}.tar").items():
            if key != "__manifest__":
                record = json.loads(raw["json"])
                samples.append((key, raw["txt"].decode(), record, array(raw["mean.npy"]), array(raw["std.npy"])))
        text = json.dumps(manifest).encode()
        latent_shards.write_shard(folder / f"{index:05d}.tar", text, samples, lambda count, size: {"bytes": size})
    return folder


def one_rewritten(**changes):
    """Of the first shard, with other entries in its manifest; None drops an entry."""
    change = lambda m: [m.pop(k) if v is None else m.update({k: v}) for k, v in changes.items()]  # noqa: E731
    return lambda c, t, s: f"{rewritten(c, t / 'x', change, shards=1)}/00000.tar"


HALF = lambda manifest: manifest.update(dtype="bfloat16")  # noqa: E731  as if a VAE in bfloat16 had made them
FLAGS_REFUSED = {  # flag: (value, sentence), where the latents were made with --center_crop
    "random_flip": (True, "the cached latents of --train_shards_path_or_url were made without it; drop --random_flip"),
    "center_crop": (None, "the cached latents of --train_shards_path_or_url were made with it; add --center_crop, or"),
    "resolution": (32, "were made with 16, not 32; pass --resolution=16, or encode"),
    "interpolation_type": ("bicubic", "pass --interpolation_type=bilinear"),
    "min_image_size": (9, "were made with 0, not 9; pass --min_image_size=0"),
    "vae_encode_batch_size": (7, "--vae_encode_batch_size: nothing is encoded"),
}
SHARDS_REFUSED = {  # (what is made of (cached, tmp_path, shards), sentence)
    "images among them": (lambda c, t, s: f"{{{c}/00000.tar,{s}}}", "mixes cached latents ("),
    "a lower precision": (lambda c, t, s: tars(rewritten(c, t / "x", HALF)),
                          "the VAE made the cached latents in bfloat16 and would compute in float32 in this run"),
    "settings among others": (lambda c, t, s: f"{{{c}/00000.tar,{rewritten(c, t / 'x', HALF)}/00001.tar}}",
                              "hold latents of different settings"),
    "a VAE of another shape": (one_rewritten(shape=[4, 4, 4]),
                               "have the shape [4, 4, 4], this teacher's have [4, 8, 8]"),
    "another format": (one_rewritten(format=9), "has format 9, this version reads 1"),
    "a damaged manifest": (one_rewritten(shape=None), "is damaged; encode this shard again"),
    "an empty shard among others": (
        lambda c, t, s: (t / "1.tar").touch() or f"{{{c}/00000.tar,{t}/1.tar}}",
        "1.tar); name the ones or the others, or encode that shard again",
    ),
    "all files of the folder": (lambda c, t, s: f"{c}/*", "with images or a damaged shard ("),
}  # fmt: skip
REFUSED = {flag: (lambda c, t, s, row=(flag, row[0]): dict([row]), row[1]) for flag, row in FLAGS_REFUSED.items()} | {
    name: (lambda c, t, s, make=make: {"train_shards_path_or_url": make(c, t, s)}, sentence)
    for name, (make, sentence) in SHARDS_REFUSED.items()
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_latents_that_do_not_fit_are_refused_before_any_weight(
    tmp_path, flags, cached, shards, capsys, monkeypatch, make, sentence
):
    options = {"train_shards_path_or_url": tars(cached()), "center_crop": True}
    monkeypatch.setattr(teachers, "load_teacher", None)  # what is made for all tests is there by now
    options |= make(cached(), tmp_path, expand_shards(shards)[1])
    assert sentence in one_sentence(capsys, train, flags(tmp_path / "out", lcm, **options))


@pytest.mark.parametrize("script", [SD_SCRIPTS["lcm"], SD_SCRIPTS["tscd_lora"]], ids=["lcm", "tscd_lora"])
def test_latents_of_another_vae_are_refused(tmp_path, flags, cached, teacher, capsys, script):
    options = {"train_shards_path_or_url": tars(cached()), "center_crop": True}
    teacher = other_vae(teacher(), tmp_path / "t")
    words = flags(tmp_path / "a", script, **options, pretrained_teacher_model=teacher)
    sentence = one_sentence(capsys, train, words, script)
    assert "the encoder of this run's VAE has other weights; encode the images with it" in sentence


def test_another_decoder_another_scale_and_half_precision_files_are_the_same_encoder(tmp_path, teacher):
    vae = teachers.load_teacher(teacher()).vae
    expected = cached_latents.encoder_sha256(vae)
    vae.save_pretrained(tmp_path / "half")
    path = tmp_path / "half" / "diffusion_pytorch_model.safetensors"
    half = {name: value.half() for name, value in load_file(path).items()}
    half["decoder.conv_in.bias"] += 1
    save_file(half, path, {"format": "pt"})
    edit_json(tmp_path / "half" / "config.json", scaling_factor=0.5)
    other = teachers.load_teacher(teacher(), vae=str(tmp_path / "half")).vae
    assert other.dtype == torch.float32 and cached_latents.encoder_sha256(other) == expected
    other.quant_conv.bias.data[0] += 0.01
    assert cached_latents.encoder_sha256(other) != expected


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def test_bad_members_are_skipped_and_counted(tmp_path, cached):
    """A pickled array is never opened; a header that asks for a terabyte allocates nothing."""
    samples = read_tar(cached() / "00000.tar")
    manifest = json.loads(samples.pop("__manifest__")[""])
    good = next(iter(samples.values()))
    sound = np.ones((4, 8, 8), np.float16)
    huge = npy(sound).replace(b"(4, 8, 8)", b"(1<<40,)").replace(b"(1<<40,)", b"(9**12,) ")
    spoils = [
        {"mean.npy": npy(np.array([Trap(tmp_path / "trap")], dtype=object))},
        {"mean.npy": npy(sound.astype(np.float32))},
        {"std.npy": npy(sound[:, :4])},
        {"std.npy": npy(-sound)},
        {"mean.npy": npy(sound * np.float16(np.nan))},
        {"mean.npy": good["mean.npy"][:-3]},
        {"mean.npy": huge},
        {"mean.npy": npy(np.asfortranarray(sound))},
        {"json": b"{}"},
        {"json": b"[1"},
        {"json": good["json"].replace(b"[16, 16]", b'["a", 16]')},
        {"txt": b" "},
        {"txt": b"\xff"},
    ]
    assert cached_latents.decode_cached(good, np.random.default_rng(0), manifest=manifest)["captions"]
    for spoil in spoils:
        with pytest.raises(SampleError):
            cached_latents.decode_cached(good | spoil, np.random.default_rng(0), manifest=manifest)
    good.pop("std.npy")
    with pytest.raises(SampleError, match="std.npy"):
        check_members(good, cached_latents.REQUIRED)
    assert not (tmp_path / "trap").exists()


def test_remote_shards_are_recognised_by_their_first_bytes(tmp_path, flags, cached, capsys):
    expected = cached_latents.read_manifest([str(cached() / "00000.tar")])
    assert cached_latents.read_manifest([f"pipe:cat {cached()}/00000.tar # a comment"]) == expected
    assert cached_latents.read_manifest(["pipe:exit 3", f"pipe:cat {cached()}/00001.tar"]) == expected
    assert cached_latents.read_manifest(["pipe:exit 3"] * 9) is None
    options = {"train_shards_path_or_url": f"pipe:cat {cached()}/{{00000..00002}}.tar", "center_crop": True}
    train(flags(tmp_path / "a", lcm, **options, max_train_steps=2))
    half = rewritten(cached(), tmp_path / "half", HALF)  # seen when its samples come
    options["train_shards_path_or_url"] = f"pipe:cat {{{cached()}/00000.tar,{half}/00001.tar}}"
    assert "cached latents of other settings" in one_sentence(capsys, train, flags(tmp_path / "b", lcm, **options))


def test_the_digits_of_the_demo_are_found_by_a_folder_too(tmp_path, flags, cached, capsys, monkeypatch):
    """The folder itself may be named; --dry_run says where the latents come from, and counts without opening tars."""
    monkeypatch.setattr(simulation, "begin", finished)
    train(flags(tmp_path / "a", lcm, train_shards_path_or_url=cached(), center_crop=True, dry_run=True))
    out = capsys.readouterr().out
    assert "cached, made by the VAE of" in out and re.search(r"samples per epoch +144", out)

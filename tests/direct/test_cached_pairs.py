"""A teacher's images, encoded by encode_shards with the seeds of their noise: pairs for direct distillation."""

import json
import shutil
import types
from pathlib import Path

from common.data import cached_latents
from common.direct import pairs, pipelines, sources, student
from common.tools import encode_pairs, encode_shards
from tests import tiny_pipelines as tiny
from tests.cases import one_sentence, scalars
from tests.data.making import encode, random_image, write_tar
from tests.made import members
from tests.networks.test_teachers import edit_json
from tests.scripts.test_direct import run
from tests.tools import test_encode_pairs
from tests.tools.test_encode_shards import array, other_vae, read_tar, rewritten

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL


def ask(shards, out, teacher, **changes):
    values = {"pretrained_teacher_model": teacher, "resolution": 16} | changes
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    encode_shards.main(encode_shards.parse_args([str(shards), str(out), *words]))


@pytest.fixture
def flags(direct_flags):
    return direct_flags


@pytest.fixture
def source(seeded):
    return seeded


@pytest.fixture(scope="module")
def cached(build_once, seeded, direct_teacher):
    return build_once("seeded", lambda folder: ask(seeded, folder, direct_teacher()))


def edited(source, folder, change, shard="00001.tar"):
    """A copy of tars in which `change(samples)` has edited {key: {extension: bytes}} of one."""
    shutil.copytree(source, folder)
    samples = read_tar(folder / shard)
    change(samples)
    write_tar(
        folder / shard, [(f"{key}.{e}" if e else key, c) for key, raw in samples.items() for e, c in raw.items()]
    )
    return folder


# --- what encode_shards carries


SEEDS = {"0": 0, "7": 7, str(2**64 - 1): 2**64 - 1, str(-(2**63)): -(2**63)}
NO_SEEDS = ["true", "null", '"7"', "7.0", "[7]", str(2**64), str(-(2**63) - 1), "9" * 5000]
NO_RECORDS = [b"", b"{", b"[1]", b"7", b"\xff", b"[" * 100_000, b"{}"]


def test_a_seed_is_carried_where_there_is_one_that_torch_takes(tmp_path, direct_teacher, capsys):
    records = [f'{{"seed": {text}}}'.encode() for text in [*SEEDS, *NO_SEEDS]] + [*NO_RECORDS, None]
    contents, plain = [], []
    for i, record in enumerate(records):
        sample = [(f"{i:03d}.png", encode(random_image(i, 16, 16))), (f"{i:03d}.txt", b"a caption")]
        plain += sample
        contents += sample + ([] if record is None else [(f"{i:03d}.json", record)])
    for name, content in (("seeds", contents), ("plain", plain)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", content)
        ask(tmp_path / name, tmp_path / f"{name}_out", direct_teacher())
    made = read_tar(tmp_path / "seeds_out" / "00000.tar")
    carried = {key: json.loads(raw["json"]).get("seed") for key, raw in made.items() if key != cached_latents.MEMBER}
    assert carried == {f"{i:03d}": list(SEEDS.values())[i] if i < len(SEEDS) else None for i in range(len(records))}
    plain = read_tar(tmp_path / "plain_out" / "00000.tar")
    assert list(made) == list(plain) and all(made[key] == plain[key] for key in list(made)[len(SEEDS) + 1 :])
    assert set(json.loads(plain["000"]["json"])) == {"original_size", "crop_top_left", "flip", "manifest"}
    stats = [json.loads((tmp_path / f"{name}_out" / "00000_stats.json").read_text()) for name in ("seeds", "plain")]
    out = capsys.readouterr().out
    assert stats[0]["seeds"] == 4 and "seeds" not in stats[1] and out.count("20 samples, 4 with a seed, skipped") == 1
    without = {name: raw | {"json": b""} for name, raw in made.items()}
    assert without == {name: raw | {"json": b""} for name, raw in plain.items()}


def test_a_folder_of_images_has_its_seeds_in_the_json_beside_them(tmp_path, source, direct_teacher):
    (tmp_path / "in").mkdir()
    for key, raw in read_tar(source / "00000.tar").items():
        for extension, content in raw.items():
            (tmp_path / "in" / f"{key}.{extension}").write_bytes(content)
    ask(tmp_path / "in", tmp_path / "out", direct_teacher())
    assert sources.open_pairs(tmp_path / "out").seeds == list(range(8))


# --- training


def test_training_equals_training_from_encode_pairs_but_for_float16(
    tmp_path, flags, table, source, direct_teacher, monkeypatch
):
    test_encode_pairs.ask(table, tmp_path / "pairs", direct_teacher())
    ask(source, tmp_path / "cached", direct_teacher())
    shutil.rmtree(table)
    stored, data = pairs.PairShards(tmp_path / "pairs"), sources.open_pairs(tmp_path / "cached")
    assert (data.prompts, data.seeds, data.sizes) == (stored.prompts, stored.seeds, stored.sizes) and len(data) == 24
    data.pipeline = pipelines.load_pipeline(direct_teacher())
    expected, found = stored.latents(range(24)), data.latents(range(24))
    assert found.dtype == torch.float32 and found.shape == expected.shape
    error = ((found - expected).square().mean() / expected.var()).item()
    assert error == pytest.approx(4.3e-8, rel=0.1)  # of 11 bits; the number in docs/pairs.md
    run(flags(tmp_path / "a", pairs_dir=tmp_path / "pairs"))
    monkeypatch.setattr(sources.PairImages, "pixels", None)
    run(flags(tmp_path / "b", pairs_dir=tmp_path / "cached", num_inference_steps=4))
    a, b = (scalars(tmp_path / name, "loss") for name in "ab")
    assert len(a) == 4 and list(b.values()) == pytest.approx(list(a.values()), rel=1e-3)
    a, b = (json.loads((tmp_path / name / "held_out.json").read_text()) for name in "ab")
    assert b == pytest.approx(a, rel=1e-3) and a["relative_mse"] < 0.9 * a["untrained"]
    words = [str(tmp_path / "cached"), str(tmp_path / "made"), f"--pretrained_teacher_model={direct_teacher()}"]
    encode_pairs.main(encode_pairs.parse_args(words))
    assert members(tmp_path / "made") == members(tmp_path / "b" / "pairs")


def test_the_latents_are_those_of_the_configuration(cached):
    """(mean - shift) / std * scale by hand, for a VAE that has all of them."""
    data, config = sources.open_pairs(cached), {"scaling_factor": 0.25, "shift_factor": 0.5}
    raw = read_tar(cached / "00001.tar")["000000009"]
    mean = array(raw["mean.npy"]).astype(np.float32)
    data.pipeline = types.SimpleNamespace(vae=types.SimpleNamespace(config=config))
    assert torch.equal(data.latents([9, 3])[0], torch.from_numpy((mean - 0.5) * 0.25))
    config |= {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    shift, std = (np.array(config[name], np.float32)[:, None, None] for name in ("latents_mean", "latents_std"))
    assert np.allclose(data.latents([9])[0], (mean - shift) / std * 0.25, atol=1e-6)


def test_a_run_on_other_pairs_in_the_same_place_is_not_resumed(
    tmp_path, flags, cached, source, direct_teacher, capsys
):
    folder = shutil.copytree(cached, tmp_path / "cached")
    options = {"pairs_dir": folder, "lora_rank": 4, "mixed_precision": "bf16", "ema_decay": 0.5}
    latents_in_bf16 = {"mixed_precision": "bf16", "resolution": 16}
    run(flags(tmp_path / "b", **options, max_train_steps=2))
    words = flags(tmp_path / "b", **options, resume_from_checkpoint="latest")
    shutil.rmtree(folder)
    ask(source, folder, direct_teacher(), **latents_in_bf16)  # other latents of the same images, then other seeds
    assert "was trained on other pairs than --pairs_dir" in one_sentence(capsys, run, words)
    shutil.rmtree(folder)
    other = edited(source, tmp_path / "other", lambda samples: samples["000000009"].update(json=b'{"seed": 5}'))
    ask(other, folder, direct_teacher())
    assert "was trained on other pairs than --pairs_dir" in one_sentence(capsys, run, words)


def test_seeds_of_64_bits_have_others_beside_them():
    asked = []
    rollout = lambda prompts, seeds: asked.append(seeds) or torch.zeros(1)  # noqa: E731
    data = types.SimpleNamespace(prompts=["a"] * 3, seeds=[2**64 - 1, 5, -3], call_kwargs=lambda indices: {})
    for shift in (0, 9):
        student.roll_out(rollout, data, [0, 1, 2], shift)
    assert asked == [[2**64 - 1, 5, 2**64 - 3], [8, 14, 6]]
    first, second = (torch.randn(3, generator=pipelines.generators([seed])[0]) for seed in (-3, 2**64 - 3))
    assert torch.equal(first, second)  # what torch makes of a negative seed


# --- what is refused


def without_seed(samples):
    for key in ("000000010", "000000011"):
        samples[key]["json"] = b'{"seed": "11"}'


def with_image(samples, image, key="000000011"):
    samples[key]["png"] = encode(image)


ENCODED = {  # what is done to the images, flags of encode_shards, the sentence
    "no seeds": (
        without_seed,
        {},
        "2 of 24 images have no seed, the first is 000000010 in 00001.tar; write the seed of its noise, a whole "
        "number, as 'seed' into the json",  # of an image: no flag is meant
    ),
    "larger": (
        lambda s: with_image(s, random_image(0, 32, 32)),
        {},
        "1 of 24 images were resized, cropped or flipped at `resolution`=16, which parts them from their noise, the "
        "first is 000000011 in 00001.tar (original_size [32, 32]); encode them with their own",
    ),
    "wider": (
        lambda s: with_image(s, random_image(0, 16, 40)),
        {"center_crop": True},
        "(original_size [16, 40], crop_top_left [0, 12]); encode",
    ),
    "flipped": (lambda s: None, {"random_flip": True}, "(flip True); encode them with their own `resolution` and no"),
    "another size": (lambda s: None, {"resolution": 32}, "24 of 24 images were resized, cropped or flipped"),
}


@pytest.mark.parametrize(("change", "options", "expected"), ENCODED.values(), ids=ENCODED)
def test_images_that_are_no_pairs_are_refused(
    tmp_path, flags, source, direct_teacher, capsys, monkeypatch, change, options, expected
):
    folder = edited(source, tmp_path / "in", change)
    ask(folder, tmp_path / "out", direct_teacher(), **options)
    words = flags(tmp_path / "run", pairs_dir=tmp_path / "out")
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    said = one_sentence(capsys, run, words)
    assert f"--pairs_dir={tmp_path}/out" in said and expected in said


def test_a_key_that_comes_twice_is_refused(tmp_path, flags, source, direct_teacher, capsys):
    members = [(f"{k}.{e}", c) for k, raw in read_tar(source / "00001.tar").items() for e, c in raw.items()]
    write_tar(tmp_path / "00001.tar", members * 2)
    ask(tmp_path / "00001.tar", tmp_path / "out", direct_teacher())
    said = one_sentence(capsys, run, flags(tmp_path / "run", pairs_dir=tmp_path / "out"))
    assert "00001.tar has two samples called 000000008; give each image of a shard a name of its own" in said


def unlink(name):
    return lambda folder: (folder / name).unlink()


def in_bytes(old, new):
    """Replaces the first place of the bytes `old` in 00001.tar; the size stays."""

    def change(folder):
        content = (folder / "00001.tar").read_bytes()
        assert len(old) == len(new) and old in content
        (folder / "00001.tar").write_bytes(content.replace(old, new, 1))

    return change


def in_samples(change):
    """Edits the samples of 00001.tar by `change`, {key: {extension: bytes}}; its _stats.json is made to agree."""

    def changed(folder):
        samples = read_tar(folder / "00001.tar")
        change(samples)
        members = [(f"{key}.{e}" if e else key, c) for key, raw in samples.items() for e, c in raw.items()]
        write_tar(folder / "00001.tar", members)
        edit_json(folder / "00001_stats.json", bytes=(folder / "00001.tar").stat().st_size)

    return changed


def with_record(content=None, **changes):
    """The json of a sample of 00001.tar, edited, or `content` in its place."""

    def change(samples):
        raw = samples["000000009"]
        raw["json"] = content or json.dumps(json.loads(raw["json"]) | changes).encode()

    return in_samples(change)


def cut(folder):
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:3000])


def killed(folder):
    """As `kill -9` in the middle of the second shard leaves it."""
    (folder / "00001.tar").rename(folder / f"00001.tar.{'a1' * 16}.tmp")
    for name in ("00001_stats.json", "00002.tar", "00002_stats.json"):
        (folder / name).unlink()


def other_settings(folder):
    """Every shard but the second says another precision."""
    aside = rewritten(folder, folder.with_name("aside"), lambda manifest: manifest.update(dtype="float64"))
    shutil.copy(aside / "00001.tar", folder)
    edit_json(folder / "00001_stats.json", bytes=(folder / "00001.tar").stat().st_size)


def with_manifest(**changes):
    """All shards, of a manifest that was changed."""

    def change(folder):
        aside = rewritten(folder, folder.with_name("aside"), lambda manifest: manifest.update(changes))
        for path in folder.glob("*.tar"):
            shutil.copy(aside / path.name, path)
            edit_json(folder / f"{path.stem}_stats.json", bytes=path.stat().st_size)

    return change


SPOILED = {  # what is done to the cached folder, the sentence
    "no stats": (unlink("00001_stats.json"), "1 of 3 shards are not complete, the first is 00001.tar"),
    "no tar": (unlink("00001.tar"), "1 of 3 shards are not complete, the first is 00001.tar"),
    "killed": (killed,
               "1 of 2 shards are not complete, the first is 00001.tar (a _stats.json says each's size); repeat"),
    "cut off": (cut, "1 of 3 shards are not complete, the first is 00001.tar"),
    "nothing yet": (lambda f: [p.unlink() for p in f.glob("0*")], "holds no cached latents; repeat the encode_shards"),
    "no tar at all": (lambda f: (f / "00001.tar").write_bytes(b"text" * 999),
                      "00001.tar); name the ones or the others, or encode that shard again"),
    "images among them": (lambda f: write_tar(f / "00001.tar", [("a.png", b"")]),
                          "mixes cached latents ("),
    "a header": (in_bytes(b"000000009.txt", b"\xff" * 13), "00001.tar is damaged ("),
    "a manifest": (in_bytes(b'"shape"', b'"shade"'), "the manifest in "),
    "mixture": (other_settings, "hold latents of different settings; train on one of them"),
    "another among its samples": (with_record(manifest="0" * 16),
                                  "00001.tar is damaged (000000009 is of other settings"),
    "no json": (with_record(b"{"), "00001.tar is damaged ("),
    "a list": (with_record(b"[1]"), "00001.tar is damaged ("),
    "no mean": (in_samples(lambda s: s["000000009"].pop("mean.npy")), "00001.tar is damaged ('mean.npy')"),
    "no caption": (in_samples(lambda s: s["000000009"].update(txt=b" ")), "00001.tar is damaged (missing_caption"),
    "a sample less": (in_samples(lambda s: s.pop("000000009")), "00001.tar is damaged (7 of 8 samples)"),
    "a seed of 65 bits": (with_record(seed=2**64), "1 of 24 images have no seed"),
    "a crop": (with_record(crop_top_left=[0, 1]), "000000009 in 00001.tar (crop_top_left [0, 1])"),
    "another VAE's shape": (with_manifest(shape=[16, 2, 2]),
        "have the shape [16, 2, 2], this teacher's have [4, 8, 8]; encode the images with its VAE"),
    "a coarser VAE": (with_manifest(dtype="bfloat16"), "in bfloat16 and would compute in float32 in this run"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_shards_that_do_not_fit_are_refused_before_any_weight(
    tmp_path, flags, cached, capsys, monkeypatch, change, expected
):
    folder = Path(shutil.copytree(cached, tmp_path / "cached"))
    words = flags(tmp_path / "run", pairs_dir=folder)
    change(folder)
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    said = one_sentence(capsys, run, words)
    assert "--pairs_dir" in said and "--train_shards_path_or_url" not in said and expected in said


def test_names_that_mean_no_pairs_are_refused(tmp_path, flags, cached, source, capsys):
    (tmp_path / "empty").mkdir()
    for spec, expected in {
        source: "no dataset_config.json in it, nor cached latents; make pairs with",
        tmp_path / "empty": "no dataset_config.json in it, nor cached latents",
        f"{cached}/{{00000..00003}}.tar": "1 of 4 paths match no file",
        f"{cached}/{{00000,00000}}.tar": "names a shard twice; name each once",
        f"pipe:cat {cached}/{{00000..00002}}.tar": "pairs are read in any order; copy the shards to a disk",
        "https://host/{00000..00002}.tar": "pairs are read in any order; copy the shards to a disk",
    }.items():
        said = one_sentence(capsys, run, flags(tmp_path / "run", pairs_dir=spec))
        assert f"--pairs_dir={spec}" in said and expected in said


@pytest.mark.parametrize("config", [{"_class_name": "AutoencoderDC"}, None], ids=["of another class", "none"])
def test_a_teacher_with_another_kind_of_vae_is_refused(tmp_path, flags, cached, direct_teacher, capsys, config):
    teacher = Path(shutil.copytree(direct_teacher(), tmp_path / "teacher"))
    edit_json(teacher / "vae" / "config.json", **config) if config else shutil.rmtree(teacher / "vae")
    said = one_sentence(capsys, run, flags(tmp_path / "run", pairs_dir=cached, pretrained_teacher_model=teacher))
    what = (
        " is AutoencoderDC; make pairs with generate_pairs"
        if config
        else ": it is partial, its folder vae/ is missing"
    )
    assert f"--pretrained_teacher_model={teacher}{what}" in said


def test_another_encoder_is_refused_before_the_rest_is_loaded(
    tmp_path, flags, cached, direct_teacher, capsys, monkeypatch
):
    options = {"lora_rank": 4, "mixed_precision": "bf16"}
    teacher = other_vae(direct_teacher(), tmp_path / "teacher")
    (teacher / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
    words = flags(tmp_path / "run", pairs_dir=cached, pretrained_teacher_model=teacher, **options)
    monkeypatch.setattr("common.direct.pipelines.check_pipeline", lambda *args, **options: None)
    said = one_sentence(capsys, run, words)
    assert (
        f"--pairs_dir={cached}: the VAE of " in said and "this run's VAE has other weights; encode the images" in said
    )


def test_a_pipeline_that_decodes_something_else_is_refused(tmp_path, flags, cached, capsys, monkeypatch):
    """The right shape, seeds and weights, and a decoding that is not the encoding's inverse: here, by its sign."""
    load = pipelines.load_pipeline

    def load_wrong(*args, **options):
        pipeline = load(*args, **options)
        if pipeline.unet is not None:
            decode = pipeline.vae.decode
            pipeline.vae.decode = lambda latents, *a, **o: decode(-latents, *a, **o)
        return pipeline

    monkeypatch.setattr(pipelines, "load_pipeline", load_wrong)
    said = one_sentence(capsys, run, flags(tmp_path / "run", pairs_dir=cached))
    assert f"--pairs_dir={cached}: StableDiffusionPipeline cannot be given images instead of latents" in said


def test_a_vae_that_overflows_in_float16_encodes_in_float32(direct_teacher):
    """As SDXL's own does; under autocast too, which a run in half precision has around its checks."""
    pipeline, whole = (pipelines.load_pipeline(direct_teacher(), dtype) for dtype in (torch.float16, torch.float32))
    assert pipeline.vae.config.force_upcast
    seen = []
    pipeline.vae.encoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        found = sources.encode_images(pipeline, pixels)
    assert seen == [torch.float32] and pipeline.vae.dtype == torch.float16
    assert torch.allclose(found, sources.encode_images(whole, pixels), atol=0.02)


def test_a_mean_that_cannot_be_read_ends_the_run_in_a_sentence(tmp_path, flags, cached, capsys):
    folder = Path(shutil.copytree(cached, tmp_path / "cached"))
    in_bytes(b"'<f2', 'fortran_order': False", b"'|O2', 'fortran_order': False")(folder)
    said = one_sentence(capsys, run, flags(tmp_path / "run", pairs_dir=folder))
    assert "--pairs_dir: pair 8 in " in said and "delete it and repeat encode_shards" in said


@pytest.mark.parametrize("name", ["SDXL", "PixArt", "AuraFlow", "HunyuanDiT"])
def test_the_vae_of_any_pipeline_is_loaded_without_the_rest(tmp_path, direct_teacher, name):
    pipeline, vae = tiny.make(name), AutoencoderKL.from_pretrained(direct_teacher(), subfolder="vae")
    pipeline.register_modules(vae=vae)
    pipeline.save_pretrained(tmp_path)
    for part in pipelines.DENOISERS:
        shutil.rmtree(tmp_path / part, ignore_errors=True)
    assert cached_latents.encoder_sha256(pipelines.load_vae(tmp_path)) == cached_latents.encoder_sha256(vae)

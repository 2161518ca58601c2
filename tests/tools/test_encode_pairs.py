"""A table of images, encoded once for direct distillation."""

import csv
import json
import shutil
from pathlib import Path

from common.direct import pairs, pipelines, sources
from common.tools import encode_pairs
from tests.cases import one_sentence
from tests.made import NUM_PAIRS, members
from tests.scripts.test_direct import run

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def flags(direct_flags):
    return direct_flags


def ask(table, out, teacher, **changes):
    values = {"pretrained_teacher_model": teacher, "samples_per_shard": 8} | changes
    words = [
        str(table / "metadata.csv"),
        str(out),
        *(f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items()),
    ]
    encode_pairs.main(encode_pairs.parse_args(words))


def test_they_are_the_images_pairs_and_a_run_needs_no_image(
    tmp_path, flags, table, direct_teacher, monkeypatch, capsys
):
    ask(table, tmp_path / "pairs", direct_teacher(), save_embeddings=True)
    images, stored = sources.PairImages(table / "metadata.csv"), pairs.PairShards(tmp_path / "pairs")
    images.pipeline = pipelines.load_pipeline(direct_teacher())
    assert torch.allclose(images.latents(range(20)), stored.latents(range(20)), atol=1e-5)
    assert (images.prompts, images.seeds, images.sizes) == (stored.prompts, stored.seeds, stored.sizes)
    shutil.rmtree(table)
    monkeypatch.setattr(sources, "encode_images", None)
    run(flags(tmp_path / "out", pairs_dir=tmp_path / "pairs", max_train_steps=1))
    config = json.loads((tmp_path / "out" / "training_config.json").read_text())["flags"]
    assert config["num_inference_steps"] == 4  # the table's
    said = capsys.readouterr().out
    assert "embeddings: 10 of 10 prompts are encoded now" in said and not (tmp_path / "out" / "embeddings").exists()
    assert f"10 prompts are encoded once, which takes 0.00 GiB in {tmp_path / 'pairs' / 'embeddings'}; let go" in said


def test_bytes_are_the_same_for_two_tasks_and_only_missing_shards_are_made(tmp_path, table, direct_teacher):
    ask(table, tmp_path / "one", direct_teacher())
    for index in (1, 0):
        ask(table, tmp_path / "two", direct_teacher(), shard_index=index, num_shards=2)
    assert members(tmp_path / "one") == members(tmp_path / "two") and len(members(tmp_path / "one")) == 4
    before = (tmp_path / "two" / "00000.tar").stat().st_mtime_ns
    (tmp_path / "two" / "00002.tar").unlink()
    ask(table, tmp_path / "two", direct_teacher())
    assert members(tmp_path / "one") == members(tmp_path / "two")
    assert (tmp_path / "two" / "00000.tar").stat().st_mtime_ns == before


def test_several_sizes_and_another_vae(tmp_path, flags, table, direct_teacher, capsys):
    Image.open(table / "000000003.png").resize((24, 16)).save(table / "000000003.png")
    ask(table, tmp_path / "pairs", direct_teacher())
    assert pairs.PairShards(tmp_path / "pairs").call_kwargs([3]) == {"height": 16, "width": 24}
    command = {"pairs_dir": tmp_path / "pairs"}
    said = one_sentence(capsys, run, flags(tmp_path / "a", **command))
    assert "--pairs_dir: its images have several sizes; pass --train_batch_size=1" in said
    options = {"train_batch_size": 1, "num_inference_steps": 3}
    assert "the table says 4" in one_sentence(capsys, run, flags(tmp_path / "a", **command, **options))
    teacher = Path(shutil.copytree(direct_teacher(), tmp_path / "teacher"))
    path = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: value * 1.1 if name.startswith("encoder") else value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    options = {"train_batch_size": 1, "pretrained_teacher_model": teacher}
    assert "has other weights; name the teacher" in one_sentence(
        capsys, run, flags(tmp_path / "b", **command, **options)
    )
    assert "encoder_sample" in one_sentence(capsys, ask, table, tmp_path / "pairs", teacher)
    options["pretrained_teacher_model"] = direct_teacher()
    run(flags(tmp_path / "c", **command, **options, max_train_steps=2))


def test_an_image_cut_short_leaves_no_half_a_shard(tmp_path, table, direct_teacher, capsys):
    image = table / "000000009.png"
    image.write_bytes(image.read_bytes()[:-40])
    assert "000000009.png cannot be read" in one_sentence(capsys, ask, table, tmp_path / "o", direct_teacher())
    assert sorted(members(tmp_path / "o")) == ["00000.tar", "dataset_config.json"]


def test_mistakes_before_any_weight(tmp_path, table, direct_teacher, capsys, monkeypatch):
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    rows = list(csv.reader(open(table / "metadata.csv", newline="")))
    said = one_sentence(capsys, ask, Path("/no"), tmp_path / "o", direct_teacher())
    assert "IN=/no/metadata.csv cannot be read" in said
    assert "--pretrained_teacher_model=/no" in one_sentence(capsys, ask, table, tmp_path / "o", "/no")
    assert "OUT=" in one_sentence(capsys, ask, table, table / "metadata.csv", direct_teacher())
    with open(table / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([row[:2] for row in rows])
    assert "has no column seed" in one_sentence(capsys, ask, table, tmp_path / "o", direct_teacher())
    place = rows[0].index("num_inference_steps")
    with open(table / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([*row[:place], 0, *row[place + 1 :]] for row in rows[1:])])
    assert "num_inference_steps is 0; seed" in one_sentence(capsys, ask, table, tmp_path / "o", direct_teacher())
    assert not (tmp_path / "o").exists() and NUM_PAIRS == len(rows) - 1

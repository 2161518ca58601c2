"""Teacher pairs: what generate_pairs writes, and what it refuses."""

import hashlib
import io
import re
import signal
import tarfile
from pathlib import Path

from common.direct import pairs
from common.errors import UserError
from common.tools import generate_pairs
from common.tools.demo import digits
from tests import tiny_pipelines as tiny
from tests.cases import one_sentence
from tests.fork_server import run_processes
from tests.made import NUM_PAIRS, TEACHER_STEPS, ask, members

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image


def test_pairs_are_what_the_stock_pipeline_gives(made, direct_teacher):
    data = pairs.PairShards(made())
    assert len(data) == NUM_PAIRS and data.seeds == list(range(NUM_PAIRS)) and data.config["guided"] is True
    assert data.prompts == [digits.canonical_prompts(10)[i % 10] for i in range(NUM_PAIRS)]
    stock = DiffusionPipeline.from_pretrained(direct_teacher())
    indices = [8, 9, 10, 11]  # the first batch of the second shard
    generator = [torch.Generator().manual_seed(i) for i in indices]
    latents = stock(
        [data.prompts[i] for i in indices], guidance_scale=2.0, num_inference_steps=TEACHER_STEPS, generator=generator,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(data.latents(indices), latents)
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(9))
    assert data.hashes[9] == hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    shown = stock.vae.decode(latents[:1] / stock.vae.config.scaling_factor).sample
    with tarfile.open(Path(made(), "00001.tar")) as tar:
        png = np.asarray(Image.open(io.BytesIO(tar.extractfile("000000008.png").read())))
    expected = ((shown / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).detach().numpy()
    assert np.abs(png - expected).max() <= 1


def test_bytes_are_the_same_for_two_processes_and_after_kill_9(
    made, direct_teacher, prompts_file, tmp_path, monkeypatch, capsys
):
    expected = members(made())
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in ((1, 1), (0, 3)):
        monkeypatch.setenv("RANK", str(rank))
        words = ask(tmp_path / "two", direct_teacher(), prompts_file, save_images=True)
        line = capsys.readouterr().out.splitlines()[-1]
        own = f"process {rank} of 2: {2 - rank} of its {2 - rank} shards are done"
        assert line == f"{own}; {there} of 3 shards are in {tmp_path / 'two'}"
    assert members(tmp_path / "two") == expected
    monkeypatch.setenv("WORLD_SIZE", "1")

    # Killed in the middle of writing the second shard, and begun again by the same command.
    dying = """
import os, signal
syncs, fsync = [], os.fsync
def killed(fd):
    syncs.append(fd)
    fsync(fd) if len(syncs) < 5 else os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
"""
    words = [word.replace("/two", "/killed") for word in words]
    done = run_processes(words, generate_pairs, prelude=dying)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    names = [re.sub(r"[.]\w{32}[.]", ".", name) for name in sorted(members(tmp_path / "killed"))]
    assert names == ["00000.tar", "00001.tar.tmp", "RUNNING", "dataset_config.json"]
    with pytest.raises(UserError, match="holds 1 of 3 shards; repeat the command that began it"):
        pairs.PairShards(tmp_path / "killed")
    first = (tmp_path / "killed" / "00000.tar").stat().st_mtime_ns
    generate_pairs.main(generate_pairs.parse_args(words))
    assert members(tmp_path / "killed") == expected
    assert (tmp_path / "killed" / "00000.tar").stat().st_mtime_ns == first  # kept, not made again


def test_prompts_of_files_and_captions_of_shards(tmp_path, shards):
    """Every format of a file: tests/data/test_tables.py."""
    (tmp_path / "p.csv").write_text('id,text\n1,a one\n2,"a two, or three"\n')
    for name in ("", "@"):
        assert generate_pairs.read_prompts(f"{name}{tmp_path / 'p.csv'}") == ["a one", "a two, or three"]
    for separator in ("\x0b", "\x1c", "\x85", "\u2028"):  # Unicode's line ends end no prompt
        (tmp_path / "u.txt").write_text(f"a{separator}one\r\na two\r\n", encoding="utf-8")
        assert generate_pairs.read_prompts(str(tmp_path / "u.txt")) == [f"a{separator}one", "a two"]
    captions = generate_pairs.read_prompts(shards)
    assert len(captions) == 1437 and all(any(word in c for word in digits.WORDS) for c in captions)
    (tmp_path / "empty.txt").write_text("\n")
    for name, column, sentence in [
        ("p.csv", "prompt", "no column 'prompt'"),
        ("none.txt", None, "matches no file; .* prompts are in csv"),
        ("empty.txt", None, "holds no prompt"),
    ]:
        with pytest.raises(UserError, match=sentence):
            generate_pairs.read_prompts(str(tmp_path / name), column)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrained_teacher_model": "/no/teacher"}, "--pretrained_teacher_model=/no/teacher: neither a folder nor"),
        ({"prompts": "/no/prompts.txt"}, "--prompts"),
        ({"scheduler": "DDPMScheduler"}, "--scheduler: DDPMScheduler draws noise at its steps"),
        ({"scheduler": "MagicScheduler"}, "--scheduler=MagicScheduler: diffusers has no such scheduler"),
        ({"scheduler_kwargs": '{"magic": 1}'}, "--scheduler_kwargs: PNDMScheduler has no magic"),
        ({"scheduler_kwargs": "[1]"}, "--scheduler_kwargs=[1] is no JSON object"),
        ({"scheduler_kwargs": '{"beta_end": "x"}'}, "scheduler_kwargs: PNDMScheduler cannot be made with {'beta_end'"),
        ({"scheduler_kwargs": '{"num_train_timesteps": 0}', "scheduler": "DDIMScheduler"}, "cannot be made with"),
        ({"teacher_kwargs": '{"clip_skip": 300}'}, "the teacher's call refuses these arguments"),
        ({"shard_index": 3}, "--shard_index and --num_shards go together"),
        ({"device": "meta"}, "--device=meta cannot be used here"),
        ({"scheduler": ""}, "--scheduler is empty (a variable that is not set?); give it a value, or drop it"),
        ({"teacher_kwargs": "{"}, "--teacher_kwargs={ is no JSON"),
        ({"teacher_kwargs": '{"height": 8}'}, "--teacher_kwargs: height has a flag of its own"),
        ({"teacher_kwargs": '{"magic": 8}'}, "has no magic"),
        ({"height": 16}, "--height and --width go together"),
        ({"height": 17, "width": 17}, "the teacher's call refuses these arguments"),
        ({"teacher_kwargs": '{"eta": 1.0}', "scheduler": "DDIMScheduler"}, "draws more random numbers"),
        ({"device": "magic"}, "--device=magic cannot be used here"),
        ({"device": "cuda:99"}, "--device=cuda:99 cannot be used here"),
        ({"num_inference_steps": 2000}, "--num_inference_steps=2000: PNDMScheduler has 1000 timesteps; ask for at mo"),
        ({"num_pairs": 0}, "--num_pairs: must be at least 1"),
        ({"output_dir": "FILE"}, "is a file; name a folder"),
        ({"output_dir": "MINE"}, "holds other files"),
        ({"output_dir": "MADE", "seed": 3}, "holds pairs of other flags (seed was 0 and is 3)"),
    ],
)
def test_mistakes_of_generate_pairs(changes, sentence, direct_teacher, prompts_file, made, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    places = {"FILE": tmp_path / "mine" / "notes.txt", "MINE": tmp_path / "mine", "MADE": made()}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    options = {"output_dir": tmp_path / "out", "prompts": prompts_file, "pretrained_teacher_model": direct_teacher()}
    options |= changes | ({"save_images": True} if changes.get("output_dir") == made() else {})
    capsys.readouterr()
    assert sentence in one_sentence(capsys, ask, teacher=None, alone=True, **options)
    assert not (tmp_path / "out" / "00000.tar").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_teacher_that_is_asked_to_guide_and_does_not_is_refused():
    kwargs = tiny.KWARGS["Qwen-Image"]
    silent = {name: value for name, value in kwargs.items() if name != "negative_prompt"}
    steps = {"num_inference_steps": 4}
    with pytest.raises(UserError, match="does not guide with these arguments, most likely for lack of a --negative_p"):
        generate_pairs.check_teacher(tiny.make("Qwen-Image"), ["a", "b"], silent | steps, "--scheduler")
    assert generate_pairs.check_teacher(tiny.make("Qwen-Image"), ["a", "b"], kwargs | steps, "--scheduler")
    assert generate_pairs.check_teacher(tiny.make("Flux"), ["a", "b"], tiny.KWARGS["Flux"] | steps, "--scheduler")

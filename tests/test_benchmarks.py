"""The benchmarks count what is known; that they run is tested in `tests/soak/test_benchmarks.py`."""

import sys
import tarfile

from common.shards import expand_shards
from tests.benchmarks import synthetic, throughput

import pytest
from transformers import CLIPTextConfig


def configuration(shape):
    config = {"unet": {"sample_size": shape.resolution // 8, **shape.unet}, "vae": shape.vae}
    for suffix, sizes in zip(("", "_2"), shape.text, strict=False):
        config["text_encoder" + suffix] = CLIPTextConfig(vocab_size=49408, **sizes)
    return config


def test_flops_of_stable_diffusion_1_5_are_the_known_ones(monkeypatch):
    """803 G forward at 64 x 64 latents, 1117 G for the VAE; a LoRA needs no gradients of the base's weights."""
    config = configuration(synthetic.SHAPES["sd15"])
    monkeypatch.setattr(synthetic.models, "read_teacher_config", lambda folder: config)
    assert synthetic.unet_flops(config, 512)[1] == pytest.approx(2407e9, rel=2e-3)
    assert synthetic.step_flops("", "lcm", 512) == pytest.approx(5947e9, rel=1e-3)
    assert synthetic.step_flops("", "lcm_lora", 512, cached=True) == pytest.approx(4507e9, rel=4e-3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    {
        "--batch_size=0": "--batch_size: must be at least 1",
        "--steps=0": "--steps: must be at least 1",
        "--warmup=0": "--warmup: must be at least 1",
        "--rounds=0": "--rounds: must be at least 1",
        "--shards=-1": "--shards: must be at least 1",
        "--minutes=-1": "--minutes: must be a number that is not negative",
        "--only 1": "--only chooses rows of a suite; pass --suite, or drop it",
        "--suite gpu --only 0 99": "--only=99: --suite=gpu has rows 0 to 9",
        "--suite gpu --only": "--only: expected at least one argument",
        "--suite gpu --batch_size=4": "--batch_size: the rows of --suite say that themselves; drop",
        "--suite gpu -- --compile": "flags after --: the rows of --suite say that themselves; drop the one",
        "--suite gpu --shape=sdxl": "--shape=sdxl: the rows of --suite have their own shapes; drop it, or try tiny",
        "--script=direct --cached": "--cached: --script=direct trains from pairs of the teacher's own size; drop it",
        "--script=direct_lora --resolution=64": "--resolution: --script=direct_lora trains from pairs",
        "--peer=nowhere.py": "--peer=nowhere.py is no file; name a training script",
        "--peer_flags=--compile": "--peer_flags are for --peer; pass it, or drop them",
        "--output_dir=USER": "USER holds files of others; name a new or empty folder",
        "--output_dir=USER/thesis.txt": "thesis.txt is a file; name a folder",
        "--output_dir=/proc/nothing": "--output_dir=/proc/nothing cannot be written to (",
    }.items(),
)
def test_mistakes_of_throughput_end_in_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    """None measures something else than was asked for, or touches what it did not make."""
    user = tmp_path / "user"
    user.mkdir()
    (user / "thesis.txt").write_text("mine")
    default = [] if "output_dir" in words else [f"--output_dir={tmp_path / 'out'}"]
    words = words.replace("USER", str(user)).split()
    monkeypatch.setattr(sys, "argv", ["throughput.py", *default, *words])
    monkeypatch.setattr(throughput, "measure", None)
    with pytest.raises(SystemExit) as stopped:
        throughput.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and sentence.replace("USER", str(user)) in err, err
    assert [path.name for path in user.iterdir()] == ["thesis.txt"] and not (tmp_path / "out").exists()


def test_throughput_makes_images_anew_for_other_numbers_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "write_teacher", lambda *_: None)
    for shards, samples in ((1, 2), (2, 2), (2, 3)):
        words = [f"--output_dir={tmp_path}", f"--shards={shards}", f"--samples_per_shard={samples}"]
        _, (flag,) = throughput.make_inputs(throughput.parse_args(words)[0], "tiny", "lcm", False)
        tars = expand_shards(flag.removeprefix("--train_shards_path_or_url="))
        assert [len(tarfile.open(tar).getmembers()) for tar in tars] == [2 * samples] * shards

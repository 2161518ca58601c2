"""The benchmarks count what is known; that they run is tested in `tests/soak/test_benchmarks.py`."""

import sys
import tarfile
import time

from common.ct import unet as ct_unet
from common.data.shards import expand_shards
from tests.benchmarks import synthetic, throughput

import pytest
from transformers import CLIPTextConfig


def configuration(shape):
    config = {"unet": {"sample_size": shape.resolution // 8, **shape.unet}, "vae": shape.vae}
    for suffix, sizes in zip(("", "_2"), shape.text, strict=False):
        config["text_encoder" + suffix] = CLIPTextConfig(vocab_size=49408, **sizes)
    return config


@pytest.mark.soak
def test_flops_of_stable_diffusion_1_5_are_the_known_ones(monkeypatch):
    """803 G forward at 64 x 64 latents, 1117 G for the VAE; a LoRA needs no gradients of the base's weights."""
    config = configuration(synthetic.SHAPES["sd15"])
    monkeypatch.setattr(synthetic.teachers, "read_teacher_config", lambda folder: config)
    assert synthetic.unet_flops(config, 512)[1] == pytest.approx(2407e9, rel=2e-3)
    assert synthetic.step_flops("", "lcm", 512) == pytest.approx(5947e9, rel=1e-3)
    assert synthetic.step_flops("", "lcm_lora", 512, cached=True) == pytest.approx(4507e9, rel=4e-3)


@pytest.mark.parametrize("name", ["ct32", pytest.param("ct64", marks=pytest.mark.soak)])
def test_a_step_of_consistency_training_is_a_target_a_forward_and_a_backward_of_the_default_network(name, tmp_path):
    """The backward is twice the forward but for the gradient of the image."""
    shape = synthetic.shapes("ict")[name]
    path = synthetic.write_unet_config(tmp_path / "unet.json", shape)
    forward = synthetic.unet2d_flops(ct_unet.read_unet_config(shape.resolution))[0]
    assert synthetic.step_flops(path, "ict", shape.resolution) == pytest.approx(4 * forward, rel=2e-3)


def test_flops_follow_the_flags_of_a_run():
    assert throughput.counted_flags(["--lora_rank", "8", "--compile"]) == {"lora_rank": 8, "steps": 4}
    assert throughput.counted_flags(["--num_inference_steps=2"]) == {"lora_rank": 64, "steps": 2}


@pytest.mark.parametrize(
    ("words", "sentence"),
    {
        "--only 1": "--only chooses rows of a suite; pass --suite, or drop it",
        "--suite gpu --only 0 99": "--only=99: --suite=gpu has rows 0 to 10",
        "--suite gpu --batch_size=4": "--batch_size: the rows of --suite say that themselves; drop",
        "--suite gpu -- --compile": "flags after --: the rows of --suite say that themselves; drop the one",
        "--shape=sd16": "--shape=sd16: --script=lcm has the shapes tiny, sd15, sdxl; name one",
        "--script=ect --cached": "--cached: --script=ect trains on images themselves, without a VAE; drop it",
        "-- --train_batch_size=4": "--train_batch_size=4 after --: this program sets it itself, by --script and",
        "--suite gpu --shape=sdxl": "--shape=sdxl: the rows of --suite have their own shapes; drop it, or try tiny",
        "--script=direct --cached": "--cached: --script=direct trains from pairs of the teacher's own size; drop it",
        "--script=direct_lora --resolution=64": "--resolution: --script=direct_lora trains from pairs",
        "--peer=nowhere.py": "--peer=nowhere.py is no file; name a training script",
        "--peer_flags=--compile": "--peer_flags are for --peer; pass it, or drop them",
        "--output_dir=USER": "USER holds files of others; name a new or empty folder",
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
    monkeypatch.setattr(throughput, "run_tool", lambda *_: None)
    for shards, samples in ((1, 2), (2, 2), (2, 3)):
        words = [f"--output_dir={tmp_path}", f"--shards={shards}", f"--samples_per_shard={samples}"]
        row = throughput.Row("tiny", "lcm", 1, False, [])
        _, flag = throughput.make_inputs(throughput.parse_args(words)[0], row)
        tars = expand_shards(flag.removeprefix("--train_shards_path_or_url="))
        assert [len(tarfile.open(tar).getmembers()) for tar in tars] == [2 * samples] * shards


def test_rows_of_a_suite_share_the_minutes_and_are_compared_round_by_round(tmp_path, monkeypatch, capsys):
    """A row that takes too long is ended at half of what is left, so that others are measured; the last has it all."""
    names, shares = list(throughput.SUITES["gpu"]), []

    def measure(args, name, row):
        shares.append(args.deadline - time.monotonic())
        return None if name == names[3] else {"seconds_per_update": 2.0 if name == names[0] else 1.0}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "report", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["throughput.py", "--suite=gpu", "--minutes=8", "--rounds=2", f"--output_dir={tmp_path}"]
    )
    assert throughput.main() == 1  # a row failed
    assert all(230 < share <= 240 for share in shares[:-1]) and 470 < shares[-1] <= 480
    out = capsys.readouterr().out
    assert f"{names[1]}: 2.00 times the samples per second of {names[0]} (rounds: 2.00, 2.00)" in out
    assert f"\n{names[3]}" not in out and "iCT" not in out  # it failed; nothing else is of iCT's script
    monkeypatch.setattr(
        sys, "argv", ["throughput.py", "--suite=gpu", "--shape=tiny", "--minutes=8", f"--output_dir={tmp_path}"]
    )
    throughput.main()
    assert "iCT" not in capsys.readouterr().out  # its tiny shape is another

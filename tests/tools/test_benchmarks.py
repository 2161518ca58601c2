"""The benchmarks count what is known; that they run is tested in `tests/soak/test_benchmarks.py`."""

import tarfile

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


def test_throughput_makes_images_anew_for_other_numbers_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "run_tool", lambda *_: None)
    for shards, samples in ((1, 2), (2, 2), (2, 3)):
        words = [f"--output_dir={tmp_path}", f"--shards={shards}", f"--samples_per_shard={samples}"]
        row = throughput.Row("tiny", "lcm", 1, False, [])
        _, flag = throughput.make_inputs(throughput.parse_args(words)[0], row)
        tars = expand_shards(flag.removeprefix("--train_shards_path_or_url="))
        assert [len(tarfile.open(tar).getmembers()) for tar in tars] == [2 * samples] * shards

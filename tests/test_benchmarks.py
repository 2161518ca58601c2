"""The benchmarks count what is known; that they run is tested in `tests/soak/test_benchmarks.py`."""

from tests.benchmarks import synthetic

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

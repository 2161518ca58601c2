"""More updates simulated against real ones, and more real shapes."""

import signal

import train_lcm_distill_lora_sd_wds as lcm_lora
import train_tscd_distill_sd_wds as tscd
from tests.run.test_simulation import (  # noqa: F401
    GIB,
    MORE,
    check_case,
    check_signal,
    command,
    ct_flags,
    data_set,
    direct_flags,
    direct_teacher,
    flags,
    made,
    prompts_file,
    real_shape,
    simulate,
)
from tests.scripts.test_stable_diffusion import launch

import pytest


@pytest.mark.parametrize("case", MORE)
def test_the_peak_is_that_of_a_real_update(tmp_path, command, teacher, case):  # noqa: F811
    check_case(tmp_path, command, teacher, case)


@pytest.mark.parametrize(
    ("which", "cpu", "gpu"), [("none", 26.6, 30.1), ("selective", 22.4, 24.2), ("full", 19.05, 19.3)]
)
def test_sd15_takes_what_docs_performance_says(tmp_path, shards, which, cpu, gpu):
    """Without VAE and text encoder, GiB, by the rules of autocast on a CPU and on a GPU."""
    words = real_shape(tmp_path, shards, "sd15", gradient_checkpointing=which, train_batch_size=12)
    for like_gpu, expected in ((False, cpu), (True, gpu)):
        result = simulate(words, like_gpu=like_gpu)
        others = sum(size for name, size in result.parts.items() if "vae" in name or "text_encoder" in name)
        assert (result.peak - others) / GIB == pytest.approx(expected, rel=0.03)


def test_an_sdxl_lora_fits_24_gb(tmp_path, shards):
    """In CI it would take a half of what all simulations together may."""
    changes = {"gradient_checkpointing": "full", "train_batch_size": 8}
    result = simulate(real_shape(tmp_path, shards, "sdxl", **changes), lcm_lora)
    assert result.card == 24 and "backward" in result.moment and not result.waits


def test_several_processes_simulate_one_of_them(tmp_path, flags):  # noqa: F811
    """The main process goes on alone and waits for none; it says what the buckets of gradients add."""
    result = launch(flags(tmp_path / "out", tscd, dry_run=True), num_processes=2, script=tscd)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("One update, simulated") == 1 and "  gradients  " in result.stdout
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_dry_run_at_once(tmp_path, flags):  # noqa: F811
    check_signal(tmp_path, flags, signal.SIGINT, 130)

"""The benchmark of throughput runs. No test asserts a time."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import synthetic, throughput

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("throughput")


def run(monkeypatch, folder, *words):
    """The benchmark's exit code, on the smallest teacher and few images."""
    sizes = ["--shape=tiny", "--resolution=32", "--batch_size=1", "--warmup=1", "--steps=1"]
    data = ["--shards=1", "--samples_per_shard=16", f"--output_dir={folder}"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *sizes, *data, *words])
    return throughput.main()


def test_throughput_measures_ours_and_a_peer_and_leaves_no_result(folder, tmp_path, monkeypatch, capsys):
    """The peer is our own script under another name; it must not get the flags that are for ours alone."""
    ours = ROOT / throughput.SCRIPTS["lcm"]
    (tmp_path / "peer.py").write_text(f"import runpy\nrunpy.run_path({str(ours)!r}, run_name='__main__')\n")
    words = ["--gradient_accumulation_steps=2", f"--peer={tmp_path / 'peer.py'}", "--", "--loss_type=huber"]
    assert run(monkeypatch, folder, *words) == 0
    assert "times the samples per second of peer (rounds: " in capsys.readouterr().out
    theirs, ours = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    assert ours["flags"] == ["--loss_type=huber"] and theirs["flags"] == [] and theirs["script"] == "peer.py"
    for row in (ours, theirs):
        seconds = row["seconds_per_update"][0]
        assert row["samples_per_second"] == pytest.approx(2 / seconds) and 0 < row["mfu"] < 1 < row["peak_gib"] * 10
        assert {"teacher", "target", "student forward", "backward", "optimizer", "VAE", "EMA"} <= row["stages"].keys()
        assert 0 < sum(row["stages"].values()) < seconds
    assert not list((folder / "runs").rglob("*.safetensors"))  # it leaves when it has measured


def test_a_run_that_fails_is_said_and_fails_the_benchmark(folder, monkeypatch, capsys):
    assert run(monkeypatch, folder, "--", "--nonsense") == 1
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().out
    assert run(monkeypatch, folder, "--minutes=0") == 1
    assert "ours: not measured" in capsys.readouterr().out


def test_consistency_training_is_measured_and_its_objectives_do_the_same_work(tmp_path, monkeypatch):
    """ECT's update of diffusion training, which has no target, lies in the warm-up."""
    for script in ("ict", "ect"):
        words = [f"--script={script}", "--gradient_accumulation_steps=2", "--", "--channels_last"]
        assert run(monkeypatch, tmp_path / "out", *words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert rows[0]["gflops_per_sample"] == rows[1]["gflops_per_sample"]
    for row in rows:
        stages, seconds = row["stages"], row["seconds_per_update"][0]
        assert stages.keys() == {"student forward", "target", "backward", "optimizer", "EMA", "wait for data (host)"}
        assert 0.5 * seconds < sum(stages.values()) < seconds
        assert row["samples_per_second"] == pytest.approx(2 / seconds) and row["script"].startswith("train_cm_ct")


# Attention by its products, which the counter knows; a CPU's fused kernel it does not.
COUNTED = """
import os, runpy, sys
import torch
from torch.optim import optimizer
from torch.utils.flop_counter import FlopCounterMode
torch.backends.cuda.enable_flash_sdp(False)
counter, seen = FlopCounterMode(display=False), [0]
counter.__enter__()
def stepped(*_):
    seen.append(counter.get_total_flops())
    if len(seen) == 4:
        print("counted", seen[-1] - seen[-2], flush=True)
        os._exit(0)
optimizer.register_optimizer_step_post_hook(stepped)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["lcm", "ict", "ect", "direct", "direct_lora"])
def test_an_update_does_the_flops_that_are_reported(script, folder, tmp_path):
    """To a hundredth: of direct distillation it is the pipeline's own call that decides."""
    size = [] if script.startswith("direct") else ["--resolution=32"]
    data = ["--shards=1", "--samples_per_shard=16", "--workers=0", f"--output_dir={folder}"]
    args, _ = throughput.parse_args([f"--script={script}", *size, *data])
    row = throughput.Row("tiny", script, 2, False, [])
    inputs = throughput.make_inputs(args, row)
    words = [*throughput.script_flags(args, row, inputs), f"--output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", COUNTED, throughput.SCRIPTS[script], *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counted = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("counted ")]
    assert counted, done.stderr[-2000:]
    network, resolution = inputs[0].split("=")[1], throughput.resolution_of(args, row)
    assert counted[0] / 2 == pytest.approx(synthetic.step_flops(network, script, resolution), rel=0.01)

"""The benchmark of throughput runs. No test asserts a time."""

import json
import sys
from pathlib import Path

from tests.benchmarks import throughput

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
    assert "times the peer's samples per second" in capsys.readouterr().out
    ours, theirs = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
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

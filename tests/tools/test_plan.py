"""The table of choices, the recommended command and the picture."""

import shlex

import train_direct_distill as direct
import train_lcm_distill_sd_wds as lcm
from common.errors import UserError
from common.run import simulation
from common.tools import plan

import pytest
from PIL import Image

GIB = 2**30


def result(batch, **changes):
    """What an update takes that has 8 GiB of weights and states, and 1 GiB of activations a sample."""
    peaks = {"forward of unet": (8 + batch) * GIB, "optimizer step": 12 * GIB}
    values = {
        "peak": max(peaks.values()), "moment": "forward of unet", "moments": peaks, "parts": {}, "between": 8 * GIB,
        "flops": 10**12 * batch, "waits": {}, "curve": [(size, name) for name, size in peaks.items()],
        "trained": 1, "frozen": 1, "samples": batch, "updates": 100, "processes": 1, "seconds": 1.0,
    }  # fmt: skip
    return simulation.Result(**values | changes)


def test_the_largest_batch_lies_on_the_line_of_the_moment_that_is_largest_there():
    needed = plan.needed_at([result(size) for size in plan.TRIED])
    for batch, peak in ((1, 12), (4, 12), (5, 13), (40, 48)):
        assert needed(batch) == pytest.approx(1.05 * peak + 0.75)
    assert plan.needed_at([result(size) for size in plan.TRIED], 2 * GIB)(40) == pytest.approx(1.05 * 46 + 0.75)


@pytest.mark.parametrize(
    ("batches", "samples", "chosen"),
    [
        ([16, 16, 16], 16, 0),  # the least work
        ([2, 4, 16], 16, 1),  # with a batch of 4 or more
        ([0, 1, 2], 16, 2),  # else the largest batch
        ([2, 2, 2], 2, 0),
        ([0, 0, 0], 16, None),
    ],
)
def test_what_is_recommended(batches, samples, chosen):
    choices = [plan.Choice("full", i == 1, n, 1.0, 1e12 * (1 + i)) for i, n in enumerate(batches)]
    assert plan.recommend(choices, samples) == (None if chosen is None else choices[chosen])


def test_a_plan_of_the_lcm_script(tmp_path, flags, monkeypatch, capsys):
    """A command of 24 samples an update becomes one of the largest batch that divides them; nothing else changes."""
    asked = []

    def simulate(script, words, processes, fsdp2):
        args = lcm.parse_args([*words, "--report_to=none", "--dry_run"])
        asked.append((args.train_batch_size, args.gradient_checkpointing, args.use_8bit_adam, processes))
        return result(args.train_batch_size, between=(6 if args.use_8bit_adam else 8) * GIB)

    monkeypatch.setattr(plan, "simulate", simulate)
    words = flags(tmp_path / "out", train_batch_size=12, gradient_accumulation_steps=2, learning_rate=1e-6)
    words.append("--mixed_precision=fp16")  # planned where there is no GPU
    options = ["--gpu_memory=24", "--processes=2", f"--picture={tmp_path / 'plan.png'}", lcm.__file__]
    chosen, simulated = plan.main(plan.parse_args([*options, *words]))
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 and len({tuple(i for i, c in enumerate(line) if c == "|") for line in table}) == 1
    assert "Recommended, simulated: --train_batch_size=12 --gradient_accumulation_steps=2\n" in out
    assert (chosen.batch, chosen.recomputed, chosen.use_8bit_adam) == (12, "none", False)
    assert len(asked) == 2 * 3 + 1 + 1 and asked[-1] == (12, "none", False, 2) and simulated.samples == 12
    launch = shlex.split(out.strip().split("\n")[-1])
    assert launch[:5] == ["accelerate", "launch", "--multi_gpu", "--num_processes=2", lcm.__file__]
    args = lcm.parse_args([*launch[5:], "--dry_run"])
    assert args.train_batch_size == 12 and args.gradient_accumulation_steps == 2 and args.learning_rate == 1e-6
    hours = 100 * 2 * 12e12 / 3600 / (0.35 * 165e12)
    assert f"100 updates take {hours:.3g} GPU-hours" in out
    assert Image.open(tmp_path / "plan.png").size == (1200, 520)
    with pytest.raises(SystemExit):
        plan.main(plan.parse_args(["--gpu_memory=11", *options[1:], *words]))
    assert "--gpu_memory=11: nothing of the table fits, 11.2" in capsys.readouterr().err
    asked.clear()  # a card that does not hold half of two samples: neither four are tried, nor what needs more
    with pytest.raises(SystemExit):
        plan.main(plan.parse_args(["--gpu_memory=4", *options[1:], *words]))
    assert [which for _, which, _, _ in asked] == ["full", "none"]
    assert "11.2 GiB are needed for 2 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no_script.py"], "no_script.py: there is no such script"),
        ([lcm.__file__, "--gpu_memory=24"], "--gpu_memory=24 is no flag of"),
        (["--mfu=0", lcm.__file__], "--mfu=0: a run reaches some share"),
        (["--picture=/no/folder/x.png", lcm.__file__], "--picture=/no/folder/x.png: name a .png file"),
        ([lcm.__file__, "--nonsense"], "--pretrained_teacher_model"),
    ],
)
def test_mistakes_end_in_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main(plan.parse_args(words))
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_the_ways_out_are_flags_that_the_script_has():
    words = ["--pretrained_teacher_model=t", "--output_dir=o"]
    args = direct.parse_args([*words, "--pairs_dir=p", "--lora_rank=0"])
    one = plan.parse_args([lcm.__file__])
    eight = plan.parse_args(["--processes=8", lcm.__file__])
    assert plan.ways_out(one, args) == ["--backward=stepwise", "a LoRA"]
    assert plan.ways_out(eight, args) == ["--backward=stepwise", "--fsdp2 before the script", "a LoRA"]
    args = lcm.parse_args([*words, "--train_shards_path_or_url=s.tar"])
    assert plan.ways_out(one, args) == ["a LoRA", "a lower --resolution"]


@pytest.mark.parametrize("refuses", [False, True])
def test_levers_beyond_the_table_are_tried_where_nothing_fits(tmp_path, monkeypatch, capsys, refuses):
    """Of a LoRA, in this order; what is refused is said, and the command has what made it fit."""

    def simulate(script, words, processes, fsdp2):
        args = direct.parse_args([*words, "--report_to=none"])
        if args.quantize_base and refuses:
            raise SystemExit("no kernel")
        less = 10 * (args.backward == "stepwise") + 20 * bool(args.quantize_base)
        peaks = {"backward": (40 - less + args.train_batch_size) * GIB}
        curve = [(size, name) for name, size in peaks.items()]
        return result(args.train_batch_size, moments=peaks, peak=max(peaks.values()), curve=curve)

    monkeypatch.setattr(plan, "simulate", simulate)
    options = [f"--picture={tmp_path / 'plan.png'}", direct.__file__, "--pretrained_teacher_model=t", "--pairs_dir=p"]
    options += [f"--output_dir={tmp_path}", "--max_train_steps=9"]
    if refuses:
        with pytest.raises(SystemExit):
            plan.main(plan.parse_args(options))
        said = capsys.readouterr()
        assert "--quantize_base=nf4 is refused" in said.out and "use a larger card" in said.err
        return
    plan.main(plan.parse_args(options))
    out = capsys.readouterr().out
    assert out.index("None fits; with --backward=stepwise") < out.index("None fits; with --quantize_base=nf4")
    args = direct.parse_args(shlex.split(out.strip().split("\n")[-1])[4:])
    assert args.backward == "stepwise" and args.quantize_base == "nf4" and args.train_batch_size > 1
    one, split = plan.parse_args([lcm.__file__]), plan.parse_args(["--processes=8", "--fsdp2", lcm.__file__])
    assert plan.further_levers(one, args) == [] == plan.further_levers(split, args)
    args.quantize_base = None
    assert plan.further_levers(one, args) == ["--quantize_base=nf4"] and plan.further_levers(split, args) == []


def test_what_is_no_training_script_is_said(tmp_path):
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="other.py is no training script"):
        plan.load_script(tmp_path / "other.py")

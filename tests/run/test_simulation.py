"""Updates simulated on tensors without memory, against real ones under the same counter, and at real shapes."""

import copy
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import train_lcm_distill_lora_sd_wds as lcm_lora
import train_lcm_distill_sd_wds as lcm
import train_tscd_distill_sd_wds as tscd
from common.networks import lora, teachers
from common.run import meter, screen, simulation, stand_ins
from tests.benchmarks import synthetic, what_fits
from tests.cases import SCRIPTS, as_words, launch, train
from tests.fork_server import run_processes
from tests.tools.test_encode_shards import ask

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig

GIB = 2**30


def simulate(words, script=lcm, **wishes):
    """The result of a dry run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with simulation.wishing(**{"report": False} | wishes):
        return script.main(script.parse_args(words))


# --- against real memory


BF16 = {"mixed_precision": "bf16"}
STAGE_SCORE = {"score_weights": "0.3,0", "fake_updates": 2, "fake_lora_rank": 4}
ROWS = {
    "lcm, accumulation, selective": (
        "lcm",
        BF16 | {"gradient_accumulation_steps": 2, "gradient_checkpointing": "selective"},
    ),
    "tscd LoRA, frozen discriminator": ("tscd_lora", BF16 | {"freeze_discriminator_backbone": True}),
    "ct, 8-bit": ("ct", {"use_8bit_adam": True}),
    "direct LoRA, stepwise": ("direct", BF16 | {"lora_rank": 4, "lora_dropout": 0.3, "backward": "stepwise"}),
}
LONG_ROWS = {
    "lcm, cached latents": ("lcm", {"train_shards_path_or_url": "cached"}),
    "direct LoRA, full": ("direct", {"lora_rank": 8, "gradient_checkpointing": True, **BF16}),
    "lcm LoRA, channels_last": ("lcm_lora", BF16 | {"channels_last": True}),
    "tscd": ("tscd", {}),
    "lcm": ("lcm", {}),
    "lcm, 8-bit, full": ("lcm", BF16 | {"use_8bit_adam": True, "gradient_checkpointing": True}),
    "lcm LoRA, SDXL, 8-bit": ("lcm_lora", BF16 | {"use_8bit_adam": True, "pretrained_teacher_model": "sdxl"}),
    "tscd LoRA, a score of k = 2": ("tscd_lora", STAGE_SCORE | BF16 | {"gradient_checkpointing": True}),
    "tscd, a score by a LoRA on the teacher": (
        "tscd",
        STAGE_SCORE | BF16 | {"adv_weights": 0, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ),
    "tscd, a score by a copy": ("tscd", STAGE_SCORE | {"fake_lora_rank": 0}),
    "tscd, no discriminator, accumulation": ("tscd", {"adv_weights": 0, "gradient_accumulation_steps": 3}),
    "ct, ECT": ("ct", {"objective": "ect", "pretrain_steps": 1, "discretization_s_1": None}),
    "direct LoRA, int8": ("direct", {"lora_rank": 8, "quantize_base": "int8", **BF16}),
    "direct, stepwise, full": ("direct", {"backward": "stepwise", "gradient_checkpointing": True, **BF16}),
    "direct LoRA, stepwise, accumulation": (
        "direct",
        {"lora_rank": 4, "backward": "stepwise", "gradient_accumulation_steps": 2, **BF16},
    ),
    "direct, average": ("direct", {"ema_decay": 0.9, "gradient_accumulation_steps": 1}),
    "direct, LoRA and score": ("direct", {"lora_rank": 4, "score_weight": 1, "fake_updates": 2, **BF16}),
    "direct, score on a copy": ("direct", {"score_weight": 1, "fake_updates": 1, "fake_lora_rank": 4, **BF16}),
    "direct, score of a copy, adversary": (
        "direct",
        {"score_weight": 1, "fake_updates": 1, "fake_lora_rank": 0, "adv_weight": 1},
    ),
}


def no_values(mode, func, *_):
    raise AssertionError(f"{func} has no fake form: it would run with values, and take their memory")


@pytest.mark.parametrize(
    ("name", "changes"),
    [*ROWS.values(), *(pytest.param(*row, marks=pytest.mark.soak) for row in LONG_ROWS.values())],
    ids=[*ROWS, *LONG_ROWS],
)
def test_the_peak_is_that_of_a_real_update(tmp_path, command, teacher, shards, monkeypatch, name, changes):
    """The same update, real and simulated by the rules of a CPU: peak, operations and what is alive in between."""
    monkeypatch.setattr(torch._subclasses.fake_tensor, "run_fallback_kernel", no_values)
    if "pretrained_teacher_model" in changes:
        changes = changes | {"pretrained_teacher_model": teacher(changes["pretrained_teacher_model"])}
    if changes.get("train_shards_path_or_url") == "cached":
        ask(shards, tmp_path / "cached", teacher(), resolution=16)
        changes = changes | {"train_shards_path_or_url": tmp_path / "cached"}
    words, results = command(name, tmp_path / "out", dry_run=True, report_to="none", **changes), []
    for fake in (False, True):
        gc.collect()
        results.append(simulate(words, SCRIPTS[name], fake=fake, like_gpu=False))
    real, simulated = results
    assert simulated.peak == pytest.approx(real.peak, rel=0.01) and simulated.moment == real.moment
    assert simulated.between == pytest.approx(real.between, rel=0.01)
    assert simulated.flops == real.flops and sum(simulated.parts.values()) == simulated.peak
    assert ("discriminator" in str(simulated.parts)) == ("tscd" in name and changes.get("adv_weights") != 0)
    assert simulated.waits == real.waits and all("(in diffusers)" in line for line in simulated.waits)
    assert not (tmp_path / "out").exists()
    if name in ("lcm", "direct"):  # what plan tries
        one = simulate(words, SCRIPTS[name], updates=1, like_gpu=False)
        assert one.peak == pytest.approx(simulated.peak, rel=0.01) and one.flops == simulated.flops


def tiny_qwen(folder, width):
    """The flags of a direct distillation of a tiny Qwen-Image, configurations alone. width: of its text encoder."""
    teacher, heads = what_fits.TEACHERS["qwen"](), {"num_attention_heads": width // 8, "num_key_value_heads": 1}
    text = what_fits.QWEN_TEXT | heads | {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1}
    text |= {"vocab_size": 512, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = what_fits.QWEN_VISION | {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"intermediate_size": 16})
    denoiser = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    networks = teacher.networks | {"text_encoder": (teacher.networks["text_encoder"][0], config)}
    cls, values = networks["transformer"]
    networks["transformer"] = cls, values | denoiser | {"joint_attention_dim": width}
    networks["vae"] = networks["vae"][0], {"base_dim": 8}
    what_fits.write_teacher(folder, teacher._replace(networks=networks, latents=(16, 64)), size=64)
    values = BF16 | {"pretrained_teacher_model": folder / "teacher", "pairs_dir": folder / "pairs", "lora_rank": 4}
    values |= {"output_dir": folder / "out", "gradient_checkpointing": True, "dry_run": True, "report_to": "none"}
    return as_words(values | {"max_train_steps": 9, "train_batch_size": 2, "num_inference_steps": 2})


def test_what_is_not_asked_again_is_the_same(tmp_path, monkeypatch, request):
    """Operations on arguments of one form, calls of a check in one form, its backward pass: all is as without. Of the
    events only their number, for storages that end together do so in any order."""
    words, backward = tiny_qwen(tmp_path, 16), torch.autograd.backward
    request.addfinalizer(gc.enable)
    gc.disable()  # when it collects, storages end
    quick = simulate(words, SCRIPTS["direct"], updates=1)
    monkeypatch.setattr(meter, "_form", lambda *_: None)
    monkeypatch.setattr(stand_ins, "remembered", lambda call, may: call)
    monkeypatch.setattr(stand_ins, "reach", backward)
    slow = simulate(words, SCRIPTS["direct"], updates=1)
    assert len(quick.curve) == len(slow.curve) > 1000
    before = [result.moments.pop(simulation.BEFORE) for result in (quick, slow)]
    assert before[0] == pytest.approx(before[1], rel=1e-3)  # in a call that one of them did not make
    assert quick._replace(seconds=0, curve=[]) == slow._replace(seconds=0, curve=[])


def test_the_start_counts_where_text_encoders_take_more_than_an_update(tmp_path):
    small, large = (simulate(tiny_qwen(tmp_path / str(n), n), SCRIPTS["direct"], updates=1) for n in (16, 1024))
    assert small.moment != simulation.BEFORE and simulation.BEFORE in small.moments
    weights = large.parts["weights of text_encoder, frozen"]
    assert large.moment == simulation.BEFORE and large.peak == large.moments[simulation.BEFORE] > weights > 2 * 2**20
    assert sum(large.parts.values()) == large.peak and large.moment == simulation.BEFORE
    assert max(size for size, _ in large.curve) < large.peak - weights / 2  # which are let go
    assert not any("transformer" in part for part in large.parts)  # which comes to the card afterwards


def test_a_score_on_the_students_base_adds_an_adapter(tmp_path):
    """Two scores and their training take no second base: at most 1.25 times the regression's peak, here and, as a
    soak, of 20 billion weights."""
    words = tiny_qwen(tmp_path, 64)
    own = ["--score_weight=1", "--fake_updates=1"]
    alone, both, opposed = (
        simulate([*words, *own], SCRIPTS["direct"], updates=1) for own in ([], own, [*own, "--adv_weight=0.1"])
    )
    # the fake score's adapter, of which no tensor is frozen for want of a gradient
    assert 2 * alone.trained <= both.trained < 2.3 * alone.trained and both.frozen == alone.frozen and not both.waits
    assert both.parts["optimizer states"] == pytest.approx(2 * alone.parts["optimizer states"], rel=0.2)
    assert alone.peak < both.peak < opposed.peak < 1.25 * alone.peak and both.flops > 1.5 * alone.flops


@pytest.mark.soak
@pytest.mark.parametrize("shape", ["qwen", "flux"])
def test_a_score_of_12_and_20_billion_weights_takes_a_quarter_more_at_most(tmp_path, shape):
    alone, both = (
        max(what_fits.one_sample(tmp_path, shape, f"LoRA, stepwise{more}").values()) for more in ("", ", score")
    )
    print(f"{shape}: {both / 1e9:.1f} GB, {both / alone:.2f} times the regression's", flush=True)
    assert both < 1.25 * alone


@pytest.mark.soak
@pytest.mark.parametrize(
    ("shape", "method", "most"),
    [
        ("qwen", "all weights, stepwise, FSDP2 on 8", 65),
        ("qwen", "LoRA, stepwise", 55),
        ("qwen", "LoRA, stepwise, 8-bit Adam", 50.1),
        ("qwen", "LoRA, stepwise, nf4", 24),
        ("qwen", "LoRA, stepwise, nf4, 8-bit Adam", 20),
        ("flux", "all weights, stepwise, FSDP2 on 8", 40),
        ("flux", "LoRA, stepwise", 35),
        ("flux", "LoRA, stepwise, nf4, 8-bit Adam", 16),
    ],
)
def test_teachers_of_12_and_20_billion_weights_fit(tmp_path, shape, method, most):
    """GB at the peak of an update of one sample of 1024 px. Text encoders, alone on the card before it, take less."""
    moments = what_fits.one_sample(tmp_path, shape, method)
    print(what_fits.one_row(shape, method, moments), flush=True)
    assert max(moments.values()) < most * 1e9


# --- at real shapes


def real_shape(folder, shards, shape, **changes):
    synthetic.write_configurations(folder / shape, synthetic.SHAPES[shape])
    values = {
        "pretrained_teacher_model": folder / shape, "train_shards_path_or_url": shards, "output_dir": folder / "out",
        "resolution": synthetic.SHAPES[shape].resolution, "mixed_precision": "bf16", "max_train_steps": 1000,
        "report_to": "none", "dry_run": True,
    } | changes  # fmt: skip
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items()]


def test_sd15_fits_24_gb_and_its_update_waits_for_nothing(tmp_path, shards, monkeypatch):
    """859,520,964 parameters, and the embedding of w; 5,947 G a sample, and what is recomputed, 23 % of 2,407 G."""
    monkeypatch.setattr(torch._subclasses.fake_tensor, "run_fallback_kernel", no_values)
    changes = {"gradient_checkpointing": "full", "use_8bit_adam": True, "train_batch_size": 12}
    result = simulate(real_shape(tmp_path, shards, "sd15", **changes), updates=1)
    assert result.card == 24 and 14 * GIB < result.peak < 16 * GIB and not result.waits
    assert result.trained == 859_520_964 + 320 * 256
    assert result.flops / 12 == pytest.approx(5947e9 + 0.23 * 2407e9, rel=0.02)
    assert result.parts["optimizer states"] == pytest.approx(2 * result.trained, rel=0.03)
    assert result.between == pytest.approx(result.trained * 10 + 859_520_964 * 2 + 0.39 * GIB, rel=0.01)


@pytest.mark.soak
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


@pytest.mark.soak
def test_an_sdxl_lora_fits_24_gb(tmp_path, shards):
    changes = {"gradient_checkpointing": "full", "train_batch_size": 8}
    result = simulate(real_shape(tmp_path, shards, "sdxl", **changes), lcm_lora)
    assert result.card == 24 and "backward" in result.moment and not result.waits


# --- what several processes take


def test_several_processes_keep_buckets_and_fsdp2_a_part_of_16_bytes_a_weight(tmp_path, flags, monkeypatch):
    words = flags(tmp_path / "out", dry_run=True)
    one, two = (simulate(words, processes=n, updates=1) for n in (1, 2))
    trained = 4 * one.trained
    assert two.between - one.between == pytest.approx(trained, rel=0.01)
    assert two.parts["gradients"] == pytest.approx(trained, rel=0.01)
    assert two.peak - one.peak < trained  # one process has gradients at its peak too
    result = simulate(words, processes=4, fsdp2=True, updates=1)
    assert result.parts["FSDP2's part of gradients and states"] == pytest.approx(12 * one.trained / 4, rel=0.01)
    # student and target, and the teacher, which has no embedding of w; small ones take blocks of 512 bytes
    held = result.parts["FSDP2's part of the weights of a UNet2DConditionModel"]
    assert 3 * 4 * one.trained / 4 * 0.95 < held < 3 * 4 * one.trained / 4 * 1.3
    assert not {"optimizer states", "gradients"} & result.parts.keys() and result.between < one.between


def test_fsdp2_splits_an_average_too(tmp_path, command):
    words = command("direct", tmp_path / "out", dry_run=True)
    result = simulate(words, SCRIPTS["direct"], processes=8, fsdp2=True, updates=1)
    held = result.parts["FSDP2's part of ema_weights"]  # of float32, in blocks of 512 bytes
    assert 4 * result.trained / 8 <= held < 4 * result.trained / 8 * 2


REAL = """
import json, os
from common.run import simulation
simulation._wishes.update(fake=False, report=False)
result = simulation._Simulation._result
def noted(self):
    got = result(self)
    open({path!r} + os.environ["RANK"], "w").write(json.dumps([got.peak, got.between, got.flops]))
    return got
simulation._Simulation._result = noted
"""


@pytest.mark.soak
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_peak_is_that_of_a_real_update_of_two_processes(tmp_path, flags, accumulation):
    words = flags(tmp_path / "out", dry_run=True, gradient_accumulation_steps=accumulation)
    done = run_processes(words, lcm, 2, REAL.format(path=str(tmp_path / "rank")))
    assert done.returncode == 0, done.stderr
    simulated = simulate(words, processes=2, like_gpu=False)
    for rank in range(2):
        peak, between, flops = json.loads((tmp_path / f"rank{rank}").read_text())
        assert simulated.peak == pytest.approx(peak, rel=0.01)
        assert simulated.between == pytest.approx(between, rel=0.01) and simulated.flops == flops


@pytest.mark.soak
def test_several_processes_simulate_one_of_them(tmp_path, flags):
    """The main process goes on alone and waits for none; it says what the buckets of gradients add."""
    result = launch(flags(tmp_path / "out", tscd, dry_run=True), num_processes=2, script=tscd)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("One update, simulated") == 1 and "  gradients  " in result.stdout
    assert not (tmp_path / "out").exists()


# --- what it says


def edited(tmp_path, old, new, loads=True):
    """A copy of the LCM script with a line changed, imported if it is to be."""
    text = Path(lcm.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / "edited.py").write_text(text.replace(old, new))
    if not loads:
        return None
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOSS = "            loss = distance(model_pred, target, args.loss_type, args.huber_c)\n"


@pytest.mark.parametrize(
    ("line", "ends"), [("assert loss.item() > 0", False), ("loss = loss + model_pred[model_pred > 0].sum()", True)]
)
def test_an_update_that_waits_for_the_device_is_said(tmp_path, flags, capsys, line, ends):
    script = edited(tmp_path, LOSS, f"{LOSS}            {line}\n")
    words = flags(tmp_path / "out", dry_run=True)
    if ends:
        with pytest.raises(SystemExit) as stopped:
            train(words, script)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and "--dry_run cannot go on at " in err and line in err
    else:
        train(words, script)
        out = capsys.readouterr().out
        assert "WARNING: 1 times an update" in out and f": {line}\n" in out
        assert "the update waits for the device in line" in out
    assert not simulation.is_on() and not (tmp_path / "out").exists()
    assert torch.randn(2).tolist()  # tensors have values again


def test_flags_that_need_a_gpu_or_values_are_simulated_without(tmp_path, flags, capsys, teacher):
    unet = teachers.load_teacher(teacher()).unet
    lora.add_lora(unet, 4, 6.0)
    lora.save_lora(tmp_path / "lora", unet)
    changes = {"mixed_precision": "fp16", "compile": True, "init_lora": tmp_path / "lora"}
    train(flags(tmp_path / "out", lcm_lora, dry_run=True, **changes), lcm_lora)
    out = capsys.readouterr().out
    assert "fp16 needs a GPU, so what is simulated is bf16" in out and "is the smallest that holds" in out


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"block_out_channels": [30, 60]}, "(Must provide the same number of `block_out_channels`"),
        ("unet", {"block_out_channels": ["wide"] * 4}, "unet/config.json describes no UNet2DConditionModel"),
        ("text_encoder", {"hidden_size": 33}, "a part of the teacher is missing or unreadable"),
    ],
)
def test_a_wrong_configuration_ends_in_one_sentence(tmp_path, flags, teacher, capsys, part, changes, words):
    folder = tmp_path / "teacher"
    synthetic.write_configurations(folder, synthetic.SHAPES["tiny"])
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(flags(tmp_path / "out", dry_run=True, pretrained_teacher_model=folder, resolution=128))
    err = capsys.readouterr().err.split("\r")[-1]
    assert stopped.value.code == 2 and "--pretrained_teacher_model=" in err and words in err, err


def test_a_teacher_of_another_form_takes_the_same(tmp_path, flags, teacher, monkeypatch, capsys):
    """One file; a variant; configurations alone, which are said, and are not enough for the run itself."""
    expected, folder = simulate(flags(tmp_path / "out", dry_run=True)), tmp_path / "teacher"
    pipeline = teachers.load_teacher(teacher())
    pipeline.save_pretrained(folder, variant="fp16")
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    copies = [copy.deepcopy(pipeline) for _ in range(3)]  # as if read from the file, at the check too
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", lambda *_, **__: copies.pop())
    variant = {"pretrained_teacher_model": folder, "variant": "fp16"}

    def check(**changes):
        result = simulate(flags(tmp_path / "out", dry_run=True, **changes))
        assert result.peak == pytest.approx(expected.peak, rel=0.002)  # a table of positions may be made before
        assert list(result.parts) == list(expected.parts) and result.flops == expected.flops

    check(pretrained_teacher_model=tmp_path / "teacher.safetensors")
    *others, last = folder.rglob("*.safetensors")
    for path in others:
        path.unlink()
    with pytest.raises(SystemExit):  # a part alone has none
        simulate(flags(tmp_path / "out", dry_run=True, **variant))
    last.unlink()
    assert "holds no weights" not in capsys.readouterr().out
    check(**variant)
    assert "holds no weights; `dry_run` needs none" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train(flags(tmp_path / "out", **variant))
    assert "no weights of the variant" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.soak
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_ends_a_dry_run_at_once(tmp_path, flags, number, code):
    line = f"import os; os.kill(os.getpid(), {int(number)}); raise AssertionError('it went on')"
    edited(tmp_path, LOSS, f"{LOSS}            {line}\n", loads=False)
    words = [sys.executable, str(tmp_path / "edited.py"), *flags(tmp_path / "out", dry_run=True)]
    root = str(Path(lcm.__file__).parent)
    result = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert result.returncode == code and "it went on" not in result.stderr and "checkpoint" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_progress_is_shown_and_cards_have_an_order(tmp_path, flags, capsys, monkeypatch):
    shown = {"disable": False, "mininterval": 0}  # as on a terminal
    monkeypatch.setattr(simulation, "tqdm", lambda **options: tqdm(**options | shown))
    result = simulate(flags(tmp_path / "out", dry_run=True), report=True)
    assert "simulating: update 2 of 2, backward" in capsys.readouterr().err
    assert result.card == 12 and result._replace(peak=30 * GIB).card == 40
    assert result._replace(peak=200 * GIB).card is None
    assert "none of 12" in screen.simulated("plan", result._replace(peak=200 * GIB))["plan"]["card"]
    assert max(size for size, _ in result.curve) == result.peak

"""The demo's data, models and report."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import train_cm_ct_unconditional as ct
from common.ct.data import open_images
from common.errors import UserError
from common.tools.demo import __main__ as demo
from common.tools.demo import consistency as ct_demo
from common.tools.demo import digits, dit, measuring, stable_diffusion
from tests.cases import one_sentence, train

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer


@pytest.fixture(scope="module")
def shard_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    digits.write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    digits.save_tokenizer_files(digits.build_tokenizer(), folder)
    return folder


def test_the_split_is_fixed_and_stratified():
    (train_images, train_labels), (held_out_images, held_out_labels) = digits.load_split()
    assert train_images.shape == (1437, 16, 16, 3) and held_out_images.shape == (360, 16, 16, 3)
    assert train_images.dtype == np.uint8 and train_images.max() == 255 and train_images.min() == 0
    assert np.bincount(train_labels).min() >= 139 and np.bincount(held_out_labels).min() >= 34


def test_shards_have_the_same_bytes_every_time(shard_dir, tmp_path):
    digits.write_shards(tmp_path)
    names = sorted(path.relative_to(shard_dir) for path in shard_dir.rglob("*") if path.is_file())
    assert len(names) == 2 * (digits.NUM_TRAIN_SHARDS + digits.NUM_HELD_OUT_SHARDS) + 1
    for name in names:
        assert (shard_dir / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_tokenizer_knows_each_word_of_the_captions(tokenizer_dir):
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    for template in digits.TEMPLATES:
        for word in digits.WORDS:
            caption = template.format(word)
            ids = tokenizer(caption).input_ids
            assert len(ids) == 2 + len(caption.replace(",", " ,").split()), caption
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == caption


def test_the_small_sdxl_is_told_what_its_pipeline_tells_it():
    """The U-Net's arguments in training are those of the pipeline at its default size; no caption is zeros."""
    torch.manual_seed(0)
    vae, calls = stable_diffusion.train_vae(torch.zeros(64, 3, 16, 16), steps=1), []
    pipeline = stable_diffusion.untrained_pipeline(vae, "epsilon", (16, 32), sdxl=True)
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    captions = [*digits.canonical_prompts(10), ""]
    token_ids = [
        stable_diffusion.tokenize(tokenizer, captions) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    encoders = [pipeline.text_encoder.eval(), pipeline.text_encoder_2.eval()]
    with torch.no_grad():
        told = stable_diffusion.condition(encoders, token_ids, torch.tensor([10, 10, 3, 7]))
    pipeline([captions[3], captions[7]], num_inference_steps=1, guidance_scale=2.0, output_type="latent")
    torch.testing.assert_close(told["encoder_hidden_states"], calls[0]["encoder_hidden_states"])
    added = calls[0]["added_cond_kwargs"]
    torch.testing.assert_close(told["added_cond_kwargs"]["text_embeds"], added["text_embeds"])
    assert torch.equal(told["added_cond_kwargs"]["time_ids"].float(), added["time_ids"])


def test_latents_are_standard_and_standardizing_changes_no_image(teacher):
    pixels = digits.to_tensor(digits.load_split()[0][0])[:300]
    torch.manual_seed(0)
    vae = StableDiffusionPipeline.from_pretrained(teacher()).vae
    vae.quant_conv.bias.data += 1.0
    vae.quant_conv.weight.data[1] *= 3.0
    with torch.no_grad():
        before = vae.decode(stable_diffusion.encode(vae, pixels)[0]).sample
        stable_diffusion.standardize_latents(vae, pixels)
        mean, std = stable_diffusion.encode(vae, pixels)
        after = vae.decode(mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    latents = (mean + std * torch.randn_like(mean)) * vae.config.scaling_factor
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.03 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.03


def test_classifier_is_read_as_a_feature_network(classifier):
    judge = measuring.Judge(classifier)
    assert judge.train_features.shape == (1437, 64)
    for captions in (digits.PARITY, digits.NAMED):
        scores = judge.held_out(captions)
        assert scores["frechet_distance"] > 0 and 0 <= scores["prompt_accuracy"] <= 1
        assert 1 <= scores["classes"] <= len(captions.digits[0])


def fake_results(path, steps, distance):
    same = {"frechet_distance_std": 0.01, "prompt_accuracy": 0.99, "classes": 4.9, "confidence": 0.9}
    rows = [same | {"steps": n, "frechet_distance": distance / n, "seconds_per_image": 0.002 * n} for n in steps]
    results = {"guidance_scale": 2.0, "num_sets": 3, "set_size": 360, "batch_size": 60, "threads": 1}
    results["held_out"] = {"frechet_distance": 0.27, "prompt_accuracy": 1.0, "classes": 5.0, "confidence": 0.94}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results | {"rows": rows}))
    np.save(path.with_suffix(".npy"), np.full((len(steps), 10, 16, 16, 3), 128, np.uint8))


def test_report_holds_every_method_that_was_measured(tmp_path, capsys):
    fake_results(tmp_path / "teacher_metrics", measuring.TEACHER_STEPS, 1.0)
    demo.write_report(tmp_path)
    teacher_only = (tmp_path / "report.md").read_text()
    fake_results(tmp_path / "lcm" / "metrics", measuring.STUDENT_STEPS, 2.0)
    fake_results(tmp_path / "teacher_parity_metrics", [50], 50.0)
    demo.write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert teacher_only.count("\n| ") == 2 + 5 and report.count("\n| ") == 2 + 5 + 3 + 2 + 1
    assert "| lcm | 4 | 0.50 ± 0.01 | 0.990 | 4.90 | 0.900 | 0.0080 |" in report
    assert '"a photo of an even digit" to "a photo of an odd digit". 5 digits fit each.' in report
    assert (
        report.count("| held-out digits |  | 0.27 | 1.000 | 5.00 | 0.940 |  |") == 2
        and "3 sets of 360 samples" in report
        and "CC BY 4.0" in report
        and "lcm 2" in report
    )
    width, height = Image.open(tmp_path / "report.png").size
    assert width > 480 and height > 8 * 48
    assert "report.png" in capsys.readouterr().out


def test_parts_are_built_once_and_never_half(tmp_path, capsys):
    def build(folder):
        folder.mkdir()
        (folder / "weights").write_text("whole")

    def fail(folder):
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measuring.build_once(tmp_path / "part", fail)
    assert not (tmp_path / "part").exists()
    measuring.build_once(tmp_path / "part", build)
    measuring.build_once(tmp_path / "part", fail)
    assert (tmp_path / "part" / "weights").read_text() == "whole" and not (tmp_path / "part.tmp").exists()
    assert "reused" in capsys.readouterr().out


def test_what_runs_beside_the_demo_is_waited_for_and_its_failure_is_told(tmp_path):
    with measuring.beside(Path.write_text, tmp_path / "made", "text"):
        assert not (tmp_path / "made").exists()  # its process has to import torch first
    assert (tmp_path / "made").read_text() == "text"
    with measuring.beside(lambda path, make: make(), tmp_path / "made", lambda: None):  # there: here, so no pickle
        pass
    with pytest.raises(UserError, match="exit code 1"), measuring.beside(Path.write_text, tmp_path / "no" / "f", ""):
        pass


def test_rebuild_removes_the_demos_files_only(tmp_path, capsys):
    folder = tmp_path / "demo"
    demo.open_output_dir(folder, seed=0, rebuild=False)
    fake_results(folder / "teacher_metrics", [4], 1.0)
    fake_results(folder / "lcm" / "metrics", [4], 1.0)
    (folder / "notes.txt").write_text("mine")
    demo.open_output_dir(folder, seed=1, rebuild=True)
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "notes.txt"]

    assert "--seed=1" in one_sentence(capsys, demo.main, demo.parse_args([f"--output_dir={folder}", "--seed=2"]))
    assert "no demo" in one_sentence(capsys, demo.main, demo.parse_args([f"--output_dir={tmp_path}"]))
    assert "cannot be written to" in one_sentence(
        capsys, demo.main, demo.parse_args([f"--output_dir={folder / 'notes.txt'}"])
    )


@pytest.mark.parametrize("method", list(demo.METHODS))
def test_the_command_names_a_script_and_flags_that_it_has(method, tmp_path, monkeypatch):
    monkeypatch.chdir(measuring.ROOT)
    recipe, teacher = demo.METHODS[method], measuring.TEACHERS["parity"]
    more = {"init_student": recipe["start"]} if "start" in recipe else {}
    command = demo.training_command(
        recipe, teacher, tmp_path / "teacher", tmp_path / "train", tmp_path / "student", 3, more
    )
    start = command.index(recipe["script"])
    assert (measuring.ROOT / recipe["script"]).is_file()
    script = __import__(recipe["script"].removesuffix(".py"))
    args = script.parse_args(command[start + 1 :])
    data = (
        args.pairs_dir
        if recipe["script"] == demo.DIRECT["script"]
        else args.train_shards_path_or_url.removesuffix("/{00000..00007}.tar")
    )
    assert args.seed == 3 and args.resume_from_checkpoint is None and data == str(tmp_path / "train")
    if recipe["script"] == demo.DIRECT["script"]:
        assert args.init_student == recipe.get("start")
    else:
        assert (args.w_min, args.w_max) == ((0.0, 1.0) if method == "lcm" else (0.5, 0.5))
    (tmp_path / "student" / "checkpoint-100").mkdir(parents=True)
    command = demo.training_command(
        recipe, teacher, tmp_path / "teacher", tmp_path / "train", tmp_path / "student", seed=3
    )
    assert command[-1] == "--resume_from_checkpoint=latest"


def test_the_dit_teacher_is_for_direct_distillation_alone(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.parse_args(["--teacher=dit", "--method=lcm"])
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and "--teacher=dit has no U-Net and --method=lcm needs one" in err
        and err.count("\n") == 1
    )
    for method in ("direct", "direct_8", "direct_lora"):
        assert demo.parse_args(["--teacher=dit", f"--method={method}"]).method == method


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method=ct", "--teacher=dit"], "--teacher: --method=ct has no teacher; drop it"),
        (["--method=ct", "--teacher_only"], "--teacher_only: --method=ct has no teacher; drop it"),
        (["--method=tscd", "--teacher_only"], "--method: --teacher_only trains no student; drop one of them"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(words, sentence, capsys):
    assert sentence in one_sentence(capsys, demo.parse_args, words, alone=True)


def test_a_demo_that_is_damaged_or_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "demo.json").write_text("[]")
    for folder, sentence in (
        (tmp_path, "demo.json cannot be read; add --rebuild"),
        ("/proc/x", "cannot be written to"),
    ):
        assert sentence in one_sentence(
            capsys, demo.main, demo.parse_args([f"--output_dir={folder}", "--teacher_only"]), alone=True
        )


def test_the_dit_teacher_is_an_sd3_checkpoint_and_its_words_are_tokens(direct_teacher):
    pipeline = DiffusionPipeline.from_pretrained(direct_teacher("dit"))
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline" and pipeline.scheduler.config.shift == 3.0
    for template in digits.TEMPLATES:
        for word in digits.WORDS:
            caption = template.format(word)
            t5 = pipeline.tokenizer_3(caption).input_ids
            assert len(t5) <= dit.T5_LENGTH and pipeline.tokenizer_3.unk_token_id not in t5
            assert len(pipeline.tokenizer(caption).input_ids) <= dit.TEXT_LENGTH == pipeline.tokenizer_max_length
    images = measuring.sample(pipeline, ["a three", "a four"], 2, 2.0, torch.Generator().manual_seed(0))
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8


def test_the_loss_of_the_dit_teacher_is_flow_matching(monkeypatch):
    """What its transformer is trained to say is what FlowMatchEulerDiscreteScheduler integrates: dz/dsigma."""
    torch.manual_seed(0)
    pipeline = dit.untrained_pipeline(stable_diffusion.train_vae(torch.zeros(8, 3, 16, 16), steps=1), layers=1)
    pipeline.vae.register_to_config(shift_factor=0.0)
    seen = []

    def watched(prediction, target):
        seen.append(target)
        return (prediction - target).square().mean()

    monkeypatch.setattr(dit.F, "mse_loss", watched)
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    images, labels = digits.load_split()[0]
    dit.train_transformer(pipeline, digits.to_tensor(images[:64]), torch.from_numpy(labels[:64]), 1, 4, 1e-3)
    hook.remove()
    (inputs, target), scheduler = seen, pipeline.scheduler
    for z, t, velocity in zip(inputs["hidden_states"], inputs["timestep"], target, strict=True):
        scheduler.set_timesteps(sigmas=[t.item() / 1000], mu=None)
        scheduler.sigmas[0] = t / 1000
        end = scheduler.step(velocity, scheduler.timesteps[0], z).prev_sample  # to sigma = 0
        assert torch.allclose(end + t / 1000 * velocity, z, atol=1e-5) and end.std() < z.std() + 1.0
        assert (end + velocity).std() == pytest.approx(1.0, abs=0.3)  # at sigma = 1: the noise


def test_every_stages_model_is_measured_at_its_own_number_of_steps(tmp_path, monkeypatch):
    for name in ("stage-0-k8", "stage-1-k4", "stage-2-k1", "unet"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(measuring, "load_student", lambda folder, teacher_dir: folder.name)

    def measure(judge, pipeline, steps, guidance_scale, seed, captions):
        rows = [{"of": pipeline, "steps": n, "guidance_scale": guidance_scale} for n in steps]
        return {"rows": rows, "seed": seed}, np.zeros((len(steps), 10, 2, 2, 3))

    monkeypatch.setattr(measuring, "measure", measure)
    recipe = demo.METHODS["tscd"]
    results, images = measuring.measure_student(None, tmp_path, None, recipe, 3, measuring.TEACHERS["parity"])
    assert [(row["of"], row["steps"]) for row in results["rows"]] == [
        ("stage-0-k8", 8), ("stage-1-k4", 4), ("stage-2-k1", 1)
    ]  # fmt: skip
    assert len(images) == 3 and results["seed"] == 3 and results["rows"][0]["guidance_scale"] == 1.0
    results, _ = measuring.measure_student(
        None, tmp_path / "unet", None, demo.METHODS["lcm"], 3, measuring.TEACHERS["parity"]
    )
    assert [row["steps"] for row in results["rows"]] == list(measuring.STUDENT_STEPS)
    assert results["rows"][0]["guidance_scale"] == 1.5


def test_the_demo_measures_what_it_was_told_to_train(tmp_path, classifier, monkeypatch):
    """The three runs of the demo, short; the reference is sampled with Heun, the others through the stock pipeline."""
    shutil.copytree(classifier, tmp_path / "classifier")
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 3, "format": demo.FORMAT}))
    short = {"max_train_steps": 8, "train_batch_size": 4, "checkpointing_steps": 8, "validation_steps": 0}
    monkeypatch.setattr(ct_demo, "FLAGS", ct_demo.FLAGS | short)
    changed = {"ict": {}, "ect": {"pretrain_steps": 4}, "diffusion": {"pretrain_steps": 8}}
    monkeypatch.setattr(ct_demo, "RUNS", {name: ct_demo.RUNS[name] | changed[name] for name in ct_demo.RUNS})
    monkeypatch.setattr(measuring, "SET_SIZE", 20)

    def in_process(command, **kwargs):
        script = next(place for place, word in enumerate(command) if word.endswith(ct_demo.SCRIPT))
        train(command[script + 1 :], ct)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_process)
    demo.main(demo.parse_args([f"--output_dir={tmp_path}", "--method=ct", "--seed=3"]))
    report = (tmp_path / "ct_report.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ") and "model" not in line]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| ict", "1"], ["| ict", "2"], ["| ect", "1"], ["| ect", "2"], ["| diffusion", "18"],
    ]  # fmt: skip
    assert (tmp_path / "ct_report.png").is_file() and "CC BY 4.0" in report
    monkeypatch.setattr(ct_demo, "train", None)  # a second demo reuses all
    demo.main(demo.parse_args([f"--output_dir={tmp_path}", "--method=ct", "--seed=3"]))
    demo.open_output_dir(tmp_path, 4, rebuild=True)
    assert not list(tmp_path.glob("ct_ict")) and not list(tmp_path.glob("ct_digits"))


def test_the_demos_digits_are_those_that_the_classifier_knows(tmp_path):
    ct_demo.write_digits(tmp_path)
    shards, source = open_images(None, train_data_dir=tmp_path, label_column="label")
    (large, labels), _ = digits.load_split()
    assert source.num_classes == 10 and len(source.keys) == len(labels)
    images, small_labels = digits.load_small()
    floats = np.repeat(images[..., None], 3, axis=-1) / 255
    assert np.array_equal(ct_demo.enlarge(floats), large) and np.array_equal(small_labels, labels)
    row = source.read(0)
    assert np.asarray(Image.open(io.BytesIO(row["png"]))).shape == (8, 8) and row["cls"] == b"0"

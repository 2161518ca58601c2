"""Direct distillation from end to end: teacher pairs, the script, what it saves; on the digits."""

import csv
import errno
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import train_direct_distill as direct
from common.direct import pairs, pipelines, probes, sources, student
from common.direct.student import check_same_weights
from common.errors import UserError
from common.run import checkpointing, preemption, simulation
from common.tools.demo import dit
from tests.cases import digests, finished, one_sentence, scalars, stop_in_warm_up, train
from tests.fork_server import run_processes
from tests.made import NUM_PAIRS, members

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

SCORE = {"score_weight": 1, "fake_lora_rank": 4}
ADVERSARY = {"adv_weight": 0.1, "fake_updates": 2, "fake_warmup": 1}


@pytest.fixture
def flags(direct_flags):
    return direct_flags


def run(words):
    train(words, direct)


# --- the result


def stock_latents(pipeline, data, indices, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(data.seeds[i]) for i in indices]
    prompts = [data.prompts[i] for i in indices]
    return pipeline(prompts, generator=generator, output_type="latent", **kwargs)[0]


@pytest.mark.parametrize(("kind", "rank"), [("sd", 0), ("dit", 4)])
def test_the_cards_snippet_gives_the_student_that_was_trained(tmp_path, flags, made, kind, rank, capsys):
    """Stock diffusers, by the code in the card, gives the error that the script measured; the schedule is repaired."""
    run(
        flags(
            tmp_path / "out", kind, lora_rank=rank, lora_alpha=6 if rank else None, validation_steps=2, ema_decay=0.5
        )
    )
    out = capsys.readouterr().out
    wasted = (
        "wasted; the student's scheduler has {'timestep_spacing': 'trailing'}"
        if kind == "sd"
        else "'shift_terminal': 0.5"
    )
    assert wasted in out
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
    place = {}
    exec(snippet.replace('.to("cuda")', "").replace("bfloat16", "float32"), place)
    assert place["images"][0].size == (16, 16)

    data, kwargs = pairs.PairShards(made(kind)), {"guidance_scale": 1.0, "num_inference_steps": 4}
    kwargs |= dit.CALL_KWARGS if kind == "dit" else {}
    assert all(f"{name}={value}" in snippet for name, value in kwargs.items())
    held_out = list(range(NUM_PAIRS - 4, NUM_PAIRS))
    student, target = stock_latents(place["pipe"], data, held_out, **kwargs), data.latents(held_out)
    error = (student - target).square().mean() / target.var(correction=0)
    result = json.loads((tmp_path / "out" / "held_out.json").read_text())
    assert result["relative_mse"] == pytest.approx(error.item(), rel=1e-4) and result["held_out_pairs"] == 4
    assert result["relative_mse"] < result["untrained"] and "WARNING: training" not in card + out
    times = [999, 749, 499, 249] if kind == "sd" else pytest.approx([1000, 928.2, 799.3, 500], abs=0.1)
    assert place["pipe"].scheduler.timesteps.tolist() == times
    assert scalars(tmp_path / "out", "held_out/relative_mse").keys() == {2, 4}
    grid = Image.open(tmp_path / "out" / "sample_grid.png").size
    assert grid[0] > 4 * 96 and grid[1] > 3 * 96


def test_the_first_loss_is_the_distance_of_stock_results(tmp_path, flags, made, direct_teacher):
    run(flags(tmp_path / "out", max_train_steps=1, huber_c=0.3))
    data = pairs.PairShards(made())
    indices = pairs.PairOrder(NUM_PAIRS - 4, 4, 1)[0]
    pipeline = DiffusionPipeline.from_pretrained(direct_teacher())
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, timestep_spacing="trailing"
    )
    student = stock_latents(pipeline, data, indices, guidance_scale=1.0, num_inference_steps=4)
    difference = (student - data.latents(indices)).double() / data.latents(range(NUM_PAIRS - 4)).std().double()
    expected = ((difference**2 + 0.3**2).sqrt() - 0.3).mean()
    assert scalars(tmp_path / "out", "loss")[1] == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_that_got_worse_is_called_so_and_in_bf16_all_weights_are_float32(tmp_path, flags, capsys):
    half = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    run(flags(tmp_path, learning_rate=3.0, max_train_steps=1, lr_warmup_steps=0, num_held_out=0, **half))
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors").values()
    assert all(x.dtype == torch.float32 for x in saved) and any((x != x.bfloat16()).any() for x in saved)
    result = json.loads((tmp_path / "held_out.json").read_text())
    assert result["relative_mse"] > result["untrained"]
    sentence = "WARNING: training has not made it better. On pairs that it was trained on its squared error is "
    sentence += f"{result['relative_mse']:.3f}"
    card = (tmp_path / "README.md").read_text()
    assert sentence in capsys.readouterr().out and f"- {sentence}" in card
    assert 'Without a GPU, leave out `.to("cuda")`' in card


def test_score_distillation_goes_on_from_an_earlier_student_with_prompts_alone(tmp_path, flags, teacher, capsys):
    run(flags(tmp_path / "a", lr_warmup_steps=0))
    (tmp_path / "prompts.txt").write_text("a photo of the digit three\na handwritten nine\n")
    own = SCORE | {"regression_weight": 0, "score_prompts": tmp_path / "prompts.txt", "fake_learning_rate": 1e-3}
    own |= {"init_student": tmp_path / "a", "fake_updates": 2, "fake_warmup": 2, "lr_warmup_steps": 0}
    run(flags(tmp_path / "b", **own))
    first, second = (json.loads((tmp_path / name / "held_out.json").read_text()) for name in "ab")
    assert second["untrained"] == pytest.approx(first["relative_mse"], rel=1e-4)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "A student by score distillation: it" in card and "with 2 updates of the fake score" in card
    assert "WARNING: training" not in card + capsys.readouterr().out
    for name in ("loss", "loss_fake", "score_gradient", "results_std", "fake_error"):
        values = scalars(tmp_path / "b", name)
        assert len(values) == 4 and all(value > 0 for value in values.values()), name
    assert not scalars(tmp_path / "b", "loss_regression")
    trained, before = (load_file(tmp_path / x / "unet" / "diffusion_pytorch_model.safetensors") for x in "ba")
    assert any((trained[key] != before[key]).any() for key in trained)
    said = one_sentence(capsys, run, flags(tmp_path / "c", **own | {"init_student": teacher()}))
    assert "--init_student" in said and "it is no student of this teacher, its block_out_channels is" in said


# --- resume, processes


def test_each_epoch_holds_every_pair_once_in_an_order_of_its_own():
    order = pairs.PairOrder(10, 4, seed=1)
    sequence = [i for j in range(5) for i in order[j]]
    assert sorted(sequence[:10]) == sorted(sequence[10:]) == list(range(10)) and sequence[:10] != sequence[10:]
    assert pairs.PairOrder(10, 4, seed=1)[3] == order[3] and pairs.PairOrder(10, 4, seed=2)[3] != order[3]
    assert [i for j in range(20) for i in pairs.PairOrder(10, 1, seed=1)[j]] == sequence


# --- the checks before training


def rewritten(made, folder, change):
    """A copy of the folder of pairs in which `change(record, latents)` has edited every pair."""
    data = pairs.PairShards(made())
    folder.mkdir()
    (folder / "dataset_config.json").write_bytes(Path(made(), "dataset_config.json").read_bytes())
    for shard in range(3):
        indices = pairs.shard_range(shard, NUM_PAIRS, 8)
        rows = zip(indices, data.latents(indices), strict=True)
        changed = [(i, data.prompts[i], change(data.seeds[i]), z, None, None) for i, z in rows]
        pairs.write_shard(pairs.shard_path(folder, shard), changed)
    return folder


def test_pairs_with_wrong_seeds_are_refused(tmp_path, flags, made, capsys):
    folder = rewritten(made, tmp_path / "pairs", lambda seed: seed + 500)
    assert "seeds and results do not belong together" in one_sentence(
        capsys, run, flags(tmp_path / "out", pairs_dir=folder)
    )
    run(flags(tmp_path / "out", pairs_dir=folder, skip_pairs_check=True, max_train_steps=1))
    assert json.loads((tmp_path / "out" / "training_config.json").read_text())["flags"]["skip_pairs_check"] is True


def test_another_noise_is_refused(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(student, "noise_sha256", lambda seed, numel: "0" * 64)
    assert "gives another noise here than where the pairs were made" in one_sentence(
        capsys, run, flags(tmp_path / "out")
    )


def test_pairs_of_another_teacher_are_refused(tmp_path, flags, teacher, made, direct_teacher, capsys, monkeypatch):
    for changes, sentence in [
        ({"pretrained_teacher_model": teacher()}, "has other weights; name the teacher that made them"),
        ({"pairs_dir": made("dit")}, "a StableDiffusion3Pipeline made these pairs"),
    ]:
        assert sentence in one_sentence(capsys, run, flags(tmp_path / "out", **changes))
        for path in sorted((tmp_path / "out").rglob("*")):
            path.unlink()


def test_the_same_teacher_elsewhere_and_in_half_precision_is_recognised(direct_teacher, made):
    config = pairs.read_config(made())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_same_weights(pipelines.load_pipeline(direct_teacher(), dtype), config, "pairs")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pairs_dir": None}, "pass either --pairs_dir or --dataset_metadata_path"),
        ({"dataset_metadata_path": "m.csv"}, "pass either --pairs_dir or --dataset_metadata_path"),
        ({"height": 16}, "are for --dataset_metadata_path"),
        ({"num_inference_steps": 1001}, "--num_inference_steps=1001: DDIMScheduler has 1000 timesteps"),
        ({"student_scheduler_kwargs": '{"magic": 1}'}, "--student_scheduler_kwargs: DDIMScheduler has no magic"),
        ({"student_kwargs": "4"}, "--student_kwargs=4 is no JSON object"),
        ({"student_kwargs": '{"magic": 1}'}, "the call of StableDiffusionPipeline has no magic"),
        ({"student_kwargs": '{"num_inference_steps": 3}'}, "has a flag of its own, --num_inference_steps"),
        ({"student_kwargs": '{"prompt": "x"}'}, "--student_kwargs: prompt comes from the pairs"),
        ({"student_kwargs": '{"height": 64, "width": 64}'}, "--student_kwargs: height comes from the pairs"),
        ({"student_kwargs": '{"num_images_per_prompt": 2}'}, "num_images_per_prompt comes from the pairs"),
        ({"student_kwargs": '{"timesteps": 4}'}, "--student_kwargs: timesteps must be a list of 4"),
        ({"lora_rank": 0, "lora_alpha": 8}, "--lora_alpha: --lora_rank=0 trains all weights; drop it"),
        ({"lora_rank": -1}, "--lora_rank: must not be negative"),
        ({"regression_weight": 0}, "--regression_weight=0 and --score_weight=0 leave nothing to train"),
        ({"fake_updates": 3}, "--fake_updates: without --score_weight there is no score; add it, or drop this"),
        (SCORE | {"lora_rank": 4, "fake_lora_rank": 0}, "--fake_lora_rank=0 copies all weights, and --lora_rank"),
        (SCORE | {"fake_lora_rank": 999}, "--fake_lora_rank=999: the largest of the adapted layers has rank"),
        (SCORE | {"score_min_time": 0.9, "score_max_time": 0.1}, "--score_min_time=0.9 must be below"),
        (SCORE | {"regression_weight": 0, "huber_c": 1}, "--huber_c: --regression_weight=0 has no regression"),
        (SCORE | {"score_kwargs": '{"latents": 1}'}, "--score_kwargs: latents comes from the pairs"),
        (SCORE | {"score_kwargs": '{"magic": 1}'}, "--score_kwargs: the call of StableDiffusionPipeline has no magic"),
        (
            SCORE | {"student_scheduler": "EDMEulerScheduler"},
            "--score_weight: EDMEulerScheduler does not say the alpha",
        ),
        (SCORE | {"adv_images": "none.csv"}, "--adv_images: without --adv_weight there is no adversary; add it"),
        (SCORE | ADVERSARY | {"adv_images": "none.csv"}, "--adv_images=none.csv cannot be read"),
        (SCORE | {"score_prompts": "none.txt"}, "--score_prompts cannot be read"),
        (SCORE | {"score_kwargs": "4"}, "--score_kwargs=4 is no JSON object"),
        (
            SCORE | {"score_through": "call", "backward": "stepwise"},
            "--score_through=call keeps the activations of all",
        ),
        ({"init_student": "nothing"}, "--init_student=nothing: no folder unet in it"),
        (
            {"init_student": "nothing", "lora_rank": 4},
            "--init_student holds all weights, and --lora_rank trains a LoRA",
        ),
        ({"loss_type": "lpips"}, "--loss_type: invalid choice"),
    ],
)
def test_mistakes_are_found_before_any_weight_is_loaded(tmp_path, flags, capsys, monkeypatch, changes, sentence):
    """What is wrong with teachers, pairs and folders: tests/scripts/test_bad_inputs.py."""
    refused(flags(tmp_path / "out", **changes), sentence, capsys, monkeypatch)


def refused(words, sentence, capsys, monkeypatch):
    capsys.readouterr()  # the first test of a process makes the teacher
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    assert sentence in one_sentence(capsys, run, words, alone=True)


@pytest.mark.parametrize(
    ("class_name", "sentence"),
    [
        ("StableDiffusionDepth2ImgPipeline", "it starts from an image, a video or a sound, its image"),
        ("FluxKontextPipeline", "it starts from an image, a video or a sound, its image"),
        ("WanImageToVideoPipeline", "it starts from an image, a video or a sound, its image"),
        ("CogView4ControlPipeline", "it follows a control image, by its control_image"),
        ("NoSuchPipeline", "has no NoSuchPipeline"),
        ("DDPMPipeline", "its call takes no prompt"),
    ],
)
def test_pipelines_that_cannot_be_distilled_are_refused(tmp_path, direct_teacher, class_name, sentence):
    saved_as(class_name, direct_teacher(), tmp_path)
    with pytest.raises(UserError, match=sentence):
        pipelines.read_pipeline_config(tmp_path)


def test_a_scheduler_that_diffusers_does_not_have_is_named(tmp_path, direct_teacher):
    saved_as("StableDiffusionPipeline", direct_teacher(), tmp_path, scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(UserError, match="diffusers .* has no NoSuchScheduler"):
        pipelines.read_pipeline_config(tmp_path)


def saved_as(class_name, teacher, folder, **index):
    """The teacher, as if a pipeline of that class had saved it."""
    for part in Path(teacher).iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "model_index.json").unlink()
    index = json.loads(Path(teacher, "model_index.json").read_text()) | {"_class_name": class_name} | index
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("class_name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_what_another_task_saved_is_sampled_from_text(tmp_path, direct_teacher, class_name):
    saved_as(class_name, direct_teacher(), tmp_path)
    config = pipelines.read_pipeline_config(tmp_path)
    pipeline = pipelines.load_pipeline(tmp_path, torch.bfloat16)
    assert config["class"] is type(pipeline) is StableDiffusionPipeline and pipeline.unet.dtype == torch.bfloat16
    assert f"a {class_name} saved it, a StableDiffusionPipeline samples it here" in config["notes"][0]
    assert pipelines.read_pipeline_config(direct_teacher())["notes"] == []


def test_incomplete_and_damaged_pairs_are_refused(tmp_path, made):
    folder = rewritten(made, tmp_path / "pairs", lambda seed: seed)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:3000])
    with pytest.raises(UserError, match="00001.tar is damaged|pairs where dataset_config.json says 24"):
        pairs.PairShards(folder)
    (folder / "00001.tar").unlink()
    with pytest.raises(UserError, match="holds 2 of 3 shards"):
        pairs.PairShards(folder)


def test_dry_run_loads_and_writes_nothing(tmp_path, flags, capsys, monkeypatch):
    """The simulation of an update is that of the guide's folder below, and of tests/run/test_simulation.py."""
    command = flags(tmp_path / "out", dry_run=True, max_train_steps=None, num_train_epochs=2)
    monkeypatch.setattr(ModelMixin, "from_pretrained", None)
    monkeypatch.setattr(simulation, "begin", finished)
    run(command)
    out = capsys.readouterr().out
    assert "20 to train on, 4 held out" in out and "updates                 10" in out
    assert not (tmp_path / "out").exists()


def test_resume_with_other_pairs_in_the_same_folder_is_refused(tmp_path, flags, made, capsys):
    folder = tmp_path / "pairs"
    shutil.copytree(made(), folder)
    run(flags(tmp_path / "out", pairs_dir=folder, max_train_steps=2))
    shutil.rmtree(folder)
    rewritten(made, folder, lambda seed: seed + 500)
    capsys.readouterr()
    assert "was trained on other pairs" in one_sentence(
        capsys, run, flags(tmp_path / "out", pairs_dir=folder, max_train_steps=4, resume_from_checkpoint="latest")
    )


# --- the guide's folder of images


def from_table(flags, folder, out, **changes):
    return flags(out, pairs_dir=None, dataset_metadata_path=folder / "metadata.csv", **changes)


@pytest.mark.parametrize(
    "size",
    [pytest.param({"height": 16, "width": 16}, marks=pytest.mark.soak), {"max_pixels": 256, "train_batch_size": 1}],
)
def test_the_guides_folder_of_images(tmp_path, flags, table, size):
    run(from_table(flags, table, tmp_path / "out", dataset_base_path=table, **size))
    result = json.loads((tmp_path / "out" / "held_out.json").read_text())
    assert result["relative_mse"] < 0.9 * result["untrained"]
    config = json.loads((tmp_path / "out" / "training_config.json").read_text())["flags"]
    assert config["num_inference_steps"] == 4


def test_the_images_are_encoded_once_and_a_start_that_died_goes_on(tmp_path, flags, table, capsys, monkeypatch):
    out, small = tmp_path / "out", functools.partial(sources.write_pairs, samples_per_shard=8)
    words = from_table(flags, table, out)
    monkeypatch.setattr(sources, "write_pairs", small)
    with monkeypatch.context() as patch:

        def full(seed, numel, hashed=pairs.noise_sha256):  # the disk, in the second of three shards
            if seed == 9:
                raise OSError(errno.ENOSPC, "No space left on device")
            return hashed(seed, numel)

        patch.setattr(pairs, "noise_sha256", full)
        with pytest.raises(SystemExit) as stopped:
            run(words)
    assert stopped.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert sorted(members(out / "pairs")) == ["00000.tar", "dataset_config.json"]
    first = (out / "pairs" / "00000.tar").stat().st_mtime_ns
    run(words)
    assert f"encoded once, into {out / 'pairs'}" in capsys.readouterr().out
    there, last = members(out / "pairs"), out / "checkpoint-4"
    assert len(there) == 4 and (out / "pairs" / "00000.tar").stat().st_mtime_ns == first
    state, expected = checkpointing.read_state(last), digests(last)
    said = [
        pairs.PairShards(out / "pairs").prompts,
        list(range(NUM_PAIRS)),
        None,
    ]  # as of runs that encoded each batch
    assert state["pairs_sha256"] == hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    # Resumed: nothing is encoded again, bit for bit the same run; other images under the old names are refused.
    (last / "COMPLETE").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "encode_images", None)
        run([*words, "--resume_from_checkpoint=latest"])
    assert digests(last) == expected and members(out / "pairs") == there
    Image.new("RGB", (16, 16)).save(table / "000000003.png")
    capsys.readouterr()
    assert "pairs holds pairs of other flags (image_bytes_sha256 is another" in one_sentence(
        capsys, run, [*words, "--max_train_steps=5", "--resume_from_checkpoint=latest"]
    )


@pytest.mark.soak
def test_two_processes_share_the_encoding(tmp_path, flags, table):
    small = "import functools\nfrom common.direct import sources\n"
    small += "sources.write_pairs = functools.partial(sources.write_pairs, samples_per_shard=8)\n"
    for number in (1, 2):
        out = tmp_path / str(number)
        words = from_table(flags, table, out, train_batch_size=4 // number)
        done = run_processes(words, direct, number, small)
        assert done.returncode == 0, done.stderr[-2000:]
    assert members(tmp_path / "1" / "pairs") == members(tmp_path / "2" / "pairs")
    assert len(members(tmp_path / "2" / "pairs")) == 4


@pytest.mark.soak
def test_a_dry_run_of_the_guides_folder_simulates_an_update(tmp_path, flags, table, capsys):
    run(from_table(flags, table, tmp_path / "out", dry_run=True))
    assert "is the smallest that holds" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_encoded_images_are_the_latents_but_for_what_the_decoder_lost(table, pictured, direct_teacher):
    data, stored = sources.PairImages(table / "metadata.csv"), pairs.PairShards(pictured)
    data.pipeline = pipelines.load_pipeline(direct_teacher())
    target = stored.latents(range(8))
    assert (
        data.latents(range(8)) - target
    ).square().mean() < 0.6 * target.var()  # the posterior of a VAE that was trained for seconds is wide
    assert data.seeds == stored.seeds and data.prompts == stored.prompts


def test_a_table_of_json_and_what_it_may_not_hold(tmp_path):
    """Every format of a table: tests/data/test_tables.py."""
    rows = [{"image": f"{i}.png", "prompt": f"a, {i}", "seed": i, "num_inference_steps": 4} for i in range(3)]
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    (tmp_path / "m.json").write_text(json.dumps(rows))
    data = sources.PairImages(tmp_path / "m.json")
    assert (data.prompts, data.seeds, data.steps) == (["a, 0", "a, 1", "a, 2"], [0, 1, 2], {4})
    for changes, sentence in (
        ({"seed": 1.5}, "'1.5'; seed, .* are numbers"),
        ({"num_inference_steps": True}, "'True'; seed"),
        ({"prompt": ["a"]}, "m.jsonl: the prompt of row 1 is no text"),
        ({"image": None}, "m.jsonl: the image of row 1 is no text"),
    ):
        (tmp_path / "m.jsonl").write_text(json.dumps(rows[0] | changes))
        with pytest.raises(UserError, match=sentence):
            sources.PairImages(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("column", "value", "changes", "sentence"),
    [
        (5, 4, {}, "cfg_scale 1"),
        (2, 2**64, {}, "has more than 64 bits"),
        (None, None, {"max_pixels": 255, "train_batch_size": 1}, "--max_pixels=255"),
        (None, None, {"max_pixels": 256}, "--train_batch_size=1"),
        (None, None, {"num_inference_steps": 8}, "--num_inference_steps=8: the table says 4"),
    ],
)
def test_mistakes_in_the_guides_folder(tmp_path, flags, table, capsys, monkeypatch, column, value, changes, sentence):
    """The others: tests/scripts/test_bad_inputs.py."""
    header, *rows = csv.reader(open(table / "metadata.csv", newline=""))
    for row in rows if column else []:
        row[column] = value
    with open(table / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    refused(from_table(flags, table, tmp_path / "out", **changes), sentence, capsys, monkeypatch)


def test_images_of_several_sizes_need_max_pixels(tmp_path, flags, table, capsys):
    Image.new("RGB", (24, 16)).save(table / "000000003.png")
    assert "its images have 2 sizes; pass --max_pixels" in one_sentence(
        capsys, run, from_table(flags, table, tmp_path / "out")
    )


def test_a_stop_in_the_fake_scores_warm_up_ends_the_run_at_once(tmp_path, flags, capsys, monkeypatch):
    out = tmp_path / "out"
    done = stop_in_warm_up(monkeypatch, out)
    with pytest.raises(SystemExit) as ended:
        run(flags(out, **SCORE, fake_warmup=50))
    assert ended.value.code == preemption.EXIT_CODE and done == [-50]
    assert "after step 0; start it again" in capsys.readouterr().out
    assert not list(out.glob("checkpoint-*")) and not (out / preemption.REQUEUE).exists()


def test_an_adversary_takes_a_tables_images_for_real(tmp_path, flags, table, capsys, monkeypatch):
    """Dry, whole and resumed, encoded once; other images, prompts and weights; and none of the pairs' size."""
    (tmp_path / "prompts.txt").write_text("a handwritten nine\n")
    own, out = SCORE | ADVERSARY | {"adv_images": table / "metadata.csv", "max_train_steps": 3}, tmp_path / "out"
    own["score_prompts"] = tmp_path / "prompts.txt"
    run(flags(out, **own, dry_run=True))
    assert not out.exists()
    run(flags(out, **own, checkpointing_steps=2))
    assert f"the real images are encoded once, into {out / 'real'}" in capsys.readouterr().out
    stored, data = pairs.PairShards(out / "real"), sources.RealImages(table / "metadata.csv")
    assert stored.prompts == data.prompts and stored.sizes == [(16, 16)] * NUM_PAIRS
    card = (out / "README.md").read_text()
    assert f"An adversary of weight 0.1 tells its results from the images of `{table / 'metadata.csv'}`." in card
    whole = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    told = scalars(out, "loss_discriminator")
    assert len(told) == 3 and all(1.0 < loss < 2.0 for loss in told.values())  # 2 ln 2 at the start
    shutil.rmtree(out / "checkpoint-3")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "encode_images", None)
        run(flags(out, **own, checkpointing_steps=2, resume_from_checkpoint="latest"))
    again = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)  # the same computation, twice

    resumed = own | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    more = {"adv_weight": 0.2}, {"adv_weight": None, "adv_images": None}, {"adv_images": None}
    for changes, name in zip(more, ("adv_weight", "adv_weight", "adv_images"), strict=True):
        assert f"--{name} was" in one_sentence(capsys, run, flags(out, **resumed | changes))
    (tmp_path / "prompts.txt").write_text("a handwritten five\n")
    assert "on other prompts than --score_prompts holds now" in one_sentence(capsys, run, flags(out, **resumed))
    (tmp_path / "prompts.txt").write_text("a handwritten nine\n")
    Image.new("RGB", (16, 16)).save(table / "000000003.png")
    assert "on other images than --adv_images holds now" in one_sentence(capsys, run, flags(out, **resumed))
    for path in table.glob("*.png"):
        Image.new("RGB", (24, 24)).save(path)
    capsys.readouterr()
    assert "give them the pairs' size" in one_sentence(capsys, run, flags(tmp_path / "b", **own, dry_run=True))


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("file,prompt\na.png,a\n", "has no column image"),
        ("image,prompt\na.png,a\nnone.png,b\n", "1 of 2 rows name no file, the first is 'none.png'"),
        ("image,prompt\na.png,a\nwide.png,b\n", "its images have 2 sizes; give them that of the pairs"),
        ("image,prompt\na.png,a\ntext.png,b\n", "text.png cannot be read"),
        ("image,prompt\n", "holds no row below its first"),
    ],
)
def test_tables_of_real_images_that_are_wrong(tmp_path, flags, capsys, monkeypatch, table, sentence):
    (tmp_path / "text.png").write_text("no image")
    for name, size in (("a.png", (16, 16)), ("wide.png", (24, 16))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "m.csv").write_text(table)
    own = SCORE | ADVERSARY | {"adv_images": tmp_path / "m.csv", "dry_run": True}
    refused(flags(tmp_path / "out", **own), f"--adv_images={tmp_path / 'm.csv'}", capsys, monkeypatch)
    refused(flags(tmp_path / "out", **own), sentence, capsys, monkeypatch)


def test_a_teacher_without_a_vae_takes_no_images(tmp_path, flags, table, direct_teacher, capsys, monkeypatch):
    (tmp_path / "bare").mkdir()
    saved_as("StableDiffusionPipeline", direct_teacher(), tmp_path / "bare", vae=[None, None])
    own = {"pretrained_teacher_model": tmp_path / "bare", "dry_run": True}
    for words, way_out in (
        (flags(tmp_path / "out", **own, **SCORE, **ADVERSARY, adv_images=table / "metadata.csv"), "drop it: then"),
        (from_table(flags, table, tmp_path / "out", **own), "use generate_pairs"),
    ):
        sentence = f"metadata.csv: a StableDiffusionPipeline has no VAE, which images are encoded with; {way_out}"
        refused(words, sentence, capsys, monkeypatch)


def test_a_pipeline_that_cannot_be_given_images_is_refused(direct_teacher, table):
    """An encoding that the decoding does not undo: here, a VAE whose encoder sees negatives."""
    pipeline = pipelines.load_pipeline(direct_teacher())
    data = sources.PairImages(table / "metadata.csv")
    data.pipeline = pipeline
    rollout = pipelines.Rollout(pipeline, guidance_scale=1.0, num_inference_steps=4)
    pipeline.scheduler, _ = probes.student_scheduler(DDIMScheduler, dict(pipeline.scheduler.config))
    assert sources.check_encoding(rollout, data, [0, 1]) < 0.5
    Image.new("RGB", (16, 16)).save(table / data.files[2])
    assert sources.check_encoding(rollout, data, [2]) < 0.5  # of one colour, without variance
    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda pixels: encode(-pixels)
    with pytest.raises(UserError, match="cannot be given images instead of latents"):
        sources.check_encoding(rollout, data, [0, 1])

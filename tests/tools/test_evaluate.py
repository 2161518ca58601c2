"""python -m common.tools.evaluate end to end, in process, on a Stable Diffusion of a few thousand random weights."""

import json
import os
import shutil
from pathlib import Path

from common.results import metrics
from common.run.reference import iterate_images, reference_features
from common.tools.evaluate import format_table, main, parse_args, reference_floor
from common.tools.sampling import generate_images, load_pipeline
from tests.cases import one_sentence
from tests.data.making import write_tar

import diffusers
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

SIZE = 16
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory, teacher, classifier):
    """pipeline, unet, lora, classifier, clip, images: the folders that every test here reads."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(classifier, root / "classifier")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(teacher())
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline.save_pretrained(root / "pipeline")
    unet, tokenizer = pipeline.unet, pipeline.tokenizer
    torch.manual_seed(1)
    diffusers.UNet2DConditionModel.from_config(unet.config).save_pretrained(root / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        root / "lora", unet_lora_layers=get_peft_model_state_dict(unet)
    )

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TEXT | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = TEXT | {"image_size": SIZE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    sides = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    transformers.CLIPImageProcessorPil(**sides).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")

    rng = np.random.default_rng(0)
    (root / "images" / "sub").mkdir(parents=True)
    for i in range(14):
        folder = root / "images" / ("sub" if i > 8 else "")
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root


def flags(root, output_dir, *more):
    return [
        "--pretrained_model", str(root / "pipeline"), "--prompts", "a zero", "--prompts", "one",
        "--num_inference_steps", "1,2", "--guidance_scale", "2", "--num_images", "5", "--device", "cpu",
        "--output_dir", str(output_dir), *map(str, more),
    ]  # fmt: skip


def test_end_to_end(root, tmp_path, capsys):
    out = tmp_path / "out"
    more = [
        "--feature_network", root / "classifier", "--reference", root / "images", "--prompt_accuracy",
        "--clip_model", root / "clip", "--batch_size", 2, "--seed", 3,
    ]  # fmt: skip
    main(parse_args(flags(root, out, *more)))
    result = json.loads((out / "metrics.json").read_text())
    assert [row["num_inference_steps"] for row in result["rows"]] == [1, 2]
    assert result["arguments"]["seed"] == 3 and result["versions"]["torch"] == torch.__version__
    assert result["reference"]["images"] == 14 and result["reference"]["floor"]["other_images"] == 9

    # every number again, by hand
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(root / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a zero", "one", "a zero", "one", "a zero"]
    network = metrics.load_feature_network(root / "classifier")
    reference = [Image.open(file) for file in sorted((root / "images").rglob("*.png"))]
    reference = torch.stack([by_hand(image) for image in reference])
    for row, steps in zip(result["rows"], [1, 2], strict=True):
        images = []
        for i, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(3 + i)
            picture = pipeline(prompt, num_inference_steps=steps, guidance_scale=2.0, generator=generator).images[0]
            images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        images = torch.stack(images)
        features, reference_of = metrics.image_features(network, images), metrics.image_features(network, reference)
        for name, distance in (("frechet", metrics.frechet_distance), ("kernel", metrics.kernel_distance)):
            expected = distance(features, reference_of)
            assert row[f"{name}_distance"] == pytest.approx(expected, rel=0.02, abs=1e-6)
        seen = metrics.class_statistics(network, images, [(0,), (1,), (0,), (1,), (0,)])
        assert row["accuracy"] == seen["accuracy"] and row["confidence"] == pytest.approx(seen["confidence"], rel=1e-5)
        assert -100 <= row["clip_score"] <= 100
        assert row["images"] == 5 and row["seconds_per_image"] > 0 and row["scheduler"] == "DDIMScheduler"
        assert row["guidance_scale"] == 2 and row["eta"] == 0.0

    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:5]]
    assert names == ["pipeline", "pipeline", "reference (floor)"]
    assert Image.open(out / "grid.png").width > 5 * 96


def by_hand(image):
    """24 x 20 (height x width) -> the shorter side to 16, then the middle 16 rows."""
    box = (0, 2, 20, 22)  # the middle 20 x 20
    return torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))).permute(2, 0, 1)


@pytest.mark.parametrize("scheduler,eta", [("ddim", 0.5), ("lcm", None), ("tcd", 0.3)])
def test_images_do_not_depend_on_the_batch_size(root, scheduler, eta):
    """Also with schedulers that draw noise between the steps."""
    pipeline = load_pipeline(str(root / "pipeline"), scheduler=scheduler)
    options = {} if eta is None else {"eta": eta}
    prompts = ["a zero", "one", "a zero", "two"]
    several, _ = generate_images(pipeline, prompts, 3, 1.0, 7, 3, **options)
    single, seconds = generate_images(pipeline, prompts, 3, 1.0, 7, 1, **options)
    assert several.dtype == torch.uint8 and several.shape == (4, 3, SIZE, SIZE) and seconds > 0
    assert (several.int() - single.int()).abs().max() <= 1
    assert (single[0].int() - single[2].int()).abs().max() > 1  # same prompt, other seed


def test_lora_and_unet_change_the_images(root, tmp_path):
    pictures, file = [], root / "lora" / "pytorch_lora_weights.safetensors"
    for options in [{}, {"lora": root / "lora"}, {"unet": root / "unet"}, {"lora": file}]:
        pipeline = load_pipeline(str(root / "pipeline"), **options)
        pictures.append(generate_images(pipeline, ["one"], 2, 1.0, 0, 1)[0].int())
    # pipelines of their own, in different memory: equal up to the rounding of a pixel
    plain, with_lora, with_unet, again = pictures
    assert (plain - with_lora).abs().max() > 1 and (plain - with_unet).abs().max() > 1
    assert (with_lora - again).abs().max() <= 1
    main(parse_args(flags(root, tmp_path / "out", "--lora", root / "lora")))
    assert (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("model", "student", "label"),
    [
        ("PIPELINE", "--lora=LORA", "lora"),
        ("mine=PIPELINE", "--lora=LORA", "mine"),
        ("PIPELINE", "--lora=LORA/pytorch_lora_weights.safetensors", "lora"),
        ("PIPELINE", "--unet=UNET", "ROOT"),
        ("PIPELINE", "--batch_size=1", "pipeline"),
    ],
)
def test_results_are_named_after_the_student(root, tmp_path, model, student, label):
    model = model.replace("PIPELINE", str(root / "pipeline"))
    student = student.replace("LORA", str(root / "lora")).replace("UNET", str(root / "unet"))
    args = parse_args([f"--pretrained_model={model}", student, f"--output_dir={tmp_path / 'out'}", "--prompts=a"])
    assert args.models == {label.replace("ROOT", root.name): str(root / "pipeline")}


def test_a_lora_is_sampled_with_the_scheduler_in_its_folder(root, tmp_path):
    folder = Path(shutil.copytree(root / "lora", tmp_path / "lora"))
    diffusers.LCMScheduler(original_inference_steps=20).save_pretrained(folder / "scheduler")
    kept = load_pipeline(str(root / "pipeline"), lora=folder).scheduler
    assert isinstance(kept, diffusers.LCMScheduler) and kept.config.original_inference_steps == 20
    diffusers.TCDScheduler(original_inference_steps=40).save_pretrained(folder / "scheduler")
    kept = load_pipeline(str(root / "pipeline"), lora=folder).scheduler
    assert isinstance(kept, diffusers.TCDScheduler) and kept.config.original_inference_steps == 40
    shutil.copytree(root / "pipeline" / "unet", folder / "unet")
    assert isinstance(load_pipeline(str(root / "pipeline"), unet=folder / "unet").scheduler, diffusers.TCDScheduler)
    chosen = load_pipeline(str(root / "pipeline"), lora=folder, scheduler="ddim").scheduler
    chosen.set_timesteps(4)
    assert isinstance(chosen, diffusers.DDIMScheduler) and chosen.timesteps.tolist() == [999, 749, 499, 249]


def test_a_lora_of_another_model_is_refused(root, tmp_path, capsys):
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "strange.safetensors")
    words = flags(root, tmp_path / "out", "--lora", tmp_path / "strange.safetensors")
    assert "--lora" in one_sentence(capsys, main, parse_args(words))


def test_several_models_and_a_prompt_file(root, tmp_path):
    (tmp_path / "prompts.txt").write_text("a zero\n\n one \n")
    out = tmp_path / "out"
    argv = ["--pretrained_model", f"first={root / 'pipeline'}", "--pretrained_model", f"second={root / 'pipeline'}"]
    argv += ["--prompts", f"@{tmp_path / 'prompts.txt'}", "--num_inference_steps", "1", "--output_dir", str(out)]
    result = main(parse_args([*argv, "--device", "cpu", "--height", "24", "--width", "16"]))
    assert [row["model"] for row in result["rows"]] == ["first", "second"]
    assert result["arguments"]["first_prompts"] == ["a zero", "one"] and result["rows"][0]["images"] == 2
    assert (result["rows"][0]["height"], result["rows"][0]["width"]) == (24, 16)


def test_timesteps(root, tmp_path):
    argv = flags(root, tmp_path / "out", "--timesteps", "999,499,0", "--scheduler", "lcm")
    del argv[argv.index("--num_inference_steps") : argv.index("--num_inference_steps") + 2]
    result = main(parse_args(argv))
    assert [row["num_inference_steps"] for row in result["rows"]] == [3]
    pipeline = load_pipeline(str(root / "pipeline"), scheduler="lcm")
    one, _ = generate_images(pipeline, ["one"], 2, 1.0, 0, 1, timesteps=[999, 499])
    other, _ = generate_images(pipeline, ["one"], 2, 1.0, 0, 1, timesteps=[999, 99])
    assert not torch.equal(one, other)


def test_unconditional_pipeline(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8,
    )  # fmt: skip
    pipeline = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    argv = ["--pretrained_model", str(tmp_path / "pipeline"), "--num_inference_steps", "1,2", "--num_images", "3"]
    result = main(parse_args([*argv, "--device", "cpu", "--output_dir", str(tmp_path / "out")]))
    assert [row["images"] for row in result["rows"]] == [3, 3]
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        generate_images(pipeline, [None], 1, 2.0, 0, 1)
    with pytest.raises(ValueError, match="takes no prompt"):
        generate_images(pipeline, ["one"], 1, None, 0, 1)


def test_arguments_that_the_pipeline_would_ignore_are_refused(root):
    pipeline = load_pipeline(str(root / "pipeline"), scheduler="lcm")
    with pytest.raises(ValueError, match="LCMScheduler has no eta"):
        generate_images(pipeline, ["one"], 1, 1.0, 0, 1, eta=0.3)
    with pytest.raises(ValueError, match="needs prompts"):
        generate_images(pipeline, [None], 1, 1.0, 0, 1)


# Reference


def test_folder_tar_and_npz_references_agree(root, tmp_path):
    files = sorted((root / "images").rglob("*.png"))
    texts = [("txt", b"a caption"), ("pickle", b"never read")]
    members = [[(f"{i:03d}.{e}", data) for e, data in [("png", f.read_bytes()), *texts]] for i, f in enumerate(files)]
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard:02d}.tar", sum(members[shard * 7 : shard * 7 + 7], []))
    np.savez(tmp_path / "images.npz", arr_0=np.stack([np.array(Image.open(file)) for file in files]))
    expected = torch.stack([by_hand(Image.open(file)) for file in files])
    for reference in [root / "images", tmp_path / "{00..01}.tar", tmp_path, tmp_path / "images.npz"]:
        assert torch.equal(torch.stack(list(iterate_images(str(reference), SIZE, SIZE))), expected)
    network = metrics.load_feature_network(root / "classifier")
    features = reference_features(str(tmp_path), network, SIZE, SIZE, batch_size=4, limit=10)
    torch.testing.assert_close(features, metrics.image_features(network, expected[:10]))


def test_stored_features_stand_for_the_images_of_one_network_and_size(root, tmp_path, capsys):
    more = ["--feature_network", root / "classifier", "--reference"]
    first = main(parse_args(flags(root, tmp_path / "first", *more, root / "images")))
    stored = tmp_path / "first" / "reference_features.npz"
    second = main(parse_args(flags(root, tmp_path / "second", *more, stored)))
    for one, two in zip(first["rows"], second["rows"], strict=True):
        # the networks are loaded anew, into other memory
        assert one["frechet_distance"] == pytest.approx(two["frechet_distance"], rel=1e-3, abs=1e-6)
    assert not (tmp_path / "second" / "reference_features.npz").exists()
    for i, wrong in enumerate([["--height", 24, "--width", 24], ["--feature_network", root / "clip"]]):
        words = flags(root, tmp_path / str(i), *more, stored, *wrong)
        assert "give the images instead" in one_sentence(capsys, main, parse_args(words))


def test_floor_needs_twice_the_images():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert reference_floor(features, 11) is None
    floor = reference_floor(features, 8)
    assert (floor["images"], floor["other_images"]) == (8, 12) and floor == reference_floor(features, 8)


# Pieces


def test_a_damaged_reference_is_named(root, tmp_path, capsys):
    """What seems to be a reference until it is read."""
    images = [(f"{i}.png", path.read_bytes()) for i, path in enumerate((root / "images").rglob("*.png"))]
    os.truncate(write_tar(tmp_path / "cut.tar", images), 3000)
    np.savez(tmp_path / "pickles.npz", images=np.array([{}], dtype=object))
    for name in ("cut.tar", "pickles.npz"):
        words = flags(
            root, tmp_path / name[:3], "--feature_network", root / "classifier", "--reference", tmp_path / name
        )
        assert "is damaged or no file of images" in one_sentence(capsys, parse_args, words, alone=True)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--scheduler", "tcd", "--eta", "2"], "at 1 steps: gamma must be less than or equal to 1.0"),
        (["--output_dir", "/proc/x"], "--output_dir=/proc/x cannot be written to"),
    ],
)
def test_what_the_run_meets_ends_in_one_sentence(root, tmp_path, capsys, more, sentence):
    assert sentence in one_sentence(capsys, main, parse_args(flags(root, tmp_path / "out", *more)))


def test_format_table():
    rows = [{"model": "a|b", "num_inference_steps": 4, "frechet_distance": 1.23456, "x": 1}, {"model": "teacher"}]
    assert format_table(rows) == (
        "| model   | steps | Fréchet distance |\n"
        "|---------|------:|-----------------:|\n"
        "| a\\|b    |     4 |            1.235 |\n"
        "| teacher |     - |                - |\n"
    )


# Mistakes


@pytest.mark.parametrize(
    "more,expected",
    [
        (["--pretrained_model", "/nowhere/at/all"], "--pretrained_model /nowhere/at/all is neither a folder"),
        (["--pretrained_model", "{root}/images"], "has no model_index.json"),
        (["--height", "24"], "--height and --width go together"),
        (["--prompts", "{root}/pipeline/model_index.json"], "is a file; write @"),
        (["--prompts", "@/nowhere.txt"], "--prompts=@/nowhere.txt cannot be read"),
        (["--timesteps", "999,0"], "drop it or --num_inference_steps"),
        (["--lora", "{root}/images"], "--lora"),
        (["--unet", "{root}/pipeline"], "--unet"),
        (["--reference", "{root}/images"], "--feature_network"),
        (["--feature_network", "{root}/classifier"], "measures nothing alone"),
        (["--feature_network", "{root}/classifier", "--reference", "{root}/unet"], "holds neither images (jpg, png"),
        (["--feature_network", "{root}/classifier", "--reference", "/{{0..1}}.tar"], "2 of 2 paths match no file"),
        (["--feature_network", "{root}/classifier", "--prompt_accuracy", "--prompts", "ten"], "'ten' names none"),
        (["--feature_network", "{root}/clip", "--prompt_accuracy"], "needs an image classifier"),
        (["--num_reference_images", "9"], "--num_reference_images: there are no reference images; add --reference"),
        (["--clip_model", "{root}/images"], "has no config.json"),
        (["--device", "abacus"], "--device=abacus cannot be used here"),
        (["--prompt_accuracy"], "--prompt_accuracy needs --feature_network"),
        (["--output_dir", "{root}/images"], "is not empty"),
    ],
)
def test_mistakes_end_in_one_sentence_before_any_model_is_loaded(root, tmp_path, capsys, monkeypatch, more, expected):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    words = flags(root, tmp_path / "out", *(value.format(root=root) for value in more))
    assert expected in one_sentence(capsys, parse_args, words, alone=True)


def test_empty_prompts(root, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    for prompts in [" ", f"@{tmp_path / 'empty.txt'}"]:
        argv = ["--pretrained_model", str(root / "pipeline"), "--output_dir", str(tmp_path / "out")]
        assert "--prompts holds no text" in one_sentence(capsys, parse_args, [*argv, "--prompts", prompts])


def test_overwrite_replaces_results_and_leaves_other_files(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text("old")
    main(parse_args(flags(root, tmp_path, "--overwrite")))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline"])
def test_a_teacher_that_another_class_saved_is_measured_as_text_to_image(root, tmp_path, capsys, name):
    parts = diffusers.StableDiffusionPipeline.from_pretrained(root / "pipeline").components
    getattr(diffusers, name)(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "saved")
    is_pag = "PAG" in name
    loaded = load_pipeline(str(tmp_path / "saved"))
    assert type(loaded) is getattr(diffusers, name if is_pag else "StableDiffusionPipeline")
    assert (f"saved by {name}, measured as StableDiffusionPipeline" in capsys.readouterr().out) is not is_pag
    student = load_pipeline(str(tmp_path / "saved"), lora=root / "lora")  # which has not seen what PAG adds
    assert type(student) is diffusers.StableDiffusionPipeline
    assert len(generate_images(student, ["one"], 1, 1.0, 0, 1)[0]) == 1


def test_a_student_is_measured_at_the_size_that_it_was_trained_at(root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(root / "unet", run / "stage-0-k2" / "unet")
    (run / "training_config.json").write_text(json.dumps({"flags": {"resolution": 2 * SIZE}}))
    for more, side in ([], SIZE), (["--unet", run / "stage-0-k2" / "unet"], 2 * SIZE):
        row = main(parse_args(flags(root, tmp_path / str(side), *more)))["rows"][0]
        assert (row["height"], row["width"]) == (side, side)

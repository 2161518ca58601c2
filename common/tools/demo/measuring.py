"""How the demo measures teachers and students: samples, and a judge that was trained on other digits."""

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from common.direct import probes
from common.errors import UserError
from common.files import whole
from common.results import metrics
from common.tools.demo import digits, dit, stable_diffusion
from common.tools.sampling import load_pipeline

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[3]
TEACHER_STEPS = (50, 8, 4, 2, 1)
STUDENT_STEPS = (4, 2, 1)
# A set is as large as the held-out part of the data, so that every distance here is biased alike, the floor's too.
NUM_SETS, SET_SIZE = 3, digits.NUM_HELD_OUT
LONG_STEPS = 20  # above, one set: it takes as long as all rows of few steps
SAMPLE_BATCH_SIZE = 60


class Teacher(NamedTuple):
    """A teacher of the demo: its folder, what its denoiser predicts, what its captions say, how it is sampled."""

    folder: str
    prediction_type: str = "epsilon"
    sdxl: bool = False  # in SDXL's layout
    captions: digits.Captions = digits.NAMED
    guidance_scale: float = 2.0

    @property
    def shards(self):
        """The folder of its captioned images."""
        return "shards" if self.captions is digits.NAMED else self.folder.replace("teacher", "shards")

    def build(self, folder, seed):
        """Train it and save it as a pipeline."""
        if self.prediction_type == "flow":
            return dit.build_teacher(folder, seed=seed)
        return stable_diffusion.build_teacher(
            folder, self.prediction_type, seed=seed, sdxl=self.sdxl, captions=self.captions
        )


# The first is the hard judge's: its prompts leave five digits open, and its single step is a smear.
TEACHERS = {
    "parity": Teacher("teacher_parity", captions=digits.PARITY, guidance_scale=1.5),
    "sd": Teacher("teacher"),
    "v_prediction": Teacher("teacher_v_prediction", "v_prediction"),
    "sdxl": Teacher("teacher_sdxl", sdxl=True),
    "dit": Teacher("teacher_dit", "flow"),
}


def build_once(folder, build):
    """Call build(temporary folder) and rename, so that `folder` is complete wherever it exists."""
    if folder.exists():
        print(f"{folder} exists and is reused", flush=True)
        return
    print(f"building {folder}", flush=True)
    started = time.perf_counter()
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    build(unfinished)
    unfinished.rename(folder)
    print(f"built {folder} in {time.perf_counter() - started:.0f} s", flush=True)


def measure_once(path, measure):
    """Keep measure() = (results, images) as PATH.json and PATH.npy; the json, written last, says that both exist."""
    if path.with_suffix(".json").exists():
        print(f"{path}.json exists and is reused", flush=True)
        return
    results, images = measure()
    np.save(path.with_suffix(".npy"), images)
    with whole(path.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(results, indent=2) + "\n")


@contextlib.contextmanager
def beside(once, path, make):
    """Runs once(path, make) in a process of its own, on another core and without bars; waits for it where it leaves.

    once: `build_once` or `measure_once`; make can be pickled. What is there needs no process.
    """
    if path.exists() or path.with_suffix(".json").exists():
        once(path, make)
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_uninterrupted, args=(once, path, make), daemon=True)
    print(f"{path} is made beside what follows, on another core", flush=True)
    with mock.patch.dict(os.environ, TQDM_DISABLE="1"):  # read where tqdm is imported
        process.start()
    try:
        yield
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        raise UserError(f"a part of the demo ended with exit code {process.exitcode}; its own message is above")


def _uninterrupted(once, path, make):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the demo ends this process
    once(path, make)


def launch_words(script):
    """The words after `accelerate` that start a training script here, up to its flags."""
    words = ["launch", "--quiet", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    words += ["--dynamo_backend=no", *([] if torch.cuda.is_available() else ["--cpu"])]
    return [*words, os.path.relpath(ROOT / script)]


def launch(words):
    """Print and run `accelerate WORDS`, as a user would type it; UserError where it fails."""
    print("accelerate " + " \\\n    ".join(map(shlex.quote, words)), flush=True)
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.accelerate_cli", *words])
    if done.returncode:
        script = next(Path(word).name for word in words if word.endswith(".py"))
        raise UserError(f"{script} ended with exit code {done.returncode}; its own message is above")


class Judge:
    """The classifier with what it sees in the training images."""

    def __init__(self, folder):
        (train_images, _), (held_out_images, held_out_labels) = digits.load_split()
        self.network = metrics.load_feature_network(folder)
        self.train_features = self.features(train_images)
        self.held_out_images, self.held_out_labels = held_out_images, held_out_labels

    def features(self, images):
        return metrics.image_features(self.network, to_tensor(images), batch_size=256)

    def distance(self, images):
        return metrics.frechet_distance(self.features(images), self.train_features)

    def scores(self, images, words, captions):
        """The distance and what the classifier sees, see `metrics.class_statistics`; words: N indices in captions."""
        allowed = [captions.digits[word] for word in words]
        seen = metrics.class_statistics(self.network, to_tensor(images), allowed, batch_size=256)
        return {"frechet_distance": self.distance(images), "prompt_accuracy": seen.pop("accuracy")} | seen

    def held_out(self, captions):
        """The scores of the held-out digits: the best that a model can be expected to reach."""
        words = captions.word_of(self.held_out_labels)
        return self.scores(self.held_out_images, words.tolist(), captions)


def label(name, row):
    """What a row of images is called, of a model at its number of steps."""
    return f"{name}, {row['steps']} step{'s' * (row['steps'] > 1)}"


def to_tensor(images):
    """uint8 (N, H, W, 3) array to uint8 (N, 3, H, W) tensor."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def load_student(folder, teacher_dir):
    """What a method saved, as a stock pipeline: a whole one, or the teacher's with a U-Net or a LoRA from its file."""
    if (folder / "model_index.json").exists():
        return load_pipeline(str(folder))
    unet = folder / "unet"
    return load_pipeline(str(teacher_dir), **({"unet": unet} if unet.is_dir() else {"lora": folder}))


def measure_student(judge, folder, teacher_dir, recipe, seed, teacher):
    """The student at its method's numbers of steps, or the model of every stage at the number that it is for.

    teacher: the `Teacher` in teacher_dir.
    """
    guidance_scale = recipe["guidance_scale"] or teacher.guidance_scale
    stages = {stage: [int(stage.name.split("-k")[1])] for stage in sorted(folder.glob("stage-*"))}
    measured = [
        measure(judge, load_student(part, teacher_dir), steps, guidance_scale, seed, teacher.captions)
        for part, steps in (stages or {folder: recipe.get("steps", STUDENT_STEPS)}).items()
    ]
    rows = [row for results, _ in measured for row in results["rows"]]
    return measured[0][0] | {"rows": rows}, np.concatenate([images for _, images in measured])


def measure_teacher(judge, folder, steps, seed, teacher):
    """As well as it samples in few steps. With DDIM from the last timestep down: the checkpoint's own spacing never
    sees noise at one and two steps. A flow's few steps end at an even schedule's last sigma instead of at the data.
    """
    pipeline = load_pipeline(str(folder))
    shipped = pipeline.scheduler
    if hasattr(shipped, "alphas_cumprod"):
        pipeline.scheduler = DDIMScheduler.from_config(shipped.config, clip_sample=False, timestep_spacing="trailing")
        return measure(judge, pipeline, steps, teacher.guidance_scale, seed, teacher.captions)

    def schedule(num_inference_steps):
        change = probes.repairs(shipped, num_inference_steps)[-1] if 1 < num_inference_steps < 20 else {}
        pipeline.scheduler = type(shipped).from_config(shipped.config, **change)

    return measure(judge, pipeline, steps, teacher.guidance_scale, seed, teacher.captions, schedule)


def measure(judge, pipeline, steps, guidance_scale, seed, captions=digits.NAMED, schedule=None):
    """Sample NUM_SETS sets at every number of steps. Returns the results, and images (len(steps), 10, H, W, 3).

    schedule: called with each number of steps before it is sampled, to change the pipeline's scheduler.
    """
    prompts = digits.canonical_prompts(SET_SIZE, captions)
    words = [index % len(captions.words) for index in range(SET_SIZE)]
    rows, shown = [], []
    for num_inference_steps in steps:
        scores, seconds = [], 0.0
        num_sets = 1 if num_inference_steps > LONG_STEPS else NUM_SETS
        if schedule:
            schedule(num_inference_steps)
        desc = f"measuring, {num_inference_steps} step{'s' * (num_inference_steps > 1)}"
        with tqdm(total=num_sets * SET_SIZE, desc=desc, unit="image") as progress:
            for index in range(num_sets):
                generator = torch.Generator().manual_seed(seed * NUM_SETS + index)
                images = []
                for start in range(0, SET_SIZE, SAMPLE_BATCH_SIZE):
                    batch = prompts[start : start + SAMPLE_BATCH_SIZE]
                    started = time.perf_counter()
                    images.append(sample(pipeline, batch, num_inference_steps, guidance_scale, generator))
                    seconds += time.perf_counter() - started
                    progress.update(len(batch))
                images = np.concatenate(images)
                scores.append(judge.scores(images, words, captions))
                if index == 0:
                    shown.append(images[:10])
        spread = np.std([score["frechet_distance"] for score in scores]) if num_sets > 1 else None
        rows.append(
            {"steps": num_inference_steps}
            | {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
            | {"frechet_distance_std": None if spread is None else float(spread)}
            | {"seconds_per_image": seconds / (num_sets * SET_SIZE)}
        )
    results = {
        "guidance_scale": guidance_scale,
        "num_sets": NUM_SETS,
        "set_size": SET_SIZE,
        "batch_size": SAMPLE_BATCH_SIZE,
        "threads": torch.get_num_threads(),
        "held_out": judge.held_out(captions),
        "rows": rows,
    }
    return results, np.stack(shown)


def sample(pipeline, prompts, num_inference_steps, guidance_scale, generator):
    """uint8 (N, H, W, 3)"""
    images = pipeline(
        prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="np",
        **(dit.CALL_KWARGS if isinstance(pipeline, StableDiffusion3Pipeline) else {}),
    ).images
    return (images * 255).round().astype(np.uint8)

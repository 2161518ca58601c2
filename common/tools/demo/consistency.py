"""The demo of consistency training: iCT and ECT from the same budget, beside a plain diffusion model of that budget.

`python -m common.tools.demo --method ct` comes here. Trains three class-conditional models of the digits at 8 pixels,
the data's own size, with `accelerate launch train_cm_ct_unconditional.py`: iCT, ECT and, as the reference, the
diffusion training that ECT begins with, for the whole budget. Samples the first two at 1 and 2 steps, the reference
with EDM's Heun sampler at 18 (35 evaluations of the network), and measures all as the demo measures Stable Diffusion:
enlarged to 16 pixels, on the demo's classifier. Writes `ct_report.md` and `ct_report.png`.
"""

import json
import resource
import time
from pathlib import Path

from common.ct import consistency
from common.results import metrics, samples
from common.tools.demo import digits, measuring, stable_diffusion

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline
from PIL import Image

RESOLUTION = 8
SCRIPT = "train_cm_ct_unconditional.py"
HEUN_STEPS = 18
UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [48, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "dropout": 0.0,
}
FLAGS = {
    "resolution": RESOLUTION,
    "class_conditional": None,  # a flag without a value
    "use_ema": None,
    "ema_max_decay": 0.998,
    "train_batch_size": 64,
    "max_train_steps": 3000,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "discretization_s_1": 80,
    "validation_steps": 1000,
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 1,
    "logging_steps": 50,
    "eval_batch_size": 10,
}
RUNS = {
    "ict": {"objective": "ict"},
    "ect": {"objective": "ect", "pretrain_steps": 1800, "ect_stages": 4},
    "diffusion": {"objective": "ect", "pretrain_steps": FLAGS["max_train_steps"]},
}


def run(output_dir, seed):
    """Data, classifier, three trainings, measurements, report; whatever is complete is reused."""
    output_dir = Path(output_dir)
    measuring.build_once(
        output_dir / "classifier", lambda folder: stable_diffusion.build_classifier(folder, seed=seed)
    )
    measuring.build_once(output_dir / "ct_digits", write_digits)
    (output_dir / "ct_unet.json").write_text(json.dumps(UNET, indent=1) + "\n")
    judge = measuring.Judge(output_dir / "classifier")
    for name in RUNS:
        folder = output_dir / f"ct_{name}"
        if (folder / "README.md").exists():  # the card, which the script writes last
            print(f"{folder} is complete and reused; --rebuild starts over", flush=True)
        else:
            train(output_dir, folder, RUNS[name], seed)
        measuring.measure_once(folder / "metrics", lambda name=name, folder=folder: measure(judge, folder, name, seed))
    write_report(output_dir)


def built_names():
    return ["ct_digits", "ct_cache", *(f"ct_{name}" for name in RUNS)]


def write_digits(folder):
    """The training digits as an image folder, a subfolder for each class: 8x8 pixels, white on black."""
    images, labels = digits.load_small()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{index:04d}.png")
    digits.write_card(
        folder, "Handwritten digits, a folder for each class", f"{len(images)} images, {RESOLUTION} pixels."
    )


def training_command(output_dir, folder, flags, seed):
    """The words after `accelerate`, as a user would type them."""
    command = [
        *measuring.launch_words(SCRIPT),
        f"--train_data_dir={output_dir / 'ct_digits'}",
        f"--model_config_name_or_path={output_dir / 'ct_unet.json'}",
        f"--output_dir={folder}",
        f"--cache_dir={output_dir / 'ct_cache'}",
        *(f"--{name}" if value is None else f"--{name}={value}" for name, value in (FLAGS | flags).items()),
        f"--seed={seed}",
    ]
    if folder.is_dir() and any(folder.iterdir()):
        command.append("--resume_from_checkpoint=latest")  # an earlier demo was interrupted here
    return command


def train(output_dir, folder, flags, seed):
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    measuring.launch(training_command(output_dir, folder, flags, seed))
    seconds, total = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = total.ru_utime + total.ru_stime - used.ru_utime - used.ru_stime
    (folder / "seconds.json").write_text(json.dumps({"wall": seconds, "cpu": cpu_seconds}))
    print(f"trained {folder} in {seconds:.0f} s, {cpu_seconds:.0f} s of one CPU", flush=True)


def measure(judge, folder, name, seed):
    """Sample NUM_SETS sets at every number of steps. Returns the results, and images (len(steps), 10, 16, 16, 3)."""
    pipeline = ConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    flags = json.loads((folder / "training_config.json").read_text())["flags"]
    num_sigmas, mid_sigma = flags["discretization_s_1"] + 1, flags["mid_sigma"]
    steps = [HEUN_STEPS] if name == "diffusion" else [1, 2]
    rows, shown = [], []
    for k in steps:
        timesteps = consistency.sampling_timesteps(k, mid_sigma, num_sigmas)
        distances, accuracies, started = [], [], time.perf_counter()
        for index in range(measuring.NUM_SETS):
            generator = torch.Generator().manual_seed(seed * measuring.NUM_SETS + index)
            labels = torch.arange(measuring.SET_SIZE) % 10
            if name == "diffusion":
                images = sample_heun(pipeline.unet, labels, generator)
            else:
                images = pipeline(
                    len(labels),
                    labels,
                    num_inference_steps=None,
                    timesteps=timesteps,
                    generator=generator,
                    output_type="np",
                ).images
            images = enlarge(images)
            distances.append(judge.distance(images))
            accuracies.append(
                metrics.class_statistics(
                    judge.network, measuring.to_tensor(images), [(label,) for label in labels.tolist()], 256
                )["accuracy"]
            )
            if index == 0:
                shown.append(images[:10])
        seconds = (time.perf_counter() - started) / (measuring.NUM_SETS * measuring.SET_SIZE)
        rows.append(
            {
                "steps": k,
                "frechet_distance": float(np.mean(distances)),
                "frechet_distance_std": float(np.std(distances)),
                "class_accuracy": float(np.mean(accuracies)),
                "seconds_per_image": seconds,
            }
        )
    trained = folder / "seconds.json"
    results = {
        "floor": judge.held_out(digits.NAMED)["frechet_distance"],
        "training_seconds": json.loads(trained.read_text()) if trained.exists() else None,
        "rows": rows,
    }
    return results, np.stack(shown)


def sample_heun(unet, labels, generator):
    """float (N, 8, 8, 3) in [0, 1]"""
    noise = torch.randn((len(labels), 3, RESOLUTION, RESOLUTION), generator=generator)
    images = consistency.sample_heun(
        lambda x, sigma: consistency.consistency_function(unet, x, sigma, labels), noise, HEUN_STEPS
    )
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def enlarge(images):
    """float (N, 8, 8, 3) in [0, 1] to uint8 (N, 16, 16, 3), as the digits that the classifier knows were enlarged."""
    size = (digits.RESOLUTION, digits.RESOLUTION)
    pixels = (images * 255).round().astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in pixels])


def write_report(output_dir):
    """ct_report.md and ct_report.png over the runs that have been measured so far."""
    paths = {name: output_dir / f"ct_{name}" / "metrics.json" for name in RUNS}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    lines = report_lines(results)
    (output_dir / "ct_report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labels = [measuring.label(name, row) for name, result in results.items() for row in result["rows"]]
    images = [measuring.to_tensor(row) for name in results for row in np.load(paths[name].with_suffix(".npy"))]
    samples.image_grid(images, labels, list(digits.WORDS), scale=3).save(output_dir / "ct_report.png")
    print("\n".join(lines), flush=True)
    print(f"\nwritten: {output_dir / 'ct_report.md'}, {output_dir / 'ct_report.png'}", flush=True)


def report_lines(results):
    lines = [
        "# Consistency models of handwritten digits",
        "",
        "| model | steps | Fréchet distance | class accuracy | s/image | training, CPU |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        seconds = result["training_seconds"] and result["training_seconds"]["cpu"]
        for row in result["rows"]:
            distance = f"{row['frechet_distance']:.2f} ± {row['frechet_distance_std']:.2f}"
            lines.append(
                f"| {name} | {row['steps']} | {distance} | {row['class_accuracy']:.3f} | "
                f"{row['seconds_per_image']:.4f} | {'' if seconds is None else f'{seconds:.0f} s'} |"
            )
    floor = next(iter(results.values()))["floor"]
    counts = sorted({int((FLAGS | RUNS[name])["max_train_steps"]) for name in results})
    updates = " or ".join(f"{count:,}" for count in counts)
    return [
        *lines,
        "",
        f"Floor: the {digits.NUM_HELD_OUT} held-out digits are at distance {floor:.2f} from the training digits.",
        "",
        f"- {updates} updates of {FLAGS['train_batch_size']} images, one network, "
        f"{RESOLUTION} pixels. `diffusion` is the diffusion training that ECT begins with, for the whole budget, "
        f"sampled with EDM's Heun sampler: {HEUN_STEPS} steps, {2 * HEUN_STEPS - 1} evaluations of the network.",
        f"- Every row: {measuring.NUM_SETS * measuring.SET_SIZE:,} samples in {measuring.NUM_SETS} sets, every "
        "digit equally often, enlarged to 16 pixels and measured as the Stable Diffusion demo does; ± is the spread "
        "of the sets.",
        f"- Data: {digits.DATA_NOTE}.",
        "",
        "![samples](ct_report.png)",
    ]

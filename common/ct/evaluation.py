"""Samples of consistency models during training: grids for people, distances to the training data for the record."""

import itertools
import json
import math
from pathlib import Path

from common.files import whole
from common.keyed_random import keyed_seed
from common.results import metrics, samples
from common.run.checkpointing import BEST

import torch
from diffusers import ConsistencyModelPipeline
from tqdm import tqdm

METRICS = "metrics.jsonl"


@torch.no_grad()
def sample(unet, scheduler, labels, timesteps, seed, autocast):
    """One batch through the stock pipeline: uint8 (B, 3, H, W) on the CPU, the same for a seed at any time.

    labels: B classes, or None for each. timesteps: as from `consistency.sampling_timesteps`. autocast: makes the
    context that the U-Net runs under.
    """
    pipeline = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    class_labels = None if labels[0] is None else torch.tensor(labels)
    generator = torch.Generator("cpu").manual_seed(seed)
    with autocast(), samples.eval_mode(unet):
        images = pipeline(
            len(labels),
            class_labels,
            timesteps=timesteps,
            generator=generator,
            output_type="pt",
            num_inference_steps=None,
        ).images  # (B, 3, H, W) in [0, 1]
    return (images * 255).round().to(torch.uint8).cpu()


def sample_grid(accelerator, unets, scheduler, labels, timesteps, seed, step):
    """Sample {name: U-Net} at {number of steps: timesteps}, from one noise, and send the images to every tracker.

    Called by every process, which share the networks and numbers of steps. Returns {tag: uint8 (N, H, W, 3)} with the
    tags `validation/NAME_K_steps`.
    """

    def grid(job):
        name, k = job
        batch = sample(unets[name], scheduler, labels, timesteps[k], seed, accelerator.autocast)
        return batch.permute(0, 2, 3, 1).numpy()

    jobs = list(itertools.product(unets, timesteps))
    tags = [f"validation/{name}_{k}_steps" for name, k in jobs]
    images = dict(zip(tags, samples.share(accelerator, jobs, grid, kind=lambda job: job), strict=True))
    samples.log_images(accelerator.trackers, images, step)
    return images


def read_reference(data, limit):
    """Up to `limit` distinct images of one pass over `data` (a TrainingData with one lane), with their classes.

    Returns uint8 (N, 3, H, W), and N classes (None without classes).
    """
    images, labels, seen = [], [], set()
    with tqdm(total=limit, desc="reading the reference images", unit="image", delay=5) as progress:
        for batch in data:
            classes = batch["class_labels"].tolist() if "class_labels" in batch else [None] * len(batch["keys"])
            for key, image, label in zip(batch["keys"], batch["images"], classes, strict=True):
                if key in seen or len(images) == limit:
                    return torch.stack(images), labels
                seen.add(key)
                images.append(image)
                labels.append(label)
                progress.update()


class Evaluation:
    """Fréchet and kernel distance of samples to training images, on the features of an image network.

    network: from `metrics.load_feature_network`; reference: what `read_reference` returns. Samples have its classes,
    repeated in its order. With `class_accuracy` the network is a classifier of the same classes in the same order.
    """

    def __init__(self, accelerator, network, reference, num_samples, batch_size, seed, class_accuracy=False):
        self.accelerator, self.network, self.class_accuracy = accelerator, network, class_accuracy
        images, labels = reference
        self.reference_features = metrics.image_features(network, images)
        self.labels = [labels[i % len(labels)] for i in range(num_samples)]
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, unets, scheduler, timesteps):
        """Called by every process, which shares the work. Returns a row per network and number of steps, on all."""
        rows = []
        for name, unet in unets.items():
            for num_steps, ts in timesteps.items():
                row = {"network": name, "num_inference_steps": num_steps}
                rows.append(row | self._measure(unet, scheduler, ts))
        return rows

    def _measure(self, unet, scheduler, timesteps):
        def measure(job):
            index, start = job
            labels = self.labels[start : start + self.batch_size]
            seed = keyed_seed(self.seed, "evaluation", index)
            images = sample(unet, scheduler, labels, timesteps, seed, self.accelerator.autocast)
            hits = 0.0
            if self.class_accuracy:
                allowed = [(label,) for label in labels]
                hits = metrics.class_statistics(self.network, images, allowed)["accuracy"] * len(labels)
            return metrics.image_features(self.network, images).numpy(), hits

        batches = list(enumerate(range(0, len(self.labels), self.batch_size)))
        parts = samples.share(self.accelerator, batches, measure)
        features = torch.cat([torch.from_numpy(part) for part, _ in parts])
        if not torch.isfinite(features).all():
            return {"frechet_distance": None, "kernel_distance": None}  # weights that have diverged
        values = {
            "frechet_distance": metrics.frechet_distance(features, self.reference_features),
            "kernel_distance": metrics.kernel_distance(features, self.reference_features),
        }
        if self.class_accuracy:
            values["class_accuracy"] = sum(hits for _, hits in parts) / len(features)
        return values


def record(output_dir, step, rows, checkpoint=None, metric="frechet_distance"):
    """Append the rows of `step` to metrics.jsonl and note the best evaluation so far in best_checkpoint.json.

    Best is the lowest `metric` over all networks at the most steps measured; `checkpoints_total_limit` spares its
    checkpoint. checkpoint: the name of this step's, None where none is saved. Rows of later steps, and of this one,
    are those of a run that was killed and resumed: they are dropped. Returns the best row.
    """
    path = Path(output_dir, METRICS)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    kept = [row for row in kept if row["step"] < step]
    kept += [{"step": step, "checkpoint": checkpoint} | row for row in rows]
    with whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
    most = max(row["num_inference_steps"] for row in kept)
    rows_of_most = [row for row in kept if row["num_inference_steps"] == most]
    best = min(rows_of_most, key=lambda row: math.inf if row[metric] is None else row[metric])
    if best["step"] < step and not Path(output_dir, best["checkpoint"] or BEST).is_dir():
        best = best | {"checkpoint": None}  # pruned, when one of the rows that were dropped was better
    with whole(Path(output_dir, BEST)) as unfinished:
        unfinished.write_text(json.dumps({"metric": metric} | best, indent=1) + "\n")
    return best


def describe_best(output_dir):
    """The best evaluation of a run in words."""
    path = Path(output_dir, BEST)
    if not path.is_file():
        return "not measured: `eval_steps` and `feature_network` do that while it trains"
    best = json.loads(path.read_text())
    what = f"{best['metric'].replace('_', ' ')} {best[best['metric']]:.4g}" if best[best["metric"]] else "not finite"
    return f"{what} with {best['num_inference_steps']} steps, the best, at update {best['step']}; all in {METRICS}"


def flatten(rows):
    """Rows of an evaluation as {"eval/NETWORK_K_steps/METRIC": value} for trackers."""
    keys = ("network", "num_inference_steps")
    return {
        f"eval/{row['network']}_{row['num_inference_steps']}_steps/{name}": value
        for row in rows
        for name, value in row.items()
        if name not in keys and value is not None
    }

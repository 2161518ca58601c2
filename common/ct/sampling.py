"""Samples of consistency models during training, and the images that they are compared with."""

import itertools

from common.keyed_random import keyed_seed
from common.results import evaluation, samples

import torch
from diffusers import ConsistencyModelPipeline
from tqdm import tqdm


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

    Called by every process. Returns {tag: uint8 (N, H, W, 3)} with the
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


def open_evaluation(accelerator, network, reference, *, name, num_samples, batch_size, class_accuracy=False):
    """The `evaluation.Evaluation` against training images.

    network: of the path `name`, from `metrics.load_feature_network`. reference: what `read_reference` returns. Samples
    have its classes, repeated in its order. With class_accuracy the network is a classifier of the same classes.
    """
    images, labels = reference
    features, saturations = evaluation.observe(network, images)
    mark = {"name": "the data"} | evaluation.score(features, saturations, groups=labels)
    judge = evaluation.judge_of(network=name, images=num_samples, reference=len(images), batch_size=batch_size)
    groups = [labels[i % len(labels)] for i in range(num_samples)]
    return evaluation.Evaluation(accelerator, network, features, groups, batch_size, mark, judge, class_accuracy)


def sampled(evaluate, unets, scheduler, timesteps, seed):
    """The function sample(name, number of steps, start, stop) that `evaluate`, an Evaluation, takes; of {name: U-Net}
    at {number of steps: timesteps}."""

    def sample_part(name, num_steps, start, stop):
        labels, own_seed = evaluate.groups[start:stop], keyed_seed(seed, "evaluation", start // evaluate.batch_size)
        autocast = evaluate.accelerator.autocast
        return sample(unets[name], scheduler, labels, timesteps[num_steps], own_seed, autocast)

    return sample_part

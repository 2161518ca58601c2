"""Samples during training, from the modules at hand, to every tracker."""

import contextlib
import itertools

from common import UserError, export, models

import numpy as np
import torch
from accelerate.utils import gather_object


def share(accelerator, jobs, work):
    """[work(job) for job in jobs], on every process: process r of n does jobs r, r + n, and so on.

    Called by every process; networks must be equal on all. work returns what can be pickled. An error on one process
    ends all: itself there, UserError on the others, which would wait for it in the next collective call.
    """
    rank, done, error = accelerator.process_index, {}, None
    try:
        for i in range(rank, len(jobs), accelerator.num_processes):
            done[i] = work(jobs[i])
    except Exception as raised:
        error = raised
    gathered = gather_object([(rank, done, error and f"{type(error).__name__}: {error}")])
    if error:
        raise error
    for other, _, failure in gathered:
        if failure:
            raise UserError(f"process {other} of {accelerator.num_processes} failed: {failure}")
    results = {i: result for _, done, _ in gathered for i, result in done.items()}
    return [results[i] for i in range(len(jobs))]


def make_pipeline(teacher, unet, scheduler):
    """A pipeline like `teacher` around other modules that are already loaded; nothing is read or copied."""
    parts = teacher.components | {"unet": unet, "scheduler": scheduler}
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    if models.is_sdxl(teacher):
        options["force_zeros_for_empty_prompt"] = teacher.config.force_zeros_for_empty_prompt
        options["add_watermarker"] = False
    pipeline = type(teacher)(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(pipeline, prompts, num_inference_steps, seed, resolution, autocast, **kwargs):
    """One image per prompt as uint8 (N, H, W, 3). Image i has a CPU generator of its own, seeded seed + i, so that
    neither the batch nor the run's own generators matter. kwargs go to the pipeline (guidance_scale).

    autocast: makes the context that the U-Net runs under. The VAE runs outside it, in its own dtype: SDXL's overflows
    in float16.
    """
    size = {"height": resolution, "width": resolution}
    images = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        options = {"num_inference_steps": num_inference_steps, "generator": generator, "output_type": "latent"}
        with autocast():
            latents = pipeline(prompt, **options, **size, **kwargs).images  # (1, 4, h, w)
        images.append(models.decode_latents(pipeline.vae, latents)[0])  # (3, H, W)
    pixels = ((torch.stack(images) / 2 + 0.5).clamp(0, 1) * 255.0).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


@contextlib.contextmanager
def eval_mode(*modules):
    """Modules in eval mode and uncompiled inside the block, each back in the mode it was in afterwards.

    Samples have other shapes than batches: compiled blocks would be compiled anew for each.
    """
    modes = [module.training for module in modules]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield [module.eval() for module in modules]
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


@contextlib.contextmanager
def going_on(accelerator, step):
    """Samples during training: whatever fails inside is said, and training goes on, with its weights as they are."""
    try:
        yield
    except Exception as error:
        accelerator.print(
            f"\nWARNING: sampling or measuring failed at step {step} ({export.first_line(error)}); training goes on "
            "with the weights that it has"
        )


def sample_grid(
    accelerator, teacher, unets, scheduler, prompts, num_inference_steps, seed, resolution, step, **kwargs
):
    """Sample every U-Net at every step count and send the images to every tracker.

    Called by every process, which share the images; each is the same for any number of processes. unets: {name:
    module}; num_inference_steps: list of int; step: the global step that the trackers show; kwargs: for the pipeline.
    Returns {tag: uint8 (N, H, W, 3)} with the tags `validation/NAME_K_steps`.
    """
    pipelines = {name: make_pipeline(teacher, unet, scheduler) for name, unet in unets.items()}

    def sample(job):
        name, steps, i = job
        options = steps, seed + i, resolution, accelerator.autocast
        return sample_images(pipelines[name], [prompts[i]], *options, **kwargs)[0]

    jobs = list(itertools.product(unets, num_inference_steps, range(len(prompts))))
    images = {}
    with eval_mode(*unets.values()):
        for (name, steps, _), image in zip(jobs, share(accelerator, jobs, sample), strict=True):
            images.setdefault(f"validation/{name}_{steps}_steps", []).append(image)
    images = {tag: np.stack(batch) for tag, batch in images.items()}
    log_images(accelerator.trackers, images, step)
    return images


def log_images(trackers, images, step):
    """Send {tag: uint8 (N, H, W, 3)} to all trackers, not only to the first."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images(images, step=step, dataformats="NHWC")
        elif tracker.name == "comet_ml":
            for tag, batch in images.items():
                for i, image in enumerate(batch):
                    tracker.tracker.log_image(image, name=f"{tag}/{i}", step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({tag: list(batch) for tag, batch in images.items()}, step=step)
        else:
            print(f"the tracker {tracker.name} takes no images", flush=True)

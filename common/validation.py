"""Samples during training, from the modules at hand, to every tracker."""

import contextlib

import numpy as np
import torch


def make_pipeline(teacher, unet, scheduler):
    """A pipeline like `teacher` around other modules that are already loaded; nothing is read or copied."""
    parts = teacher.components | {"unet": unet, "scheduler": scheduler}
    safety = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipeline = type(teacher)(**parts, **safety)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(pipeline, prompts, num_inference_steps, seed, resolution, **kwargs):
    """One image per prompt as uint8 (N, H, W, 3). Image i has a CPU generator of its own, seeded seed + i, so that
    neither the batch nor the run's own generators matter. kwargs go to the pipeline (guidance_scale)."""
    images = [
        pipeline(
            prompt,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(seed + i),
            height=resolution,
            width=resolution,
            output_type="np",
            **kwargs,
        ).images[0]
        for i, prompt in enumerate(prompts)
    ]
    return (np.stack(images) * 255.0).round().clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def eval_mode(*modules):
    """Modules in eval mode inside the block, each back in the mode it was in afterwards."""
    modes = [module.training for module in modules]
    try:
        yield [module.eval() for module in modules]
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def sample_grid(
    accelerator, teacher, unets, scheduler, prompts, num_inference_steps, seed, resolution, step, **kwargs
):
    """Sample every U-Net at every step count and send the images to every tracker. Main process.

    unets: {name: module}; num_inference_steps: list of int; step: the global step that the trackers show; kwargs: for
    the pipeline. Returns {tag: uint8 (N, H, W, 3)} with the tags `validation/NAME_K_steps`.
    """
    images = {}
    with eval_mode(*unets.values()), accelerator.autocast():
        for name, unet in unets.items():
            pipeline = make_pipeline(teacher, unet, scheduler)
            for steps in num_inference_steps:
                images[f"validation/{name}_{steps}_steps"] = sample_images(
                    pipeline, prompts, steps, seed, resolution, **kwargs
                )
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

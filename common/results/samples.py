"""Samples during training, from the modules at hand, to every tracker."""

import contextlib
import itertools

from common import errors
from common.errors import UserError
from common.networks import encoders, sharded

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


def share(accelerator, jobs, work, kind=None):
    """[work(job) for job in jobs], on every process: process r of n does jobs r, r + n, and so on.

    Called by every process; networks must be equal on all. work returns what can be pickled. An error on one process
    ends all: itself there, UserError on the others, which would wait for it in the next collective call.

    kind: kind(job) is equal for jobs that run the same networks equally often; None: all do. Networks whose weights
    are split run on all processes at once, so these do jobs of one kind at a time, the last one again where there are
    fewer; an error on one, which the others would wait for inside of a network, ends the run.
    """
    rank, done, error = accelerator.process_index, {}, None
    try:
        for i, counts in _order(accelerator, jobs, kind):
            result = work(jobs[i])
            done |= {i: result} if counts else {}
    except Exception as raised:
        error = raised
    if error and is_split(accelerator):
        raise UserError(f"process {rank}: {type(error).__name__}: {error}", on_one_rank=True) from error
    gathered = gather_object([(rank, done, error and f"{type(error).__name__}: {error}")])
    if error:
        raise error
    for other, _, failure in gathered:
        if failure:
            raise UserError(f"process {other} of {accelerator.num_processes} failed: {failure}")
    results = {i: result for _, done, _ in gathered for i, result in done.items()}
    return [results[i] for i in range(len(jobs))]


def is_split(accelerator):
    """Whether the accelerator splits the weights of networks over the processes."""
    return getattr(accelerator, "sharding", None) is not None


def _order(accelerator, jobs, kind):
    """(index, whether its result counts) of this process's jobs, as `share` says."""
    rank, n = accelerator.process_index, accelerator.num_processes
    if not is_split(accelerator):
        return [(i, True) for i in range(rank, len(jobs), n)]
    kinds = [kind(job) if kind else None for job in jobs]
    rounds = []
    for i in range(len(jobs)):
        if not rounds or len(rounds[-1]) == n or kinds[rounds[-1][0]] != kinds[i]:
            rounds.append([])
        rounds[-1].append(i)
    return [(each[min(rank, len(each) - 1)], rank < len(each)) for each in rounds]


def make_pipeline(teacher, unet, scheduler):
    """A pipeline like `teacher` around other modules that are already loaded; nothing is read or copied."""
    parts = teacher.components | {"unet": unet, "scheduler": scheduler}
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    if encoders.is_sdxl(teacher):
        options["force_zeros_for_empty_prompt"] = teacher.config.force_zeros_for_empty_prompt
        options["add_watermarker"] = False
    pipeline = type(teacher)(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(pipeline, prompts, num_inference_steps, seed, resolution, autocast, batch_size=1, **kwargs):
    """One image per prompt as uint8 (N, H, W, 3). Image i has a CPU generator of its own, seeded seed + i, so that
    neither the batch nor the run's own generators matter. kwargs go to the pipeline (guidance_scale).

    autocast: makes the context that the U-Net runs under. batch_size: images that it makes at once. The VAE decodes
    them one by one, outside of the context, in its own dtype: SDXL's overflows in float16.
    """
    size = {"height": resolution, "width": resolution}
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))]
        options = {"num_inference_steps": num_inference_steps, "generator": generators, "output_type": "latent"}
        with autocast():
            latents = pipeline(batch, **options, **size, **kwargs).images  # (B, 4, h, w)
        images += [encoders.decode_latents(pipeline.vae, one)[0] for one in latents.split(1)]  # (3, H, W)
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
        sharded.reshard(*modules)
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


@contextlib.contextmanager
def going_on(accelerator, step):
    """Samples during training: whatever fails inside is said, and training goes on, with its weights as they are; but
    for what one process alone has left, which the others still run."""
    try:
        yield
    except Exception as error:
        if is_split(accelerator) and getattr(error, "on_one_rank", False):
            raise
        if accelerator.is_main_process:
            failure = f"sampling or measuring failed at step {step} ({errors.first_line(error)})"
            tqdm.write(f"WARNING: {failure}; training goes on with the weights that it has")


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
        done = share(accelerator, jobs, sample, kind=lambda job: job[:2])
        for (name, steps, _), image in zip(jobs, done, strict=True):
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


def image_grid(rows_of_images, row_labels=None, column_labels=None, scale=1):
    """Draw rows of images as one labelled picture.

    rows_of_images: a list of uint8 tensors (columns, 3, H, W), all of one H and W; rows may differ in length.
    row_labels, column_labels: strings (long ones are wrapped, then cut) or None. scale: an integer; every pixel
    becomes scale x scale, without smoothing. Returns an RGB PIL.Image on white.
    """
    columns = max(len(row) for row in rows_of_images)
    height, width = (side * scale for side in rows_of_images[0].shape[2:])
    gap, font = 4, ImageFont.load_default(size=12)
    left = max((int(font.getlength(label)) for label in row_labels or []), default=-2 * gap) + 2 * gap
    titles = [_wrapped(label, font, width) for label in column_labels or []]
    top = max((title.count("\n") + 1 for title in titles), default=0) * 16 + gap
    size = (left + columns * (width + gap), top + len(rows_of_images) * (height + gap))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        draw.multiline_text((left + column * (width + gap), 1), title, fill="black", font=font, spacing=2)
    for row, images in enumerate(rows_of_images):
        y = top + row * (height + gap)
        if row_labels:
            draw.text((gap, y + height // 2), row_labels[row], fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left + column * (width + gap), y))
    return grid


def _wrapped(text, font, width, max_lines=4):
    """text broken into lines of at most width pixels; what does not fit becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + " …"]
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(line, font, width):
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"

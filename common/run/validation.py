"""What a run shows and measures of its student while it trains: grids for people, and evaluations that tell which
checkpoint is the best and when to stop.

Whatever fails in the loop is said, and training goes on. What fails before it, a feature network that cannot be loaded
or a reference that cannot be read, ends the run in one sentence while it has cost nothing yet.
"""

import contextlib
from pathlib import Path

from common.errors import UserError, speaking_of
from common.files import whole
from common.flags import spelled
from common.networks import lora
from common.results import evaluation, metrics, samples
from common.run import reference, screen

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers import DDIMScheduler

TEACHER_STEPS = 25  # of DDIM, in which the teacher's samples are made
FEATURES = "teacher.npz"  # under evaluation.FOLDER
MANY = 10_000  # images of a reference, at most


def load_feature_network(args, device, side=64, classes=None):
    """`metrics.load_feature_network` for `feature_network`, None without `eval_steps`.

    UserError where it cannot be loaded or used, tried on one image of `side` pixels, and where it is no classifier of
    so many classes, if that is asked for.
    """
    if not args.eval_steps:
        return None
    flag = f"`feature_network`={args.feature_network}"
    try:
        network = metrics.load_feature_network(args.feature_network, device, cache_dir=args.cache_dir)
        images = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        metrics.image_features(network, images)
        found = metrics.class_logits(network, images).shape[1] if classes else None
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} cannot be used ({reason}); name another network") from None
    if found != classes:
        raise UserError(f"{flag} knows {found} classes and the data have {classes}; drop `eval_class_accuracy`")
    if reference_name := getattr(args, "eval_reference", None):
        with speaking_of("`eval_reference`", "reference"):
            reference.check_reference(reference_name)
    return network


def describe(args):
    """What evaluations cost, in words, as far as the flags tell: how many samples every how many updates."""
    number = getattr(args, "eval_num_images", None) or args.eval_num_samples
    names = ("eval_nfe", "validation_num_inference_steps", "num_inference_steps")
    steps = next((value for name in names if (value := getattr(args, name, None))), "the stage's number of")
    steps = ", ".join(map(str, steps)) if isinstance(steps, list) else steps
    networks = " of each network" if getattr(args, "use_ema", False) else ""
    times = -(-args.max_train_steps // args.eval_steps)
    text = f"{number} samples{networks} in {steps} steps every {args.eval_steps} updates, {times} times"
    if hasattr(args, "stage_segments"):
        text += "; at the end of each stage"
    if hasattr(args, "eval_prompts"):
        text += f"; and once {number} of the teacher in {TEACHER_STEPS} steps"
    return text


class Judge:
    """The evaluations of a run: measured, kept, told and drawn. Called by every process."""

    def __init__(self, run, evaluate):
        """evaluate: an `evaluation.Evaluation`."""
        self.run, self.evaluate = run, evaluate

    def __call__(self, sample, names, steps, stage=None, at=None):
        """Before the checkpoint of an update, which is saved also where it is the best so far.

        sample, names, steps: as of `evaluation.Evaluation`. stage: what rows compare within, or None. at: the number
        of steps at which the best is chosen, default: the most.
        """
        run, accelerator, best = self.run, self.run.accelerator, None
        output_dir, step = run.args.output_dir, run.global_step
        with samples.going_on(accelerator, step):
            rows = self.evaluate(sample, names, steps)
            accelerator.log(evaluation.flatten(rows), step=step)
            if accelerator.is_main_process:
                rows = [row | ({"stage": stage} if stage else {}) for row in rows]
                best = evaluation.record(output_dir, step, rows, f"checkpoint-{step}", is_saved=run.saves, at=at)
                rows = evaluation.read_rows(output_dir)
                for line in evaluation.report(rows, best, self.evaluate.mark):
                    screen.say(spelled(line))
                evaluation.draw(output_dir, rows, self.evaluate.mark)
        run.is_best = broadcast_object_list([best is not None and best["step"] == step])[0]


class TextValidation:
    """Samples of a Stable Diffusion run, by prompts: grids, and evaluations of the student.

    After `run.register`. Where evaluations are asked for, the teacher is sampled first, once for a run.
    """

    def __init__(
        self, run, teacher, *, network, shown, scheduler, guidance_scale, teacher_unet, teacher_guidance_scale
    ):
        """teacher: its pipeline. network: from `load_feature_network`. shown: {name: U-Net} of the grids; its
        "student" is evaluated. scheduler, guidance_scale: that they are sampled with. teacher_unet: the student's base
        where that is a LoRA."""
        self.run, self.args, self.teacher, self.shown, self.scheduler = run, run.args, teacher, shown, scheduler
        self.guidance_scale = guidance_scale
        if self.args.eval_steps:
            self.judge = Judge(run, self._open(network, teacher_unet, teacher_guidance_scale))

    def grid(self, *own_steps):
        """Sample the prompts and send them to the trackers: {tag: uint8 (N, H, W, 3)}. By every process."""
        return samples.sample_grid(
            self.run.accelerator,
            self.teacher,
            unets=self.shown,
            scheduler=self.scheduler,
            prompts=self.run.prompts,
            num_inference_steps=self._steps(own_steps),
            seed=self.args.seed,
            resolution=self.args.resolution,
            step=self.run.exported_step,
            guidance_scale=self.guidance_scale,
        )

    def show(self, *own_steps, name=None):
        """`grid`, and a picture of it, as of `TrainingRun.show`; None where that fails, which is said."""
        images = None
        with samples.going_on(self.run.accelerator, self.run.global_step):
            images = self.grid(*own_steps)
            self.run.show(images, labels=self.run.prompts, name=name)
        return images

    def evaluate(self, *own_steps, stage=None):
        """Measure the student. own_steps: a stage's number of steps, at which its best is chosen."""
        if self.args.eval_steps and not self.run.stopped:
            student = {"student": self.shown["student"]}
            self.judge(self._sampled(student), student, self._steps(own_steps), stage, at=max(own_steps, default=None))

    def _steps(self, own_steps):
        steps = self.args.validation_num_inference_steps or []
        return sorted({*own_steps, *steps}) if own_steps else list(dict.fromkeys(steps))

    def _sampled(self, unets, scheduler=None, seed=None, guidance_scale=None):
        """The function sample(name, num_inference_steps, start, stop) that `evaluation.Evaluation` takes."""
        scheduler, seed = scheduler or self.scheduler, self.args.seed if seed is None else seed
        pipelines = {name: samples.make_pipeline(self.teacher, unet, scheduler) for name, unet in unets.items()}
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale

        def sample(name, num_inference_steps, start, stop):
            with samples.eval_mode(unets[name]):
                images = samples.sample_images(
                    pipelines[name],
                    [self.prompts[i % len(self.prompts)] for i in range(start, stop)],
                    num_inference_steps,
                    seed + start,
                    self.args.resolution,
                    self.run.accelerator.autocast,
                    batch_size=self.args.train_batch_size,
                    guidance_scale=guidance_scale,
                )
            return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

        return sample

    def _open(self, network, teacher_unet, teacher_guidance_scale):
        """The `evaluation.Evaluation` against held-out images, or else the teacher's samples."""
        args, self.prompts = self.args, self.run.eval_prompts
        groups = [i % len(self.prompts) for i in range(args.eval_num_images)]
        settings = {
            "network": args.feature_network,
            "images": args.eval_num_images,
            "prompts": self.prompts,
            "seed": args.seed,
            "resolution": args.resolution,
            "teacher_guidance_scale": teacher_guidance_scale,
        }

        def sample(start, stop):
            # other noise than the student's: at any number of steps, a perfect one has the same distance
            scheduler = DDIMScheduler.from_config(
                {"clip_sample": False} | self.teacher.scheduler.config, timestep_spacing="trailing"
            )
            seed = args.seed + args.eval_num_images
            sampled = self._sampled({"teacher": teacher_unet}, scheduler, seed, teacher_guidance_scale)
            without = lora.adapters_off(teacher_unet) if lora.lora_layers(teacher_unet) else contextlib.nullcontext()
            with torch.no_grad(), without:
                return sampled("teacher", TEACHER_STEPS, start, stop)

        features, saturations = teacher_features(
            self.run, network, sample, args.eval_num_images, args.train_batch_size, settings
        )
        images = None
        if args.eval_reference:
            images = held_out_features(args, network, args.resolution, args.resolution)
        return against_teacher(
            self.run, network, features, saturations, groups, args.train_batch_size, settings, TEACHER_STEPS, images
        )


def held_out_features(args, network, height, width):
    """Features of the images of `eval_reference`, (M, d)."""
    with speaking_of("`eval_reference`", "reference"):
        return reference.reference_features(args.eval_reference, network, height, width, limit=MANY)


def against_teacher(
    run, network, features, saturations, groups, batch_size, settings, num_inference_steps, images=None
):
    """The `evaluation.Evaluation` of a run with a teacher, whose row is put into metrics.jsonl.

    features, saturations: of the teacher's samples; groups: of them, see `metrics.diversity`. settings: what both are
    made with, JSON-able. images: features of held-out images, which are the reference then.
    """
    values = evaluation.score(features, saturations, images, groups)
    if values["diversity"] is None:
        raise UserError("`eval_steps`: the teacher's samples give features that are not finite; drop it")
    judge = evaluation.judge_of(**settings, held_out=run.args.eval_reference if images is not None else None)
    if run.accelerator.is_main_process:
        evaluation.record_teacher(run.args.output_dir, values, num_inference_steps, judge)
    words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
    run.accelerator.print(f"{len(features)} samples of the teacher: {words}")
    mark = {"name": "the teacher"} | values
    reference_features = features if images is None else images
    return evaluation.Evaluation(run.accelerator, network, reference_features, groups, batch_size, mark, judge)


def teacher_features(run, network, sample, num_images, batch_size, settings):
    """(features, saturations) of the teacher's samples, by sample(start, stop): kept in `output_dir` for a resume.

    settings: what they are made with; what is kept of others is made anew. By every process.
    """
    accelerator, path = run.accelerator, Path(run.args.output_dir, evaluation.FOLDER, FEATURES)
    name, kept = evaluation.judge_of(**settings), None
    if accelerator.is_main_process and path.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError), np.load(path, allow_pickle=False) as arrays:
            if arrays["made_with"].item() == name:
                kept = arrays["features"], arrays["saturations"]
    kept = broadcast_object_list([kept])[0]
    if kept is not None:
        return tuple(torch.from_numpy(array) for array in kept)
    accelerator.print(f"sampling the teacher, {num_images} images, to compare the student with")
    features, saturations, _ = evaluation.sample_and_observe(accelerator, network, sample, num_images, batch_size)
    if accelerator.is_main_process:
        path.parent.mkdir(exist_ok=True)
        with whole(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, features=features.numpy(), saturations=saturations.numpy(), made_with=name)
    return features, saturations

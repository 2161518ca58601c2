"""What direct distillation checks and measures of a student, and how it is called."""

import contextlib
import types
from pathlib import Path

from common.direct import pixels, stepwise
from common.direct.pipelines import SCHEDULE_ARGUMENTS, public_kwargs, weights_sample
from common.direct.probes import (
    before_denoiser,
    check_draws,
    guidance_off,
    guides,
    is_wasted,
    noise_sha256,
    observe,
    repair_last_step,
    scheduler_class,
    student_scheduler,
    without_guidance,
)
from common.direct.tasks import arguments as call_arguments
from common.errors import CALL_ERRORS, UserError, blame
from common.networks import fusing, outlines, sharded
from common.networks.weights import check_network, find_files
from common.run.updates import REPAIR, broken_weights, networks_of

import torch
from safetensors import safe_open


@torch.no_grad()
def measure(rollout, data, indices, batch_size, kept=(), share=None):
    """(mean squared error over the variance of the teacher's latents, {index: student's latents} of pairs `kept`).

    share: `samples.share` with its accelerator, where every process calls this and does a part of it.
    """

    def of_batch(batch):
        target, student = data.latents(batch).float().cpu(), roll_out(rollout, data, batch).cpu()
        error = (student - target).double().square().sum().item()
        sums = error, target.double().sum().item(), target.double().square().sum().item(), target.numel()
        return sums, {i: latents.clone() for i, latents in zip(batch, student, strict=True) if i in kept}

    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    results = share(batches, of_batch) if share else list(map(of_batch, batches))
    error, total, squares, count = (sum(values) for values in zip(*(sums for sums, _ in results), strict=True))
    made = {i: latents for _, part in results for i, latents in part.items()}
    return error / (squares - total**2 / count), made


def check_pairs(config, pairs_config, folder, teacher_lora=None):
    """The scheduler that made the pairs, (class, configuration), the teacher's own without pairs_config.

    config: the teacher's, as from `read_pipeline_config`. UserError when the pairs are of another pipeline, or of one
    with another `teacher_lora`.
    """
    if pairs_config is None:
        return config["scheduler"]
    made_by = pairs_config["pipeline"]
    if made_by != config["class"].__name__:
        raise UserError(
            f"`pairs_dir`={folder}: a {made_by} made these pairs, `pretrained_teacher_model` is a "
            f"{config['class'].__name__}; name the teacher that made them"
        )
    if pairs_config.get("teacher_lora", []) != fusing.identity(teacher_lora):
        raise UserError(f"`pairs_dir`={folder}: made with another `teacher_lora`, or with none; pass the same one")
    recorded = pairs_config["scheduler"]
    return scheduler_class("`pairs_dir`: its scheduler", recorded["class"]), recorded["config"]


def check_teacher(pipeline, pairs_config, folder):
    """UserError for NaN in the weights of a pipeline, and unless `check_same_weights`; of what is there already: the
    weights of `outlines` come later. Called by every process where weights are split."""
    networks = networks_of(pipeline)
    there = {name: network for name, network in networks.items() if not outlines.is_one(network)}
    if len(there) == len(networks):
        check_same_weights(pipeline, pairs_config, folder)
    if broken := broken_weights(there):  # no sample is to blame for what it computes
        raise UserError(f"{broken}; {REPAIR}")


def check_same_weights(pipeline, pairs_config, folder):
    """UserError unless the pipeline's denoisers have the weights that made the pairs, up to a half precision, and so
    its VAE's encoder, where that made the latents of images."""
    if pairs_config is None:
        return
    here, there = weights_sample(pipeline), pairs_config["weights_sample"]
    if pairs_config.get("encoder_sample"):
        here, there = here | weights_sample(pipeline, encoder=True), there | pairs_config["encoder_sample"]
    same = here.keys() == there.keys() and all(
        torch.allclose(torch.tensor(here[name]), torch.tensor(there[name]), rtol=0.02, atol=1e-4) for name in here
    )
    if not same:
        raise UserError(
            f"`pairs_dir`={folder}: {pairs_config['model']} made these pairs, and `pretrained_teacher_model` has "
            "other weights; name the teacher that made them"
        )


GUIDANCE = {"guidance_scale", "true_cfg_scale"}
FROM_PAIRS = ("prompt", "generator", "latents", "height", "width", "num_frames", "output_type", "return_dict")


def check_overrides(pipeline_class, overrides, num_inference_steps):
    """UserError for `student_kwargs` that the pipeline's call does not take, or that are the script's own."""
    for name in overrides:
        if name == "num_inference_steps":
            raise UserError("`student_kwargs`: num_inference_steps has a flag of its own, `num_inference_steps`")
        if name in FROM_PAIRS or name.endswith("_per_prompt"):
            raise UserError(f"`student_kwargs`: {name} comes from the pairs and the script; leave it out")
        if name not in call_arguments(pipeline_class):
            raise UserError(f"`student_kwargs`: the call of {pipeline_class.__name__} has no {name}")
    for name in {"sigmas", "timesteps"} & overrides.keys():
        if not isinstance(overrides[name], list) or len(overrides[name]) != num_inference_steps:
            raise UserError(f"`student_kwargs`: {name} must be a list of {num_inference_steps}, one for each step")


def check_start(init_student, networks):
    """UserError unless the folder `init_student` holds denoisers of the teacher's form; needs no weights.

    networks: {part: (class, configuration)}. Nothing for None.
    """
    for part, (network_class, values) in networks.items() if init_student else ():
        flag, folder = f"`init_student`={init_student}", Path(init_student, part)
        if not folder.is_dir():
            raise UserError(
                f"{flag}: no folder {part} in it; name the output folder of a run that trained all weights"
            )
        check_network(flag, folder, network_class, of_pipeline=True)
        there = network_class.load_config(folder)
        for name in sorted(there.keys() & values.keys()):
            if not name.startswith("_") and there[name] != values[name] and there[name] != _as_list(values[name]):
                raise UserError(
                    f"{flag}: it is no student of this teacher, its {name} is {there[name]} and not {values[name]}"
                )


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value


def start_from(init_student, networks):
    """Copy the weights of an earlier student into {part: denoiser}, in place; nothing for None.

    They are read tensor by tensor, and of split ones each process reads its part. `check_start` comes before.
    """
    for part, network in networks.items() if init_student else ():
        tensors = network.state_dict()
        for path in find_files(Path(init_student, part), type(network))[0]:
            with safe_open(path, "pt") as file:
                for name in tensors.keys() & set(file.keys()):
                    scalar = not tensors[name].ndim
                    sharded.fill(tensors[name], file.get_tensor(name) if scalar else file.get_slice(name))


def possible_calls(pipeline, data, teacher_kwargs, num_inference_steps, overrides):
    """[arguments] of which one are those of the student's call, but for what is found out by asking its denoiser: they
    encode prompts alike, nearly always. Arguments, and what is raised, as of `student_kwargs`; no denoiser runs."""
    prompts, kwargs = _given(pipeline, data, teacher_kwargs, num_inference_steps, overrides)
    with _refusing(kwargs):
        found = [{}] if GUIDANCE & overrides.keys() else without_guidance(pipeline, prompts, kwargs)
    return [kwargs | off | {"num_inference_steps": num_inference_steps} for off in found]


def teachers_calls(pipeline, prompts, kwargs):
    """[arguments] of the calls that ask a teacher for its score; UserError where it refuses them. No denoiser runs."""
    call = kwargs | {"num_inference_steps": 2}
    with blame(f"`score_kwargs`: the teacher's call refuses {kwargs}", *CALL_ERRORS):
        before_denoiser(pipeline, prompts[:1], **call)
    return [call]


def _given(pipeline, data, teacher_kwargs, num_inference_steps, overrides):
    """(two prompts, what a student's call gets before anything is found out)"""
    check_overrides(type(pipeline), overrides, num_inference_steps)
    dropped = (*SCHEDULE_ARGUMENTS, "negative_prompt", "negative_prompt_2", "negative_prompt_3")
    kwargs = {name: value for name, value in teacher_kwargs.items() if name not in dropped}
    return (data.prompts * 2)[:2], kwargs | data.call_kwargs([0]) | overrides


@contextlib.contextmanager
def _refusing(kwargs):
    try:
        yield
    except CALL_ERRORS as error:
        raise UserError(
            f"`student_kwargs`, `student_scheduler`: the pipeline's call refuses {kwargs}: {error}"
        ) from error


def student_kwargs(pipeline, data, teacher_kwargs, num_inference_steps, overrides, repair=True, calls=None):
    """The arguments of the student's call, and sentences on what was found out: (kwargs, [notes]).

    teacher_kwargs: what the teacher was called with; overrides: `student_kwargs`. repair: whether a wasted last step
    is repaired, by changing `pipeline.scheduler`. calls: those of `possible_calls`, where they were found. Raises
    UserError when guidance stays on, when a step asks the denoiser more than once, or when sampling draws noise.
    """
    prompts, kwargs = _given(pipeline, data, teacher_kwargs, num_inference_steps, overrides)
    notes, sizes = [], {tuple(one) for one in getattr(data, "sizes", []) if one}
    with _refusing(kwargs):
        if not GUIDANCE & overrides.keys():
            kwargs |= guidance_off(pipeline, prompts, kwargs, calls)
        for height, width in sorted(sizes):
            kwargs |= pixels.fit(pipeline, prompts[0], kwargs, {"height": height, "width": width}, notes)
        kwargs |= {"num_inference_steps": num_inference_steps}
        check_draws("`student_scheduler`", pipeline, prompts, **kwargs)
        before, after, change, added = repair_last_step(pipeline, prompts, kwargs) if repair else (0, 0, {}, {})
        kwargs |= added
        seen = observe(pipeline, prompts, **kwargs)
    if change or added:
        notes.append(
            f"the last of {num_inference_steps} evaluations lay at {before:.3f} of the noise range, wasted; "
            f"the student's {'scheduler' if change else 'call'} has {change or added} and ends at {after:.3f}"
        )
    elif is_wasted(seen.last_time, num_inference_steps):
        notes.append(
            f"WARNING: the last of {num_inference_steps} evaluations lies at {seen.last_time:.3f} of the noise range, "
            "wasted; try `student_scheduler_kwargs`, or `student_kwargs` with sigmas"
        )
    if guides(seen, len(prompts)):
        raise UserError(f"`student_kwargs`: the student still guides with {kwargs}; leave guidance to the script")
    if seen.calls != num_inference_steps:
        raise UserError(
            f"`student_scheduler`: {type(pipeline.scheduler).__name__} asks the denoiser {seen.calls} times in "
            f"{num_inference_steps} steps; use one that asks once a step, such as DDIMScheduler"
        )
    for name in data.call_kwargs([0]):  # of each call's own images
        del kwargs[name]
    times = ", ".join(f"{t:g}" for t in pipeline.scheduler.timesteps.tolist())
    notes.append(f"the student's call: {public_kwargs(kwargs)}; {type(pipeline.scheduler).__name__} at {times}")
    return kwargs, notes


def call_of(pipeline, prompts, teacher_kwargs):
    """The arguments of a student's call as training finds them out, without flags of its own and for any number of
    steps: what its prompts are encoded with. teacher_kwargs: of the call that makes the pairs."""
    scheduler, data = pipeline.scheduler, types.SimpleNamespace(prompts=prompts, call_kwargs=lambda _: {})
    try:
        pipeline.scheduler, _ = student_scheduler(type(scheduler), scheduler.config)
        return student_kwargs(pipeline, data, teacher_kwargs, 4, {}, repair=False)[0]
    finally:
        pipeline.scheduler = scheduler


def check_noise(data, latents, index):
    """UserError unless this machine draws the noise that pair `index` started from; latents: (1, ...) of that pair."""
    if data.hashes and noise_sha256(data.seeds[index], latents.numel()) != data.hashes[index]:
        raise UserError(
            f"`pairs_dir`: seed {data.seeds[index]} gives another noise here than where the pairs were made (another "
            "version of torch or diffusers?); make the pairs with this installation"
        )


def roll_out(rollout, data, indices, shift=0, **kwargs):
    """The student's latents (B, ...) in float32 for pairs `indices`; shift: added to their seeds, of 64 bits."""
    prompts, seeds = [data.prompts[i] for i in indices], [(data.seeds[i] + shift) % 2**64 for i in indices]
    return rollout(prompts, seeds, **data.call_kwargs(indices) | kwargs).float()


def freeze_unused(rollout, data, indices, is_stepwise=False):
    """Freeze parameters that the backward pass of one batch does not reach, and return their names: DDP waits for
    every parameter that is not frozen. is_stepwise: see `stepwise`. UserError when no gradient reaches any.
    """
    with stepwise.recording(rollout, is_stepwise) as calls:
        latents = roll_out(rollout, data, indices)
    latents.square().mean().backward(retain_graph=is_stepwise)
    stepwise.take_back(rollout, calls)
    trained = {name: p for name, p in rollout.named_parameters() if p.requires_grad}
    unused = [name for name, p in trained.items() if p.grad is None]
    norms = [p.grad.float().norm() for p in trained.values() if p.grad is not None]
    if not norms or not torch.stack(norms).sum() > 0:
        raise UserError("`pretrained_teacher_model`: no gradient reaches its denoiser through the pipeline's call")
    for name, parameter in trained.items():
        parameter.grad = None
        parameter.requires_grad_(name not in unused)
    return unused

"""What a pipeline does, found out by running it for two or three steps instead of looked up in a table: how often it
asks its denoiser, which argument switches its guidance off, whether it draws more than the initial noise, and whether
its last step is wasted."""

import dataclasses
import hashlib
import inspect

from common.direct.pipelines import SCHEDULE_ARGUMENTS, call, denoisers, generators
from common.direct.tasks import arguments as call_arguments
from common.errors import CALL_ERRORS, UserError

import diffusers
import torch

# Their steps draw noise: two runs from one initial noise end apart, so there is nothing to regress onto.
STOCHASTIC = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDPMWuerstchenScheduler", "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler", "LCMScheduler",
    "TCDScheduler", "SCMScheduler", "CMStochasticIterativeScheduler", "CogVideoXDPMScheduler", "SASolverScheduler",
    "FlowMatchLCMScheduler", "ScoreSdeVeScheduler", "KarrasVeScheduler", "RePaintScheduler", "UnCLIPScheduler",
)  # fmt: skip
# More than one evaluation a step, and the scheduler of the same family with one, which students get instead.
SINGLE_EVALUATION = {
    "PNDMScheduler": "DDIMScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
}
WASTED = 0.1  # of the time axis: an evaluation below it changes next to nothing


def check_deterministic(flag, scheduler_class, config):
    """UserError, with the name of a scheduler to use instead, for one that draws noise at its steps; needs no weights.

    config: of the scheduler, a dict. What no name tells, such as eta in a call, `check_draws` finds.
    """
    name = scheduler_class.__name__
    sde = str(config.get("algorithm_type", "")).startswith("sde")
    if name in STOCHASTIC or sde or config.get("stochastic_sampling"):
        flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
        other = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        why = " (algorithm_type sde)" if sde else " (stochastic_sampling)" if config.get("stochastic_sampling") else ""
        raise UserError(
            f"{flag}: {name}{why} draws noise at its steps, distillation needs a deterministic one: {other}"
        )


def scheduler_class(flag, name):
    """The scheduler of diffusers that a flag names; UserError where there is none."""
    found = getattr(diffusers, name, None)
    if found is None or not name.endswith("Scheduler"):
        raise UserError(f"{flag}={name}: diffusers has no such scheduler; name a class such as DDIMScheduler")
    return found


def make_scheduler(flag, scheduler_class, config, changes=None):
    """A scheduler of that class with what it knows of `config`, changed; nothing is clipped, which kills gradients.

    UserError for a change that the class does not know, and for a scheduler that draws noise.
    """
    known = inspect.signature(scheduler_class.__init__).parameters
    changes = changes or {}
    if unknown := [name for name in changes if name not in known]:
        raise UserError(f"{flag}: {scheduler_class.__name__} has no {unknown[0]}; it has {', '.join(list(known)[1:])}")
    unclipped = {name: False for name in ("clip_sample", "thresholding") if name in known}
    options = {name: value for name, value in config.items() if name in known} | changes | unclipped
    check_deterministic(flag, scheduler_class, options)
    try:
        return scheduler_class(**options)
    except (*CALL_ERRORS, RuntimeError) as error:
        what = changes or "its configuration"
        raise UserError(f"{flag}: {scheduler_class.__name__} cannot be made with {what}: {error}") from None


def student_scheduler(base_class, config, class_name=None, changes=None):
    """The scheduler that a student is sampled with before its last step is looked at: (scheduler, [what was changed]).

    base_class, config: the teacher's, the latter a dict. class_name, changes: the user's; without a class of theirs,
    one that evaluates the network twice a step is replaced.
    """
    base = base_class.__name__
    name = class_name or SINGLE_EVALUATION.get(base, base)
    flag = "`student_scheduler_kwargs`" if changes else "`student_scheduler`"
    made = make_scheduler(flag, scheduler_class("`student_scheduler`", name), config, changes)
    replaced = name != base and not class_name
    return made, [f"{base} asks the network more than once a step: the student gets {name}"] if replaced else []


def check_steps(scheduler, num_inference_steps):
    """UserError for more steps than a scheduler has timesteps: some would be asked for twice."""
    most = scheduler.config.get("num_train_timesteps")
    if most and num_inference_steps > most:
        raise UserError(
            f"`num_inference_steps`={num_inference_steps}: {type(scheduler).__name__} has {most} timesteps; ask for "
            "at most so many"
        )


def last_time(scheduler):
    """Where the last evaluation of the schedule that is set lies: 0 (data) to 1 (noise), by its timestep."""
    return float(scheduler.timesteps[-1]) / scheduler.config.get("num_train_timesteps", 1000)


def is_wasted(last, num_inference_steps):
    """Whether the last of K evaluations is so close to the data that it changes next to nothing.

    An even schedule ends at 1 / K; half of that counts as wasted, but never more than WASTED.
    """
    return last <= min(WASTED, 0.5 / num_inference_steps) + 1e-6


def repairs(scheduler, num_inference_steps):
    """Changes of a scheduler's configuration that may move its last evaluation away from the data, best first."""
    config = scheduler.config
    known = inspect.signature(type(scheduler).__init__).parameters
    flows = "shift_terminal" in known
    found = []
    if not flows and "timestep_spacing" in known and config.get("timestep_spacing") != "trailing":
        found.append({"timestep_spacing": "trailing"})
    if flows and config.get("shift_terminal"):
        found.append({"shift_terminal": None})
    if flows:  # where sigmas = linspace(1, 1/K, K), which a pipeline may not take, would end
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
        even = 1.0 / num_inference_steps
        found.append({"shift_terminal": round(shift * even / (1 + (shift - 1) * even), 6)})
    return found


def repair_last_step(pipeline, prompts, kwargs):
    """Move the last evaluation of a call with `kwargs` away from the data where it is wasted: by a change of
    `pipeline.scheduler`, which is saved with the student, or, where none helps, by an argument of the call.

    Returns (last time before, last time after, change of the scheduler, arguments for the call), the latter two {}
    where nothing was done or helped. kwargs: of the student's call.
    """
    steps, original = kwargs["num_inference_steps"], pipeline.scheduler
    before = observe(pipeline, prompts, **kwargs).last_time
    if not is_wasted(before, steps):
        return before, before, {}, {}
    for change in repairs(original, steps):
        pipeline.scheduler = type(original).from_config(original.config, **change)
        after = observe(pipeline, prompts, **kwargs).last_time
        if not is_wasted(after, steps):
            return before, after, change, {}
    pipeline.scheduler = original
    even = [1.0 - i / steps for i in range(steps)]
    for name, values in (("sigmas", even), ("timesteps", [1000.0 * sigma for sigma in even])):
        if name in call_arguments(type(pipeline)) and "shift_terminal" in original.config:
            after = observe(pipeline, prompts, **kwargs | {name: values}).last_time
            if not is_wasted(after, steps):
                return before, after, {}, {name: values}
    return before, before, {}, {}


@dataclasses.dataclass
class Observation:
    calls: int  # of the denoisers
    rows: list  # samples in each call
    evaluations: int  # timesteps of the schedule
    last_time: float  # of the last evaluation, see `last_time`
    draws_once: bool  # each sample drew its initial noise and nothing else
    latents: torch.Tensor  # the result, (B, ...)


def count_rows(args, kwargs):
    """Samples in one call of a denoiser: its first input is a batch, or a list of samples."""
    first = args[0] if args else next(kwargs[n] for n in ("hidden_states", "sample", "x") if n in kwargs)
    return len(first)


def before_denoiser(pipeline, prompts, **kwargs):
    """What a call does up to its first denoiser, which does not run and may be on another device: (the arguments but
    for the prompts of each `encode_prompt`, see `taken`; samples of the denoiser's first call)."""
    encode_prompt, asked, rows = getattr(pipeline, "encode_prompt", None), [], []

    class Reached(BaseException):
        pass

    def noted(*args, **more):
        asked.append(taken(args, more)[1])
        return encode_prompt(*args, **more)

    def stop(_, args, more):
        rows.append(count_rows(args, more))
        raise Reached

    modules = denoisers(pipeline).values()
    hooks = [module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True) for module in modules]
    if encode_prompt is not None:
        pipeline.encode_prompt = noted
    try:
        with torch.no_grad():
            call(pipeline, prompts, range(len(prompts)), **kwargs)
    except Reached:
        pass
    finally:
        if encode_prompt is not None:
            pipeline.encode_prompt = encode_prompt
        for hook in hooks:
            hook.remove()
    return asked, rows[0] if rows else 0


class Each(str):
    """A text that stands once for each prompt in a call, such as a negative prompt."""


def taken(args, more):
    """(the prompts, {place or name: value} of the other arguments) of an `encode_prompt`; a list of one text for each
    prompt is an `Each`."""
    given = {**dict(enumerate(args)), **more}
    prompt = given.pop("prompt" if "prompt" in given else 0)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for name, value in given.items():
        if isinstance(value, list) and len(value) == len(prompts) and all(isinstance(text, str) for text in value):
            given[name] = Each(value[0]) if len(set(value)) == 1 else value
    return prompts, given


@torch.no_grad()
def observe(pipeline, prompts, **kwargs):
    """Run the pipeline's call once, seeds 0 to B - 1, and say what it did."""
    rows, hooks = [], []
    for module in denoisers(pipeline).values():
        hooks.append(
            module.register_forward_pre_hook(lambda _, args, kw: rows.append(count_rows(args, kw)), with_kwargs=True)
        )
    drawn = generators(range(len(prompts)))
    state = torch.get_rng_state()
    try:
        latents = call(pipeline, prompts, drawn, **kwargs)
        untouched = torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_rng_state(state)
        for hook in hooks:
            hook.remove()
    expected = [generator.get_state() for generator in after_noise(range(len(prompts)), latents[0].numel())]
    once = untouched and all(torch.equal(g.get_state(), s) for g, s in zip(drawn, expected, strict=True))
    scheduler = pipeline.scheduler
    return Observation(len(rows), rows, len(scheduler.timesteps), last_time(scheduler), once, latents)


def after_noise(seeds, numel):
    """The generators of `seeds`, each after one draw of `numel` normal numbers."""
    drawn = generators(seeds)
    for generator in drawn:
        torch.randn(numel, generator=generator)
    return drawn


def noise_sha256(seed, numel):
    """Hash of the unit noise that a sample starts from: `numel` float32 numbers of the CPU generator of its seed."""
    noise = torch.randn(numel, generator=generators([seed])[0])
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest()


def check_draws(flag, pipeline, prompts, **kwargs):
    """UserError when a run of three steps draws anything but each sample's initial noise."""
    steps = {} if set(kwargs) & {"sigmas", "timesteps"} else {"num_inference_steps": 3}
    if not observe(pipeline, prompts, **kwargs | steps).draws_once:
        raise UserError(
            f"{flag}: with {type(pipeline.scheduler).__name__} and these arguments sampling draws more random numbers "
            "than the initial noise; use a deterministic scheduler and eta 0"
        )


def embeds_guidance(pipeline):
    """Whether the denoiser is told the guidance scale, so that guidance costs no second evaluation."""
    configs = [module.config for module in denoisers(pipeline).values()]
    return any(c.get("guidance_embeds") or c.get("time_cond_proj_dim") is not None for c in configs)


def guidance_argument(pipeline):
    """The argument of the call that sets how strongly it guides, or None."""
    arguments = call_arguments(type(pipeline))
    if "true_cfg_scale" in arguments and not embeds_guidance(pipeline):
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in arguments else None


def guides(observation, num_prompts):
    """Whether the denoisers were asked more than once for a sample and timestep."""
    return sum(observation.rows) > observation.evaluations * num_prompts


def without_guidance(pipeline, prompts, kwargs):
    """Arguments of which one may make a call with `kwargs` ask its denoiser once for a sample and step, best first;
    those with which the denoiser's first call holds guided samples too are left out. No denoiser runs."""
    arguments = call_arguments(type(pipeline))
    second = {"guidance_scale_2": 1.0} if "guidance_scale_2" in arguments and len(denoisers(pipeline)) > 1 else {}
    attention = {name: 0.0 for name in ("pag_scale", "sag_scale") if name in arguments}  # perturbed
    candidates = [{"true_cfg_scale": 1.0}] if "true_cfg_scale" in arguments else []
    if embeds_guidance(pipeline) or "guidance_scale" not in arguments:
        candidates.append({})
    if "guidance_scale" in arguments:
        candidates += [{"guidance_scale": 1.0} | second, {"guidance_scale": 0.0} | second]
    candidates = [candidate | attention for candidate in candidates]
    calls = [_two_steps(kwargs | candidate) for candidate in candidates]
    rows = [before_denoiser(pipeline, prompts, **call)[1] for call in calls]
    return [c for c, number in zip(candidates, rows, strict=True) if number <= len(prompts)] or candidates


def _two_steps(kwargs):
    return {name: kwargs[name] for name in kwargs if name not in SCHEDULE_ARGUMENTS} | {"num_inference_steps": 2}


def guidance_off(pipeline, prompts, kwargs, candidates=None):
    """The arguments that make a call with `kwargs` ask its denoiser once for a sample and step, found by trying.

    candidates: those of `without_guidance`, unless others are given. Raises UserError where none of them does it.
    """
    candidates = candidates or without_guidance(pipeline, prompts, kwargs)
    for candidate in candidates:
        seen = observe(pipeline, prompts, **_two_steps(kwargs | candidate))
        if not guides(seen, len(prompts)):
            return candidate
    raise UserError(
        f"`student_kwargs`: nothing that was tried switches off the guidance of {type(pipeline).__name__} "
        f"({'; '.join(map(str, candidates))}); name the arguments that do"
    )

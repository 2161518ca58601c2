"""Distribution matching: the student's results move from where its own score is higher to where the teacher's is.

As in DMD2 (2405.14867, Sections 3 and 4). x_0 is what the student makes of noise: in a step of its call that is drawn
(backward simulation: the steps before it run without gradients), or in all of them. x_tau = alpha_tau x_0 + sigma_tau
eps. The real score is the teacher's prediction of x_0 from x_tau with its guidance, the fake score that of a network
which learns to denoise the student's results. The gradient at x_0 (eq. 1, with the weight of 2311.18828):

    grad = (x_0^fake - x_0^real) / mean |x_0 - x_0^real|,   the mean of each sample.

Both scores are asked by the pipeline's own call: a stand-in for its scheduler offers one noise level to a part of a
micro-batch and keeps what it is handed. Text, packing, guidance, signs are the pipeline's. Left out: the adversary.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from common.direct import pipelines
from common.direct.pairs import PairOrder
from common.direct.pipelines import SCHEDULE_ARGUMENTS, denoisers
from common.direct.probes import count_rows, embeds_guidance, guidance_argument
from common.direct.student import FROM_PAIRS
from common.direct.tasks import arguments as call_arguments
from common.errors import CALL_ERRORS, UserError, blame
from common.keyed_random import keyed_generator, keyed_seed
from common.networks import lora
from common.run import simulation, updates
from common.schedules import PREDICTION_TYPES, to_x_0

import accelerate
import torch

ADAPTER = "fake"  # of a network whose first adapter is the student
OFF = "off"  # in place of an adapter's name: the base alone

NEVER = float("inf")
WARNINGS = (  # (what `watch` gives, least, most, what is said outside of these)
    (
        "results_std",
        0.8,
        NEVER,
        "the student's results have less than 0.8 of the deviation of the pairs' latents: they collapse; lower "
        "`score_weight` or `learning_rate`, or give `regression_weight` more",
    ),
    (
        "results_std",
        0.0,
        1.25,
        "the student's results have more than 1.25 times the deviation of the pairs' latents: they saturate; lower "
        "`score_weight`, or the guidance in `score_kwargs`",
    ),
    (
        "fake_error",
        0.0,
        1.05,
        "the fake score denoises the student's results no better than the teacher does: it lags; raise `fake_updates` "
        "or `fake_learning_rate`, or lower `learning_rate`",
    ),
    (
        "fake_skipped",
        0.0,
        0.0,
        "updates of the fake score are skipped, their gradients are not finite; lower `fake_learning_rate`, or take "
        "another `mixed_precision`",
    ),
)


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma eps, and the timestep that tells a pipeline so, None of a level that the
    pipeline chose. Numbers, or tensors that are broadcast."""

    timestep: float | None
    alpha: float | torch.Tensor
    sigma: float | torch.Tensor


class Process:
    """The forward process of a scheduler, and what its network predicts: epsilon, v, x_0, or a flow eps - x_0.

    UserError for a scheduler that does not say its alpha and sigma.
    """

    def __init__(self, scheduler):
        config, name = scheduler.config, type(scheduler).__name__
        self.num_timesteps = config.get("num_train_timesteps")
        is_flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
        self.kind = "flow" if is_flow else config.get("prediction_type", "epsilon")
        self.alphas_cumprod = None if is_flow else getattr(scheduler, "alphas_cumprod", None)  # (T,)
        known = is_flow or self.alphas_cumprod is not None and self.kind in PREDICTION_TYPES
        if not known or not self.num_timesteps or config.get("timestep_type", "discrete") != "discrete":
            raise UserError(
                f"`score_weight`: {name} does not say the alpha and sigma of its noise levels; drop the flag, or take "
                "pairs and a student of another scheduler, such as DDIMScheduler"
            )
        if self.alphas_cumprod is not None:  # numbers from before a simulation, whose tensors have no values
            self.alphas = self.alphas_cumprod.double().sqrt().tolist()

    def at(self, time):
        """The `Level` at a time, 0 (data) to 1 (noise)."""
        if self.kind == "flow":
            return Level(time * self.num_timesteps, 1.0 - time, time)
        timestep = min(round(time * self.num_timesteps), self.num_timesteps - 1)
        return Level(timestep, self.alphas[timestep], (1.0 - self.alphas[timestep] ** 2) ** 0.5)

    def of_step(self, scheduler, index):
        """The `Level` of step `index` of the schedule that is set, in tensors: nothing waits for the device."""
        if not hasattr(scheduler, "sigmas"):
            alphas_cumprod = self.alphas_cumprod.to(scheduler.timesteps.device, torch.float32)
            alpha_2 = alphas_cumprod.index_select(0, scheduler.timesteps[index : index + 1].long())
            return Level(None, alpha_2.sqrt(), (1.0 - alpha_2).sqrt())
        sigma = scheduler.sigmas[index].float()  # of Euler's and the like: that of x_0 + sigma eps
        if self.kind == "flow":
            return Level(None, 1.0 - sigma, sigma)
        alpha = (1.0 + sigma**2).rsqrt()
        return Level(None, alpha, alpha * sigma)

    def x_0(self, prediction, noisy, level):
        """The x_0 that a prediction for x_tau (B, ...) stands for; a flow's is x_tau - sigma v."""
        if self.kind == "flow":
            return noisy - level.sigma * prediction
        return to_x_0(prediction, noisy, level.alpha, level.sigma, self.kind)

    def target(self, x_0, noise, level):
        """What a network should predict for x_tau = alpha x_0 + sigma noise; (B, ...)."""
        if self.kind == "flow":
            return noise - x_0
        return {"epsilon": noise, "v_prediction": level.alpha * noise - level.sigma * x_0, "sample": x_0}[self.kind]


class _Reached(BaseException):
    """Ends a pipeline's call."""


class _Standing:
    """A stand-in for a scheduler, which answers what the scheduler would but for what subclasses say."""

    def __init__(self, scheduler):
        self.scheduler, self.caught = scheduler, None

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def keep(self, prediction, sample):
        self.caught = prediction.float(), sample.float()
        raise _Reached


class _OneLevel(_Standing):
    """Offers one noise level, as the network is given it, and keeps the prediction."""

    init_noise_sigma, order = 1.0, 1

    def __init__(self, scheduler, level, device):
        super().__init__(scheduler)
        whole = isinstance(level.timestep, int)
        self.timesteps = torch.tensor([level.timestep], dtype=torch.long if whole else torch.float32, device=device)
        self.sigmas = torch.tensor([level.sigma, 0.0], device=device)

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index=0):
        pass

    def scale_model_input(self, sample, *_):
        return sample

    def step(self, model_output, timestep, sample, **_):
        self.keep(model_output, sample)


class _UpTo(_Standing):
    """The scheduler itself up to a step, of which it keeps the prediction; before it there are no gradients."""

    def __init__(self, scheduler, step, grad_mode):
        super().__init__(scheduler)
        self.last, self.number, self.grad_mode = step, 0, grad_mode

    def step(self, model_output, timestep, sample, **options):
        if self.number == self.last:
            scale = getattr(self.scheduler, "scale_model_input", None)
            self.keep(model_output, scale(sample, timestep) if scale else sample)
        answer = self.scheduler.step(model_output, timestep, sample, **options)
        self.number += 1
        if self.number == self.last:
            torch.clear_autocast_cache()  # its copies of weights were made without gradients
            torch.set_grad_enabled(self.grad_mode)
        return answer


def _caught(pipeline, stand_in, prompts, seeds, **kwargs):
    """(prediction, sample) that a call hands to a step of the stand-in, float32 (B, ...)."""
    pipeline.scheduler = stand_in
    try:
        pipelines.call(pipeline, prompts, seeds, **kwargs)
    except _Reached:
        pass
    finally:
        pipeline.scheduler = stand_in.scheduler
    return stand_in.caught


def ask(pipeline, prompts, noisy, level, **kwargs):
    """(what a pipeline predicts for x_tau (B, ...) at one `Level`, with the guidance of `kwargs`; x_tau as it was when
    the pipeline had it): float32, (B, ...)."""
    network = next(iter(denoisers(pipeline).values()))
    stand_in = _OneLevel(pipeline.scheduler, level, noisy.device)
    options = kwargs | {"latents": noisy.to(network.dtype), "num_inference_steps": 1}
    return _caught(pipeline, stand_in, prompts, [0] * len(prompts), **options)


def result_of_step(pipeline, process, prompts, seeds, step, **kwargs):
    """The x_0 that a step of a call, counted from 0, predicts: float32 (B, ...), with gradients through it alone."""
    grad_mode = torch.is_grad_enabled()
    stand_in = _UpTo(pipeline.scheduler, step, grad_mode)
    try:
        torch.set_grad_enabled(grad_mode and step == 0)
        prediction, noisy = _caught(pipeline, stand_in, prompts, seeds, **kwargs)
    finally:
        torch.set_grad_enabled(grad_mode)
    return process.x_0(prediction, noisy, process.of_step(pipeline.scheduler, step))


class Asked(NamedTuple):
    """A score: a pipeline's call, and which adapter of its denoisers is on (OFF: none; None: they have none)."""

    pipeline: object
    adapter: str | None
    kwargs: dict  # of the call

    @contextlib.contextmanager
    def networks(self):
        """Inside, the denoisers are this score's; a backward pass of what they compute belongs inside too."""
        with contextlib.ExitStack() as stack:
            for network in denoisers(self.pipeline).values() if self.adapter else ():
                off = self.adapter == OFF
                stack.enter_context(lora.adapters_off(network) if off else lora.adapter_on(network, self.adapter))
            yield

    def ask(self, prompts, noisy, level, **kwargs):
        """`ask` of this score."""
        return ask(self.pipeline, prompts, noisy, level, **self.kwargs | kwargs)


class Scores(NamedTuple):
    """The two scores, and what is trained of the fake one, frozen but while it is."""

    real: Asked
    fake: Asked
    trained: torch.nn.ParameterList

    @property
    def pipelines(self):
        """(the teacher's, the fake score's) that have denoisers of their own, None where they have not."""
        if self.fake.adapter == ADAPTER:
            return None, None
        return self.real.pipeline, None if self.fake.adapter else self.fake.pipeline

    @property
    def copies(self):
        """{what it is called: module} of the denoisers that are not the student's."""
        named = zip(("the teacher's own", "the fake score's"), self.pipelines, strict=True)
        return {f"{of} {name}": part for of, each in named if each for name, part in denoisers(each).items()}


def make_scores(pipeline, rank, *, is_lora, load_denoisers, student_kwargs, teacher_kwargs):
    """The `Scores` of a run.

    pipeline: the student's. is_lora: the student is an adapter of its denoisers; then the teacher is their base, and
    the fake score a second adapter. Else load_denoisers(float32, or None for the run's dtype) gives copies of the
    teacher's, one for both scores, on which the fake one is an adapter of `rank`; of rank 0, two.
    """
    if is_lora:
        real, fake = Asked(pipeline, OFF, teacher_kwargs), Asked(pipeline, ADAPTER, student_kwargs)
        trained = []
        for network in denoisers(pipeline).values():
            lora.add_second(network, rank, ADAPTER)
            trained += lora.adapter_tensors(network, ADAPTER).values()
    elif rank:
        teacher = with_denoisers(pipeline, load_denoisers(None))
        pipelines.add_lora(teacher, rank, rank)
        real, fake = Asked(teacher, OFF, teacher_kwargs), Asked(teacher, lora.ADAPTER, student_kwargs)
        trained = [p for network in denoisers(teacher).values() for p in lora.lora_parameters(network)]
    else:
        real = Asked(with_denoisers(pipeline, load_denoisers(None)), None, teacher_kwargs)
        fake = Asked(with_denoisers(pipeline, load_denoisers(torch.float32)), None, student_kwargs)
        trained = [p for network in denoisers(fake.pipeline).values() for p in network.parameters()]
    trained = torch.nn.ParameterList(trained)
    trained.requires_grad_(False)
    return Scores(real, fake, trained)


def check(config, pairs_config, scheduler, kwargs, accelerator, *, rank, has_regression):
    """The `Process` of a scheduler, or UserError where distribution matching cannot be had; needs no weights.

    config: the teacher's, as from `read_pipeline_config`; pairs_config: of the pairs, None of images. kwargs:
    `score_kwargs`. rank: of the fake score, or 0.
    """
    pipeline_class, networks = config["class"], config["denoisers"]
    process = Process(scheduler)
    for network_class, values in networks.values() if rank else ():
        lora.check_rank(values, rank, None, network_class, of="fake_lora_rank")
    takes, name = call_arguments(pipeline_class), pipeline_class.__name__
    if not (kwargs or (pairs_config or {}).get("kwargs")):
        raise UserError(
            "`score_kwargs`: pairs of images do not say how the teacher was guided; name its guidance, as in "
            """'{"guidance_scale": 4}'"""
        )
    if "latents" not in takes:
        raise UserError(
            f"`score_weight`: the call of a {name} takes no latents, so it has no score to ask for; drop it"
        )
    for key in kwargs:
        if key in (*FROM_PAIRS, *SCHEDULE_ARGUMENTS) or key.endswith("_per_prompt"):
            raise UserError(f"`score_kwargs`: {key} comes from the pairs and the script; leave it out")
        if key not in takes:
            raise UserError(f"`score_kwargs`: the call of {name} has no {key}")
    if hasattr(accelerator, "sharding"):
        raise UserError(
            "`score_weight`: FSDP2 would have to split the networks of two scores besides; drop it, or use "
            "`distributed_type: MULTI_GPU`"
        )
    if len(networks) > 1 and accelerator.num_processes > 1 and not has_regression:
        raise UserError(
            f"`regression_weight`=0: a step of a {name} trains one of its {len(networks)} denoisers, and several "
            "processes wait for gradients of all; start one process, or give it a weight"
        )
    return process


@torch.no_grad()
def try_out(scores, data, process, *, shape, was_guided, changes):
    """Ask both scores once, about x_tau of `shape` (1, ...) for the first pair. UserError where the pipeline changes
    what it is given, and where the teacher does not guide though it is asked to: by `score_kwargs`, the `changes`, or
    else as for the pairs (was_guided). A denoiser that is told its guidance needs no second evaluation."""
    pipeline = scores.real.pipeline
    scale, is_told = guidance_argument(pipeline), embeds_guidance(pipeline)
    if scale == "true_cfg_scale" and "guidance_scale" in changes:
        raise UserError(
            f"`score_kwargs`: guidance_scale does nothing in a {type(pipeline).__name__}; name true_cfg_scale instead"
        )
    asks = changes[scale] > 1 if isinstance(changes.get(scale), (int, float)) else was_guided
    parameter = next(next(iter(denoisers(scores.fake.pipeline).values())).parameters())
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    level, name, rows = process.at(0.5), type(scores.real.pipeline).__name__, []
    hooks = [
        network.register_forward_pre_hook(lambda _, args, more: rows.append(count_rows(args, more)), with_kwargs=True)
        for network in denoisers(scores.real.pipeline).values()
    ]
    try:
        for asked in (scores.real, scores.fake):
            with asked.networks(), blame(f"`score_kwargs`: the call of a {name} refuses {asked.kwargs}", *CALL_ERRORS):
                _, sample = asked.ask(data.prompts[:1], noisy, level, **data.call_kwargs([0]))
            same = sample.shape == noisy.shape
            if same and not simulation.is_on():  # where there are values
                same = torch.allclose(sample, noisy.to(sample.device), rtol=0.02, atol=0.02)
            if not same:
                raise UserError(
                    f"`score_weight`: a {name} changes the latents that it is given, so it has no score to ask for; "
                    "drop it"
                )
            if asked is scores.real and asks and not is_told and sum(rows) < 2:
                raise UserError(
                    f"`score_kwargs`: the teacher is to guide, and asked about one noise level with {asked.kwargs} it "
                    "does not; name the arguments that make it, most likely a negative_prompt (one blank will do)"
                )
    finally:
        for hook in hooks:
            hook.remove()


def teacher_kwargs(made_by, changes):
    """The arguments of the real score's call: those that made the pairs, but for the schedule, and `score_kwargs`."""
    return {name: value for name, value in made_by.items() if name not in SCHEDULE_ARGUMENTS} | changes


def with_denoisers(pipeline, networks):
    """A pipeline that shares everything with another but its denoisers, {name: module}."""
    other = copy.copy(pipeline)
    for name, network in networks.items():
        other.__dict__[name] = network
    return other


class Prompts:
    """Prompts that are drawn beside pairs, in the size of the first pair; None: those of the first `number` pairs."""

    def __init__(self, data, number, prompts=None):
        self.prompts, self.data, self.is_own = prompts or data.prompts[:number], data, bool(prompts)

    def call_kwargs(self, indices):
        return self.data.call_kwargs([0] if self.is_own else indices)


@dataclasses.dataclass
class ScoreMatching:
    """The loss of distribution matching, and the updates of the fake score.

    Draws are keyed by `seed` and the global micro-batch: the same after a resume and for any number of processes.
    """

    student: pipelines.Rollout  # not wrapped
    process: Process
    data: Prompts
    scores: Scores
    optimizer: torch.optim.Optimizer  # of what is trained of the fake score
    accelerator: accelerate.Accelerator
    batch_size: int
    num_steps: int  # of the student
    through: str  # what of its call x_0 comes from: "step", one that is drawn, or "call", all of them
    num_levels: int  # noise levels of a micro-batch, at most
    times: tuple  # the least and the largest of them, 0 (data) to 1 (noise)
    max_grad_norm: float
    share: Callable  # () -> what the fake score's learning rate is times now
    seed: int

    def __post_init__(self):
        is_half = self.accelerator.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=is_half)
        if self.accelerator.num_processes > 1:  # new adapters are drawn by each process
            for parameter in self.scores.trained:
                torch.distributed.broadcast(parameter.data, src=0)
        self.noted, self.skipped, self.found, self.said = [], 0.0, set(), set()  # of `watch`
        number = len(self.data.prompts)
        self.orders = {x: PairOrder(number, self.batch_size, keyed_seed(self.seed, x)) for x in ("score", "fake")}

    def result(self, rollout, name, micro_batch):
        """(x_0 of the student from fresh noise, float32 (B, ...); the indices of its prompts).

        rollout: the student, which may be wrapped by DDP. name: "score" or "fake", for what it is drawn.
        """
        indices = self.orders[name][micro_batch]
        seeds = [keyed_seed(self.seed, f"{name} noise", micro_batch, i) for i in range(len(indices))]
        prompts, kwargs = [self.data.prompts[i] for i in indices], self.data.call_kwargs(indices)
        if self.through == "call":
            return rollout(prompts, seeds, **kwargs).float(), indices
        step = Random(keyed_seed(self.seed, f"{name} step", micro_batch)).randrange(self.num_steps)
        kwargs = self.student.kwargs | kwargs
        pipeline = self.student.pipeline
        x_0 = rollout(again=lambda: result_of_step(pipeline, self.process, prompts, seeds, step, **kwargs))
        return x_0, indices

    def _levels(self, indices, name, micro_batch, x_0):
        """For each part of a micro-batch: its place, prompts, arguments of the call, noise, `Level` and x_tau."""
        levels = Random(keyed_seed(self.seed, f"{name} level", micro_batch))
        generator = keyed_generator(self.seed, f"{name} renoising", micro_batch, x_0.device)
        size, least, most = -(-len(indices) // self.num_levels), *self.times
        for start in range(0, len(indices), size):
            place = slice(start, start + size)
            level = self.process.at(levels.uniform(least, most))
            noise = torch.randn(x_0[place].shape, generator=generator, device=x_0.device)
            prompts = [self.data.prompts[i] for i in indices[place]]
            noisy = level.alpha * x_0[place] + level.sigma * noise
            yield place, prompts, self.data.call_kwargs(indices[place]), noise, level, noisy

    def loss(self, x_0, indices, micro_batch):
        """The mean of 0.5 (x_0 - sg(x_0 - grad))^2 = 0.5 grad^2, whose gradient at x_0 (B, ...) is grad / x_0.numel().

        Returns it and {name: scalar} of what is logged; the rest is noted for `watch`.
        """
        direction, dims, errors = torch.empty_like(x_0), tuple(range(1, x_0.ndim)), torch.zeros(2, device=x_0.device)
        with torch.no_grad(), self.accelerator.autocast():
            for place, prompts, kwargs, noise, level, noisy in self._levels(indices, "score", micro_batch, x_0):
                predictions = []
                for asked in (self.scores.fake, self.scores.real):
                    with asked.networks():
                        predictions.append(asked.ask(prompts, noisy, level, **kwargs)[0])
                fake, real = (self.process.x_0(prediction, noisy, level) for prediction in predictions)
                scale = (x_0[place] - real).abs().mean(dims, keepdim=True).clamp(min=1e-8)
                direction[place] = (fake - real) / scale
                target = self.process.target(x_0[place], noise, level)
                errors += torch.stack([(prediction - target).square().sum() for prediction in predictions])
        along = (x_0 * direction).mean()  # x_0 - (x_0 - grad) would be rounded where x_0 is large
        loss = along + (0.5 * direction.square().mean() - along).detach()
        self.noted.append(torch.stack([x_0.detach().std(), *(errors / x_0.numel())]))
        return loss, {"score_gradient": direction.abs().mean()}

    def watch(self, latent_std):
        """What this process has noted since the last time, {name: number}, and [warnings] of what was so the last time
        too, each once.

        latent_std: of the pairs' latents.
        """
        if not self.noted:
            return {}, []
        rows = torch.stack(self.noted)  # NaN of an update that was skipped says nothing
        means = rows.where(rows.isfinite().all(1, keepdim=True), torch.nan).nanmean(0)
        std, error, teachers_error, skipped = torch.cat([means, means.new_zeros(1) + self.skipped]).tolist()
        self.noted, self.skipped = [], 0.0
        values = {"results_std": std / latent_std, "fake_error": error / max(teachers_error, 1e-12)}
        values["fake_skipped"] = skipped
        found = {text for name, least, most, text in WARNINGS if values[name] < least or values[name] > most}
        said, self.found = (found & self.found) - self.said, found
        self.said |= said
        return values, [f"WARNING: {sentence}" for sentence in sorted(said)]

    def fake_loss(self, x_0, indices, micro_batch):
        """The denoising loss of the fake score on the student's x_0 (B, ...), without gradient: mean of the squared
        error of its prediction, which `backward` of each part follows."""
        total = 0.0
        for place, prompts, kwargs, noise, level, noisy in self._levels(indices, "fake", micro_batch, x_0):
            with self.scores.fake.networks():
                with self.accelerator.autocast():
                    prediction = self.scores.fake.ask(prompts, noisy, level, **kwargs)[0]
                error = prediction - self.process.target(x_0[place], noise, level)
                loss = error.square().mean() * (len(noisy) / len(x_0))
                self.scaler.scale(loss / self.accelerator.gradient_accumulation_steps).backward()
            total = total + loss.detach()
        return total

    def train_fake(self, micro_batch, number, count):
        """Update `number` of `count` of the fake score before the student's update that begins with this global
        micro-batch, on as many samples as that has; negative numbers before the first one. Returns the mean of its
        loss."""
        accelerator, losses = self.accelerator, []
        processes = accelerator.num_processes
        size = processes * accelerator.gradient_accumulation_steps
        first = micro_batch * count + number * size + accelerator.process_index
        self.scores.trained.requires_grad_(True)
        try:
            for j in range(first, first + size, processes):
                with torch.no_grad(), accelerator.autocast():
                    x_0, indices = self.result(self.student, "fake", j)
                losses.append(self.fake_loss(x_0, indices, j))
        finally:
            self.scores.trained.requires_grad_(False)
        self.optimizer.param_groups[0]["lr"] = self.optimizer.defaults["lr"] * self.share()
        finite = updates.step_beside(self.optimizer, self.scaler, processes, self.max_grad_norm)
        self.skipped = self.skipped + (~finite).float()
        return torch.stack(losses).mean()

"""Distribution matching: the student's results move from where its own score is higher to where the teacher's is.

As in DMD2 (2405.14867, Sections 3 and 4). x_0 is what the student makes of noise: in a step of its call that is drawn
(backward simulation: the steps before it run without gradients), or in all of them. x_tau = alpha_tau x_0 + sigma_tau
eps. The real score is the teacher's prediction of x_0 from x_tau with its guidance, the fake score that of a network
which learns to denoise the student's results. The gradient at x_0 (eq. 1, with the weight of 2311.18828):

    grad = (x_0^fake - x_0^real) / mean |x_0 - x_0^real|,   the mean of each sample.

Both scores are asked by the pipeline's own call, a part of a micro-batch at a noise level: see `levels`.
"""

import copy
import dataclasses
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from common.direct import adversary, pipelines
from common.direct.levels import OFF, Asked, Process, result_of_step
from common.direct.pairs import PairOrder
from common.direct.pipelines import SCHEDULE_ARGUMENTS, denoisers
from common.direct.probes import count_rows, embeds_guidance, guidance_argument
from common.direct.student import FROM_PAIRS
from common.direct.tasks import arguments as call_arguments
from common.errors import CALL_ERRORS, UserError, blame
from common.keyed_random import keyed_generator, keyed_seed
from common.networks import lora
from common.run import simulation, updates

import accelerate
import torch
from torch.nn.functional import softplus

ADAPTER = "fake"  # of a network whose first adapter is the student
ADV_SHARE = 0.1  # of the adversary's loss in that of the fake score

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
    (
        "loss_discriminator",
        0.0,
        1.38,  # 2 ln 2 is 1.386
        "the adversary does not tell the student's results from the pairs; raise `fake_learning_rate`, or drop "
        "`adv_weight`",
    ),
)


class Scores(NamedTuple):
    """The two scores, the adversary's head where there is one, and what is trained of it and of the fake score, frozen
    but while it is."""

    real: Asked
    fake: Asked
    trained: torch.nn.ParameterList
    head: adversary.Head | None = None

    def with_adversary(self, data, process, shape):
        """These scores with a head, for x_tau of `shape` (1, ...), whose width is found by asking about one.

        UserError where the fake score's features cannot be read.
        """
        parameter = next(next(iter(denoisers(self.fake.pipeline).values())).parameters())
        noisy = torch.zeros(shape, device=parameter.device)
        with torch.no_grad(), self.fake.networks(), adversary.noting(self.fake) as found:
            self.fake.ask(data.prompts[:1], noisy, process.at(0.5), **data.call_kwargs([0]))
        if not found:
            name = type(self.fake.pipeline).__name__
            raise UserError(f"`adv_weight`: the denoiser of a {name} has no middle that gives features; drop it")
        head = adversary.Head(adversary.features(found[-1], 1).shape[-1]).to(parameter.device)
        head.requires_grad_(False)
        return self._replace(trained=torch.nn.ParameterList([*self.trained, *head.parameters()]), head=head)

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
        self.number = number

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
    score_weight: float = 1.0
    adv_weight: float = 0.0  # of the adversary; more than 0 where the scores have its head

    def __post_init__(self):
        is_half = self.accelerator.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=is_half)
        if self.accelerator.num_processes > 1:  # new adapters are drawn by each process
            for parameter in self.scores.trained:
                torch.distributed.broadcast(parameter.data, src=0)
        self.noted, self.told, self.skipped, self.found, self.said = [], [], 0.0, set(), set()  # of `watch`
        self.rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []
        numbers = {"score": len(self.data.prompts), "fake": len(self.data.prompts), "real": self.data.number}
        self.orders = {x: PairOrder(n, self.batch_size, keyed_seed(self.seed, x)) for x, n in numbers.items()}

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
        """score_weight times the mean of 0.5 (x_0 - sg(x_0 - grad))^2 = 0.5 grad^2, whose gradient at x_0 (B, ...) is
        grad / x_0.numel(), and adv_weight times that of softplus(-D).

        Returns it and {name: scalar} of what is logged; the rest is noted for `watch`.
        """
        direction, dims, errors = torch.empty_like(x_0), tuple(range(1, x_0.ndim)), torch.zeros(2, device=x_0.device)
        away, adv_loss = torch.zeros_like(x_0), torch.zeros((), device=x_0.device)  # the adversary's gradient at x_0
        with torch.no_grad(), self.accelerator.autocast():
            for place, prompts, kwargs, noise, level, noisy in self._levels(indices, "score", micro_batch, x_0):
                with self.scores.fake.networks():
                    if self.adv_weight:
                        of_fake, adv_loss_of_part, away[place] = self._oppose(prompts, noisy, level, kwargs)
                        adv_loss += adv_loss_of_part / len(x_0)
                    else:
                        of_fake = self.scores.fake.ask(prompts, noisy, level, **kwargs)[0]
                with self.scores.real.networks():
                    of_real = self.scores.real.ask(prompts, noisy, level, **kwargs)[0]
                fake, real = (self.process.x_0(prediction, noisy, level) for prediction in (of_fake, of_real))
                scale = (x_0[place] - real).abs().mean(dims, keepdim=True).clamp(min=1e-8)
                direction[place] = (fake - real) / scale
                target = self.process.target(x_0[place], noise, level)
                errors += torch.stack([(prediction - target).square().sum() for prediction in (of_fake, of_real)])
        along = (x_0 * direction).mean()  # x_0 - (x_0 - grad) would be rounded where x_0 is large
        loss = self.score_weight * (along + (0.5 * direction.square().mean() - along).detach())
        self.noted.append(torch.stack([x_0.detach().std(), *(errors / x_0.numel())]))
        logged = {"score_gradient": direction.abs().mean()}
        if self.adv_weight:
            along = (x_0 * away).sum() / len(x_0)
            loss = loss + self.adv_weight * (along + (adv_loss - along).detach())
            sizes = self.adv_weight * away.norm() / len(x_0), self.score_weight * direction.norm() / x_0.numel()
            logged |= {"loss_adv": adv_loss, "grad_norm_ratio": sizes[0] / sizes[1].clamp(min=1e-12)}
        return loss, logged

    def _oppose(self, prompts, noisy, level, kwargs):
        """(what the fake score predicts for x_tau (b, ...); the sum of softplus(-D(x_tau)); its gradient at x_0).

        Taken back at once, so that no activations of the fake score are kept beside the student's.
        """
        noisy = noisy.detach().requires_grad_()
        with torch.enable_grad(), adversary.noting(self.scores.fake) as found:
            prediction = self.scores.fake.ask(prompts, noisy, level, **kwargs)[0]
            loss = softplus(-self.scores.head(adversary.features(found[-1], len(noisy)))).sum()
            (gradient,) = torch.autograd.grad(self.scaler.scale(loss), noisy)
        size = self.scaler.scale(torch.ones((), device=noisy.device))  # fp16 would round small gradients to 0
        return prediction.detach(), loss.detach(), level.alpha * gradient / size

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
        if self.told:
            told, self.told = torch.stack(self.told).nanmean(0).tolist(), []
            values |= zip(("loss_discriminator", "logit_real", "logit_fake"), told, strict=True)
        found = {
            text
            for name, least, most, text in WARNINGS
            if name in values and (values[name] < least or values[name] > most)
        }
        said, self.found = (found & self.found) - self.said, found
        self.said |= said
        return values, [f"WARNING: {sentence}" for sentence in sorted(said)]

    def fake_loss(self, x_0, indices, micro_batch):
        """The denoising loss of the fake score on the student's x_0 (B, ...), without gradient: mean of the squared
        error of its prediction, and the adversary's loss; `backward` of each part follows."""
        total, told = 0.0, torch.zeros(3, device=x_0.device)
        for place, prompts, kwargs, noise, level, noisy in self._levels(indices, "fake", micro_batch, x_0):
            share = len(noisy) / len(x_0)
            with self.scores.fake.networks():
                with self.accelerator.autocast(), adversary.noting(self.scores.fake) as found:
                    prediction = self.scores.fake.ask(prompts, noisy, level, **kwargs)[0]
                error = prediction - self.process.target(x_0[place], noise, level)
                loss = error.square().mean() * share
                total = total + loss.detach()
                if self.adv_weight:
                    with self.accelerator.autocast():
                        of_fake = self.scores.head(adversary.features(found[-1], len(noisy)))
                        of_real = self._of_pairs(place, level, micro_batch)
                    parts = softplus(-of_real).mean() + softplus(of_fake).mean(), of_real.mean(), of_fake.mean()
                    loss = loss + ADV_SHARE * share * parts[0]
                    told += share * torch.stack(parts).detach()
                self.scaler.scale(loss / self.accelerator.gradient_accumulation_steps).backward()
        if self.adv_weight:
            self.told.append(told)
        return total

    def _of_pairs(self, place, level, micro_batch):
        """The adversary's logits (b,) for latents of pairs at a level, in the place of a micro-batch's results."""
        indices, data = self.orders["real"][micro_batch][place], self.data.data
        generator = keyed_generator(self.seed, f"real renoising {place.start}", micro_batch, self.accelerator.device)
        latents = data.latents(indices).to(self.accelerator.device, torch.float32)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        prompts, kwargs = [data.prompts[i] for i in indices], data.call_kwargs(indices)
        with adversary.noting(self.scores.fake) as found:
            self.scores.fake.ask(prompts, level.alpha * latents + level.sigma * noise, level, **kwargs)
        return self.scores.head(adversary.features(found[-1], len(latents)))

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
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.share()
        finite = updates.step_beside(self.optimizer, self.scaler, processes, self.max_grad_norm)
        self.skipped = self.skipped + (~finite).float()
        return torch.stack(losses).mean()

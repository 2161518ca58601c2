"""Distribution matching: the student's results move from where its own score is higher to where the teacher's is.

As in DMD2 (2405.14867, Sections 3 and 4). x_0 is what the student makes of noise, x_tau = alpha_tau x_0 + sigma_tau
eps. The real score is the teacher's prediction of x_0 from x_tau with its guidance, the fake score that of a network
which learns to denoise the student's results. The gradient at x_0 (eq. 1, with the weight of 2311.18828):

    grad = (x_0^fake - x_0^real) / mean |x_0 - x_0^real|,   the mean of each sample.

Both scores are asked about a part of a micro-batch at a noise level. How a network is asked, and how a student makes
x_0, is its script's annex's.
"""

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

from common.errors import UserError
from common.keyed_random import keyed_generator, keyed_seed
from common.run import screen, updates
from common.score import adversary
from common.score.process import Process

import accelerate
import torch
from torch.nn.functional import softplus

ADV_SHARE = 0.1  # of the adversary's loss in that of the fake score

NEVER = float("inf")
WARNINGS = (  # (what `watch` gives, least, most, what is said outside of these; in braces what the caller calls it)
    (
        "results_std",
        0.8,
        NEVER,
        "the student's results have less than 0.8 of the deviation of {latents}: they collapse; lower {weight} or "
        "`learning_rate`, or give {regression} more",
    ),
    (
        "results_std",
        0.0,
        1.25,
        "the student's results have more than 1.25 times the deviation of {latents}: they saturate; lower {weight}, "
        "or the guidance in {guidance}",
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
        "the adversary does not tell the student's results from what is real; raise `fake_learning_rate`, or drop "
        "`adv_weight`",
    ),
)


@dataclasses.dataclass
class ScoreMatching:
    """The loss of distribution matching, and the updates of the fake score.

    Draws are keyed by `seed` and the global micro-batch: the same after a resume and for any number of processes.
    """

    results: Any  # result(student or None, name, micro_batch) -> (x_0, indices); about(indices); and of an adversary
    process: Process
    scores: Any  # (real, fake, trained, head): two that are asked, what is trained, and the adversary's or None
    optimizer: torch.optim.Optimizer  # of what is trained of the fake score
    accelerator: accelerate.Accelerator
    num_levels: int  # noise levels of a micro-batch, at most
    times: tuple  # the least and the largest of them, 0 (data) to 1 (noise)
    max_grad_norm: float
    share: Callable  # () -> what the fake score's learning rate is times now
    seed: int
    names: dict  # of the student's weights, for WARNINGS
    score_weight: float = 1.0
    adv_weight: float = 0.0  # of the adversary; more than 0 where the scores have its head

    def __post_init__(self):
        is_half = self.accelerator.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=is_half)
        self.share_out()
        self.noted, self.told, self.skipped, self.found, self.said = [], [], 0.0, set(), set()  # of `watch`
        self.rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def share_out(self):
        """What is trained of the fake score becomes the main process's: new adapters are drawn by each."""
        if self.accelerator.num_processes > 1:
            for parameter in self.scores.trained:
                torch.distributed.broadcast(parameter.data, src=0)

    def _levels(self, indices, name, micro_batch, x_0):
        """For each part of a micro-batch: its place, what it is about, noise, `Level` and x_tau."""
        levels = Random(keyed_seed(self.seed, f"{name} level", micro_batch))
        generator = keyed_generator(self.seed, f"{name} renoising", micro_batch, x_0.device)
        size, least, most = -(-len(indices) // self.num_levels), *self.times
        for start in range(0, len(indices), size):
            place = slice(start, start + size)
            level = self.process.at(levels.uniform(least, most))
            noise = torch.randn(x_0[place].shape, generator=generator, device=x_0.device)
            noisy = level.alpha * x_0[place] + level.sigma * noise
            yield place, self.results.about(indices[place]), noise, level, noisy

    def loss(self, x_0, indices, micro_batch):
        """score_weight times the mean of 0.5 (x_0 - sg(x_0 - grad))^2 = 0.5 grad^2, whose gradient at x_0 (B, ...) is
        grad / x_0.numel(), and adv_weight times that of softplus(-D).

        Returns it and {name: scalar} of what is logged; the rest is noted for `watch`.
        """
        direction, dims, errors = torch.empty_like(x_0), tuple(range(1, x_0.ndim)), torch.zeros(2, device=x_0.device)
        away, adv_loss = torch.zeros_like(x_0), torch.zeros((), device=x_0.device)  # the adversary's gradient at x_0
        with torch.no_grad(), self.accelerator.autocast():
            for place, about, noise, level, noisy in self._levels(indices, "score", micro_batch, x_0):
                with self.scores.fake.networks():
                    if self.adv_weight:
                        of_fake, adv_loss_of_part, away[place] = self._oppose(noisy, level, about)
                        adv_loss += adv_loss_of_part / len(x_0)
                    else:
                        of_fake = self.scores.fake.ask(noisy=noisy, level=level, **about)[0]
                with self.scores.real.networks():
                    of_real = self.scores.real.ask(noisy=noisy, level=level, **about)[0]
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

    def _oppose(self, noisy, level, about):
        """(what the fake score predicts for x_tau (b, ...); the sum of softplus(-D(x_tau)); its gradient at x_0).

        Taken back at once, so that no activations of the fake score are kept beside the student's.
        """
        noisy, share = noisy.detach().requires_grad_(), ADV_SHARE / len(noisy)  # of the fake score's, to fit its scale
        with torch.enable_grad(), adversary.noting(self.scores.fake) as found:
            prediction = self.scores.fake.ask(noisy=noisy, level=level, **about)[0]
            loss = softplus(-self.scores.head(adversary.features(found[-1], len(noisy)))).sum()
            (gradient,) = torch.autograd.grad(self.scaler.scale(share * loss), noisy)
        size = share * self.scaler.scale(torch.ones((), device=noisy.device))  # fp16 would round small gradients to 0
        return prediction.detach(), loss.detach(), level.alpha * gradient / size

    def watch(self, latent_std):
        """What this process has noted since the last time, {name: number}, and [warnings] of what was so the last time
        too, each once.

        latent_std: of the latents that results are to be like.
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
        return values, [f"WARNING: {sentence.format(**self.names)}" for sentence in sorted(said)]

    def fake_loss(self, x_0, indices, micro_batch):
        """The denoising loss of the fake score on the student's x_0 (B, ...), without gradient: mean of the squared
        error of its prediction, and the adversary's loss; `backward` of each part follows."""
        total, told = 0.0, torch.zeros(3, device=x_0.device)
        for place, about, noise, level, noisy in self._levels(indices, "fake", micro_batch, x_0):
            share = len(noisy) / len(x_0)
            with self.scores.fake.networks():
                with self.accelerator.autocast(), adversary.noting(self.scores.fake) as found:
                    prediction = self.scores.fake.ask(noisy=noisy, level=level, **about)[0]
                error = prediction - self.process.target(x_0[place], noise, level)
                loss = error.square().mean() * share
                total = total + loss.detach()
                if self.adv_weight:
                    with self.accelerator.autocast():
                        of_fake = self.scores.head(adversary.features(found[-1], len(noisy)))
                        of_real = self._of_real(place, level, micro_batch)
                    parts = softplus(-of_real).mean() + softplus(of_fake).mean(), of_real.mean(), of_fake.mean()
                    loss = loss + ADV_SHARE * share * parts[0]
                    told += share * torch.stack(parts).detach()
                self.scaler.scale(loss / self.accelerator.gradient_accumulation_steps).backward()
        if self.adv_weight:
            self.told.append(told)
        return total

    def _of_real(self, place, level, micro_batch):
        """The adversary's logits (b,) for what is real at a level, in the place of a micro-batch's results."""
        with torch.no_grad():
            latents, about = self.results.real(place, micro_batch)
        generator = keyed_generator(self.seed, f"real renoising {place.start}", micro_batch, self.accelerator.device)
        latents = latents.to(self.accelerator.device, torch.float32)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        noisy = level.alpha * latents + level.sigma * noise
        with adversary.noting(self.scores.fake) as found:
            self.scores.fake.ask(noisy=noisy, level=level, **about)
        return self.scores.head(adversary.features(found[-1], len(latents)))

    def train_fake(self, micro_batch, number, count):
        """Update `number` of `count` of the fake score before the student's update that begins with this global
        micro-batch, on as many samples as that has; negative numbers before the first one. Returns the mean of its
        loss."""
        accelerator, losses = self.accelerator, []
        if number < 0 and number % 10 == 0 and accelerator.is_main_process:
            screen.say(f"the fake score warms up: {-number} updates before the student's first")
        processes = accelerator.num_processes
        size = processes * accelerator.gradient_accumulation_steps
        first = micro_batch * count + number * size + accelerator.process_index
        self.scores.trained.requires_grad_(True)
        try:
            for j in range(first, first + size, processes):
                with torch.no_grad(), accelerator.autocast():
                    x_0, indices = self.results.result(None, "fake", j)
                losses.append(self.fake_loss(x_0, indices, j))
        finally:
            self.scores.trained.requires_grad_(False)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.share()
        finite = updates.step_beside(self.optimizer, self.scaler, processes, self.max_grad_norm)
        self.skipped = self.skipped + (~finite).float()
        return torch.stack(losses).mean()


def check_engine(accelerator, fake_lora_rank):
    """UserError where weights are split and the fake score is a whole copy, whose states are kept by each process."""
    if hasattr(accelerator, "sharding") and not fake_lora_rank:
        raise UserError(
            "`fake_lora_rank`=0: FSDP2 splits the student and the teacher, and no second network that is trained; "
            "give it a rank, as 64, or use `distributed_type: MULTI_GPU`"
        )

"""The adversarial part of the loss: its noise, its two sides, and whether they differ."""

import math

from common.run import updates
from common.schedules import append_dims

import torch
from torch.nn import functional

GUESSING = 2 * math.log(2)  # the discriminator's loss with logits of 0
MARGIN = 0.01  # by which a discriminator that sees something is below
MIN_UPDATES = 20  # after the warm-up, before it is judged


def draw_renoising(alpha, end_timesteps, top_timesteps, shape, generator):
    """One noising for both sides of an adversarial comparison: (t* (B,) int64, q (B, 1, ..), noise of `shape`).

    x* = q x_s + noise carries x_s from s = end_timesteps up to t* ~ U{s..top_timesteps}, q = alpha_{t*} / alpha_s and
    noise = sqrt(1 - q^2) eps*, eps* normal: what the forward process does between s and t*. float32; t* = s changes
    nothing. alpha: (T,) as from `schedules.alpha_sigma`.
    """
    device = end_timesteps.device
    draw = torch.rand(end_timesteps.shape, generator=generator, device=device)
    timesteps = end_timesteps + (draw * (top_timesteps - end_timesteps + 1)).long()
    q = append_dims(alpha[timesteps] / alpha[end_timesteps], len(shape))
    noise = torch.randn(shape, generator=generator, device=device)
    return timesteps, q, (1.0 - q**2).sqrt() * noise


def noise_data(solver, latents, end_timesteps, generator):
    """The data's own forward process at the times s = end_timesteps (B,): alpha_s z_0 + sigma_s eps', eps' normal.

    latents: z_0 (B, C, h, w). At s = 0, where samples are decoded as they are, z_0 itself. float32 (B, C, h, w).
    """
    alpha_s, sigma_s = (append_dims(x[end_timesteps], latents.ndim) for x in (solver.alpha, solver.sigma))
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    is_end = append_dims(end_timesteps == 0, latents.ndim)
    return torch.where(is_end, latents, alpha_s * latents + sigma_s * noise)


def discriminator_loss(real_logits, fake_logits):
    """L_D = softplus(-l_real) + softplus(l_fake) of each sample; all (B,); float32."""
    return functional.softplus(-real_logits.float()) + functional.softplus(fake_logits.float())


def generator_loss(fake_logits):
    """L_G = softplus(-l_fake) of each sample, the non-saturating loss (1406.2661, Section 3); (B,), float32."""
    return functional.softplus(-fake_logits.float())


def masked_mean(values, mask, count=None):
    """The sum of values (B,) where mask (B,) is true, over `count`. float32 scalar, no host sync.

    count: how often mask is expected to be true. Then the mean over micro-batches and processes is unbiased, and does
    not depend on how an update is split into them. None: how often it is true; a mean for people, 0 of nothing.
    """
    return (values.float() * mask).sum() / (mask.sum().clamp(min=1) if count is None else count)


class Watch:
    """Whether the discriminator of a stage sees a difference: its loss since its warm-up, on this process."""

    def __init__(self, stage=None):
        self.stage, self.said = stage, False
        self.updates, self.last, self.total = 0, None, 0.0  # noted; the latest; sum of losses and their number

    def note(self, stage, global_step, mask, losses, real_logits, fake_logits):
        """{name: scalar}, the means of a micro-batch over `mask`, for the log. losses: the discriminator's; all (B,).

        stage: the `segments.Stage` of the update that follows `global_step` ones.
        """
        if stage != self.stage:
            self.__init__(stage)
        values = {"loss_discriminator": losses, "logit_real": real_logits, "logit_fake": fake_logits}
        if not stage.is_warmup(global_step):
            seen = mask & losses.isfinite()  # NaN of an update that was skipped says nothing
            total = torch.stack([torch.where(seen, losses.detach(), 0.0).sum(), seen.sum()])
            self.total = self.total + total
            self.updates, self.last = self.updates + (global_step != self.last), global_step
        return {name: masked_mean(value, mask) for name, value in values.items()}

    def warning(self):
        """A line for people, once in a stage, where the loss since the warm-up is that of a guess; else "".

        Waits for the device, where the warm-up is over by as many updates as it took, and by MIN_UPDATES.
        """
        if self.said or not self.updates or self.updates < max(MIN_UPDATES, self.stage.warmup_steps):
            return ""
        total, count = self.total.tolist()
        loss = total / max(count, 1)
        if loss < GUESSING - MARGIN:
            return ""
        self.said = True
        data = "" if self.stage.adv_real == "data" else "pass `adv_real`=data, "
        return (
            f"WARNING: the discriminator of {self.stage.name} sees no difference (its loss is {loss:.3f}, that of a "
            f"guess {GUESSING:.3f}), so that the adversarial part teaches nothing; {data}raise "
            "`adv_learning_rate` and `adv_head_learning_rate`, or save its time with `adv_weights`=0\n"
        )


class Adversary:
    """A discriminator that learns beside the student, by an optimizer and a GradScaler of its own: they are outside of
    accelerator.prepare, whose gradient clipping would unscale them with the student's."""

    def __init__(self, discriminator, accelerator, **rates):
        self.discriminator, self.accelerator, self.watch = discriminator, accelerator, Watch()
        use_scaler = accelerator.mixed_precision == "fp16"
        self.optimizer, self.scaler = discriminator.make_optimizer(**rates, use_scaler=use_scaler)
        self.objects = {"discriminator_optimizer": self.optimizer, "discriminator_scaler": self.scaler}

    def begin(self, seed):
        """A stage's discriminator: the teacher's encoder, a head drawn from `seed`."""
        self.discriminator.reset(seed)
        self.optimizer.state.clear()

    def learn(self, samples, mask, count, stage, global_step, guard, **context):
        """From a micro-batch: softplus(-D(real)) + softplus(D(y^)) over `mask`, and an update where one is complete.

        samples: (real, y^), noised to one t*; context: as of `Discriminator`; guard: the `UpdateGuard` of the run.
        Returns {name: scalar} for the log.
        """
        accelerator = self.accelerator
        with self.discriminator.trainable():
            with accelerator.autocast():
                real_logits, fake_logits = self.discriminator(samples, **context)
            losses = discriminator_loss(real_logits, fake_logits)  # (B,)
            loss = masked_mean(losses, mask, count)
            self.scaler.scale(loss / accelerator.gradient_accumulation_steps).backward()
        if accelerator.sync_gradients:
            finite = updates.step_beside(self.optimizer, self.scaler, accelerator.num_processes)
            guard.count_as_skipped_unless(finite)
        return self.watch.note(stage, global_step, mask, losses, real_logits, fake_logits)

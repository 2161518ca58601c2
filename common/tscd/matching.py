"""Distribution matching on the student of a stage, by `score.matching`.

x_0 is the result of all k jumps, and all have gradients. A step's own prediction of x_0 would not do: it ends its
segment at the right point, and is no sample of the data itself but in the last one. The captions are those of the
batch at hand. The real score is the teacher with the middle of the guidance, the fake one an adapter on it, which is
on in no other place, or beside the student's adapter on one base; or a whole copy.
"""

import contextlib
from typing import NamedTuple

from common.keyed_random import keyed_generator, keyed_seed
from common.networks import encoders, lora, performance
from common.run import simulation
from common.schedules import guidance_scale_embedding
from common.score.matching import ScoreMatching

import torch

BASE = "base"  # in place of an adapter's name: all of them off
FAKE = "fake"


class Asked(NamedTuple):
    """A score: a U-Net, the adapter of it that is on (BASE: none; None: it has none), and for guidance what it is told
    without a caption and w."""

    unet: torch.nn.Module
    adapter: str | None
    uncond: dict | None = None
    w: float = 0.0

    def networks(self):
        """Inside, the U-Net is this score's; a backward pass of what it computes belongs inside too."""
        if self.adapter is None:
            return contextlib.nullcontext()
        return lora.adapters_off(self.unet) if self.adapter == BASE else lora.adapter_on(self.unet, self.adapter)

    def denoisers(self):
        return [self.unet]

    def ask(self, noisy, level, cond):
        """(what the U-Net predicts for x_tau (B, ...) at a `Level`, guided: cond + w (cond - uncond); x_tau)."""
        dtype, times = self.unet.dtype, torch.full((len(noisy),), level.timestep, device=noisy.device)
        if not self.w:
            return self.unet(noisy.to(dtype), times, **cond).sample.float(), noisy
        both = encoders.concat_conditioning(cond, self.uncond, dtype)
        output = self.unet(noisy.repeat(2, 1, 1, 1).to(dtype), times.repeat(2), **both).sample.float()
        with_caption, without = output.chunk(2)
        return with_caption + self.w * (with_caption - without), noisy


class Scores(NamedTuple):
    """The two scores, and what is trained of the fake one, frozen but while it is."""

    real: Asked
    fake: Asked
    trained: torch.nn.ParameterList
    head: None = None  # there is no adversary


def make_scores(teacher_unet, uncond, w, fake_unet=None, *, rank, has_lora, seed, recomputed="none"):
    """The `Scores` of a run; their adapters are the same for a seed, however the networks were made.

    has_lora: the student is an adapter of the teacher's U-Net, and the fake score becomes a second one, of `rank`.
    Else the fake score is the only adapter, or fake_unet, a copy. recomputed: as in `performance.recompute`.
    """
    if fake_unet is not None:
        real, fake, trained = Asked(teacher_unet, None, uncond, w), Asked(fake_unet, None), fake_unet.parameters()
    else:
        adapter = FAKE if has_lora else lora.ADAPTER
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(keyed_seed(seed, "fake score"))
            if has_lora:
                lora.add_second(teacher_unet, rank, FAKE)
            else:
                lora.add_lora(teacher_unet, rank, rank)
        if not has_lora:
            performance.recompute(teacher_unet, recomputed)
            for layer in teacher_unet._lora_layers:
                layer._active_adapter = []  # the teacher, wherever `adapter_on` says nothing else
        real, fake = Asked(teacher_unet, BASE, uncond, w), Asked(teacher_unet, adapter)
        trained = lora.adapter_tensors(teacher_unet, adapter).values()
    trained = torch.nn.ParameterList(trained)
    trained.requires_grad_(False)
    return Scores(real, fake, trained)


class Jumps:
    """What a stage's student makes of fresh noise, for the captions of the micro-batch at hand."""

    def __init__(self, student, solver, seed, w=0.0, w_dim=None):
        """student: not wrapped; w, w_dim: the guidance that it is told, and the width of its embedding, or None."""
        self.student, self.solver, self.seed, self.stds = student, solver, seed, []
        told = torch.full((1,), w, device=solver.alpha.device)
        self.told = {"timestep_cond": guidance_scale_embedding(told, w_dim)} if w_dim else {}

    def take(self, latents, cond, timesteps):
        """latents: of the micro-batch (B, 4, h, w); cond: as from `encoders.conditioning`; timesteps: (k + 1,), from
        the last one down, see `TrajectorySolver.roll_out`."""
        self.shape, self.device, self.timesteps, self.cond = latents.shape, latents.device, timesteps, cond
        self.stds.append(latents.std())

    def result(self, student, name, micro_batch):
        """(x_0 (B, ...) of fresh noise, the places in the micro-batch); name: for what it is drawn."""
        generator = keyed_generator(self.seed, f"{name} noise", micro_batch, self.device)
        noise = torch.randn(self.shape, generator=generator, device=self.device)
        x_0 = self.solver.roll_out(student or self.student, noise, self.timesteps, **self.told, **self.cond)
        return x_0, range(len(noise))

    def about(self, indices):
        """What both scores are asked about: the conditioning of places that follow one another."""
        return {"cond": _part(self.cond, slice(indices[0], indices[-1] + 1))}


def _part(cond, place):
    return {name: _part(value, place) if isinstance(value, dict) else value[place] for name, value in cond.items()}


class StageScore:
    """The score of the stages that have a weight for it."""

    def __init__(self, jumps, scores, optimizer, accelerator, *, fake_updates, fake_warmup, **options):
        self.jumps, self.optimizer, self.accelerator = jumps, optimizer, accelerator
        self.matching = ScoreMatching(jumps, scores=scores, optimizer=optimizer, accelerator=accelerator, **options)
        self.trained, self.fake_updates = scores.trained, fake_updates
        self.warmup = 0 if simulation.is_on() else fake_warmup  # whose updates are as all others
        self.objects = {"fake_optimizer": optimizer, "fake_scaler": self.matching.scaler}
        self.initial = []  # stays in the main process's main memory; taken before a checkpoint is loaded
        if accelerator.is_main_process:
            self.initial = [p.detach().to("cpu", copy=True) for p in self.trained]
            simulation.in_main_memory(self.initial)

    def begin(self):
        """A stage's fake score: the teacher; called by all."""
        for parameter, initial in zip(self.trained, self.initial, strict=False):
            parameter.data.copy_(initial)
        self.matching.share_out()
        self.optimizer.state.clear()
        self.matching.found, self.matching.said = set(), set()

    def loss(self, stage, run, micro_batch, begins):
        """(the loss of distribution matching of a micro-batch, with the stage's weight; {name: scalar} for the log).

        begins: whether an update of the student begins here; then the fake score is updated before, from the teacher
        on where the stage begins too. micro_batch: the global one of this process. Nothing where the `TrainingRun` is
        stopped in a warm-up.
        """
        self.matching.score_weight, is_first = stage.score_weight, begins and run.global_step == stage.start
        logged, first = {}, micro_batch - self.accelerator.process_index
        if is_first:
            self.begin()
        for number in range(-self.warmup if is_first else 0, self.fake_updates) if begins else ():
            if number < 0 and run.stopper.check():
                return None, {}
            logged["loss_fake"] = self.matching.train_fake(first, number, self.fake_updates)
        x_0, places = self.jumps.result(None, "score", micro_batch)
        loss, more = self.matching.loss(x_0, places, micro_batch)
        return loss, logged | more

    def watch(self):
        """What has been noted since the last time, {name: number}, and lines for people."""
        if not self.jumps.stds:
            return {}, ""
        std, self.jumps.stds = torch.stack(self.jumps.stds).mean().item(), []
        values, warnings = self.matching.watch(std)
        return values, "".join(f"{warning}\n" for warning in warnings)

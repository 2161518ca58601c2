"""Score distillation of any pipeline: its two scores, what they are asked about, and how its student makes x_0.

x_0 is the student's in a step of its call that is drawn (backward simulation: the steps before it run without
gradients), or in all of them. Both scores are asked by the pipeline's own call, see `levels`. The loss: see
`score.matching`.
"""

import copy
import dataclasses
from random import Random
from typing import NamedTuple

from common.direct import pipelines
from common.direct.levels import OFF, Asked, result_of_step
from common.direct.pairs import PairOrder, Pairs
from common.direct.pipelines import SCHEDULE_ARGUMENTS, denoisers
from common.direct.probes import count_rows, embeds_guidance, guidance_argument
from common.direct.student import FROM_PAIRS
from common.direct.tasks import arguments as call_arguments
from common.errors import CALL_ERRORS, UserError, blame
from common.keyed_random import keyed_seed
from common.networks import lora
from common.run import sharding, simulation
from common.score import adversary, matching
from common.score.process import Process

import torch

ADAPTER = "fake"  # of a network whose first adapter is the student


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
        name = type(self.fake.pipeline).__name__
        try:
            width = adversary.features(found[-1], 1).shape[-1]
        except (LookupError, RuntimeError):
            sentence = f"`adv_weight`: the denoiser of a {name} has no middle that gives features; drop it"
            raise UserError(sentence) from None
        head = adversary.Head(width).to(parameter.device)
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


def load_denoisers(load, pipeline, accelerator, dtype):
    """{name: denoiser} of the teacher once more, on the device, its weights split where the student's are.

    load(dtype, **parts): the teacher's pipeline; its other parts are those of `pipeline`.
    """
    names = denoisers(pipeline)
    networks = denoisers(load(dtype, **{n: part for n, part in pipeline.components.items() if n not in names}))
    sharding.shard(accelerator, [], plain=list(networks.values()))
    return {name: network.to(accelerator.device) for name, network in networks.items()}


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
    matching.check_engine(accelerator, rank)
    if len(networks) > 1 and hasattr(accelerator, "sharding"):
        raise UserError(
            f"`score_weight`: a step of a {name} trains one of its {len(networks)} denoisers, and processes of FSDP2 "
            "have to train the same one; drop it, or use `distributed_type: MULTI_GPU`"
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
class Results:
    """What the student makes of fresh noise for prompts that are drawn, the same after a resume and for any number of
    processes."""

    student: pipelines.Rollout  # not wrapped
    process: Process
    data: Prompts
    batch_size: int
    num_steps: int  # of the student
    through: str  # what of its call x_0 comes from: "step", one that is drawn, or "call", all of them
    seed: int
    images: Pairs | None = None  # what is real to the adversary; None: the pairs
    is_split: bool = False  # its weights are, so that all processes ask its denoiser equally often: in all its steps

    def __post_init__(self):
        numbers = {"score": len(self.data.prompts), "fake": len(self.data.prompts)}
        numbers["real"] = len(self.images) if self.images else self.data.number
        self.orders = {x: PairOrder(n, self.batch_size, keyed_seed(self.seed, x)) for x, n in numbers.items()}

    def result(self, rollout, name, micro_batch):
        """(x_0 of the student from fresh noise, float32 (B, ...); the indices of its prompts).

        rollout: the student as it is wrapped, or None. name: "score" or "fake", for what it is drawn.
        """
        indices, rollout = self.orders[name][micro_batch], rollout or self.student
        seeds = [keyed_seed(self.seed, f"{name} noise", micro_batch, i) for i in range(len(indices))]
        about = self.about(indices)
        if self.through == "call":
            return rollout(seeds=seeds, **about).float(), indices
        step = Random(keyed_seed(self.seed, f"{name} step", micro_batch)).randrange(self.num_steps)
        options = self.student.kwargs | about | {"seeds": seeds, "step": step, "goes_on": self.is_split}
        x_0 = rollout(again=lambda: result_of_step(self.student.pipeline, self.process, **options))
        return x_0, indices

    def about(self, indices):
        """What both scores are asked about: keyword arguments of `Asked.ask`."""
        return {"prompts": [self.data.prompts[i] for i in indices], **self.data.call_kwargs(indices)}

    def real(self, place, micro_batch):
        """(real latents in a place of a micro-batch, what they are about), for the adversary."""
        data, indices = self.images or self.data.data, self.orders["real"][micro_batch][place]
        return data.latents(indices), {"prompts": [data.prompts[i] for i in indices], **data.call_kwargs(indices)}

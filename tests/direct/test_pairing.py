"""Whether seeds belong to results: on pairs as the guide makes them, stock DDIM of 40 steps, guidance 2, png."""

import functools

from common.direct import pairing, pipelines, probes, sources
from common.direct.student import student_kwargs
from common.errors import UserError
from common.tools import generate_pairs

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from scipy.stats import kstest, permutation_test

NUMBER = 32


class Made:
    """Pairs in memory: `latents` belong to `seeds`, unless a test edits these."""

    def __init__(self, prompts, seeds, latents):
        self.prompts, self.seeds, self.hashes, self.results = prompts, list(seeds), None, latents

    def __len__(self):
        return len(self.prompts)

    def latents(self, indices):
        return self.results[list(indices)]

    def call_kwargs(self, indices):
        return {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def guide(direct_teacher, prompts_file):
    """{"latents", "png"}: the teacher's latents, and its images of 8 bits encoded again."""
    stock = DiffusionPipeline.from_pretrained(direct_teacher())
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)  # which clips, as stock diffusers does
    stock.set_progress_bar_config(disable=True)
    prompts = (generate_pairs.read_prompts(prompts_file) * NUMBER)[:NUMBER]
    options = {"num_inference_steps": 40, "guidance_scale": 2.0, "generator": pipelines.generators(range(NUMBER))}
    latents = stock(prompts, output_type="latent", **options).images
    with torch.no_grad():
        images = stock.image_processor.postprocess(stock.vae.decode(latents / stock.vae.config.scaling_factor).sample)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    return {"latents": (prompts, latents), "png": (prompts, sources.encode_images(stock, pixels))}


@pytest.fixture(scope="module")
def student(direct_teacher):
    """student(steps): (rollout, scheduler) of the untrained one."""

    @functools.cache
    def make(steps):
        pipeline = pipelines.load_pipeline(direct_teacher())
        scheduler, _ = probes.student_scheduler(type(pipeline.scheduler), dict(pipeline.scheduler.config))
        pipeline.scheduler = scheduler
        one = Made(["a"], [0], None)
        kwargs, _ = student_kwargs(pipeline, one, {}, steps, {})
        return pipelines.Rollout(pipeline, **kwargs), scheduler

    return make


def check(student, made, steps=4):
    return pairing.check_pairing(student(steps)[0], made, student(steps)[1], 16)


@pytest.mark.parametrize("kind", ["latents", "png"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_pairs_of_the_guide_pass_whatever_the_number_of_steps(student, guide, kind, steps):
    assert check(student, Made(guide[kind][0], range(NUMBER), guide[kind][1]), steps).startswith("seeds and results")
    scheduler = student(steps)[0].pipeline.scheduler  # of the call with so many steps, as it was before
    assert len(scheduler.set_timesteps(steps) or scheduler.timesteps) == steps


MIXED = {
    "shuffled": lambda seeds: np.random.default_rng(0).permutation(seeds).tolist(),
    "off by one": lambda seeds: [seed + 1 for seed in seeds],
    "of others": lambda seeds: [seed + 500 for seed in seeds],
}


@pytest.mark.parametrize(("kind", "number"), [("latents", 9), ("png", NUMBER)])
@pytest.mark.parametrize("change", MIXED.values(), ids=MIXED)
def test_seeds_of_other_results_are_refused(student, guide, kind, number, change):
    prompts, latents = guide[kind]
    made = Made(prompts[:number], change(range(number)), latents[:number])
    with pytest.raises(UserError, match="seeds and results do not belong together.*pass `skip_pairs_check`$"):
        check(student, made)


def test_pairs_of_which_a_part_is_mixed_up_are_warned_of(student, guide):
    seeds = [i if i < NUMBER // 2 else i + 500 for i in range(NUMBER)]
    said = check(student, Made(guide["latents"][0], seeds, guide["latents"][1]))
    assert said.startswith("WARNING: from the recorded") and "a part of the pairs may have wrong seeds" in said


def test_few_pairs_are_warned_of_and_not_refused(student, guide):
    prompts, latents = guide["png"]
    said = check(student, Made(prompts[:3], [500, 501, 502], latents[:3]))
    assert said.startswith("WARNING") and "too few pairs to tell" in said


def test_a_poisoned_pair_does_not_count(student, guide):
    prompts, latents = guide["latents"]
    latents = latents.clone()
    latents[3] = float("nan")
    cosines = pairing.likeness(student(4)[0], Made(prompts, range(NUMBER), latents), range(8), 2, 4)
    assert cosines.shape == (7, 3) and (cosines[:, :1] > cosines[:, 1:]).all()


def test_the_chance_is_that_of_a_permutation_test():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.3):
        cosines = rng.normal(size=(12, 2)) * 0.3 + [shift, 0.0]
        options = {"permutation_type": "samples", "alternative": "greater", "n_resamples": np.inf}
        expected = permutation_test((cosines[:, 0], cosines[:, 1]), lambda a, b: (a - b).mean(), **options).pvalue
        assert pairing.chance(cosines) == pytest.approx(expected, abs=0.02)
    chances = [pairing.chance(rng.normal(size=(10, 5)), draws=499) for _ in range(400)]
    assert kstest(chances, "uniform").pvalue > 0.01
    assert pairing.chance(np.zeros((0, 2))) == pairing.chance(np.zeros((5, 2))) == 1.0


def test_pairs_in_half_precision_are_decoded_where_the_run_computes_in_float32(guide, student):
    """bfloat16 has 8 significant bits; the images are those of the rounded latents."""
    rollout, _ = student(4)
    prompts, latents = guide["latents"]
    rounded = latents[:2].bfloat16()
    images = pipelines.decode(rollout.pipeline, rounded, prompts[:2], **rollout.kwargs)
    expected = pipelines.decode(rollout.pipeline, rounded.float(), prompts[:2], **rollout.kwargs)
    assert images.shape[0] == 2 and torch.allclose(images.float(), expected, atol=1e-5)

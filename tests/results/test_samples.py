import datetime
import os
import socket

from common.errors import UserError
from common.networks import teachers
from common.results import samples
from tests.forks import end_of, fork

import numpy as np
import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, LCMScheduler


class Tracker:
    def __init__(self, name):
        self.name, self.got, self.tracker = name, [], self

    def log_images(self, values, step=None, **kwargs):
        self.got.append((dict(values), step, kwargs))


class CometExperiment(Tracker):
    log_images = None

    def log_image(self, image, name=None, step=None):
        self.got.append((name, image.shape, step))


@pytest.fixture
def parts(teacher):
    pipeline = teachers.load_teacher(teacher())
    unet = teachers.make_student(pipeline.unet, 32)
    return pipeline, unet, LCMScheduler.from_config(pipeline.scheduler.config)


def run(parts, trackers, **modules):
    pipeline, unet, scheduler = parts
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = trackers
    return samples.sample_grid(
        accelerator,
        pipeline,
        modules or {"student": unet},
        scheduler,
        ["a", "b"],
        [1, 2],
        5,
        16,
        7,
        guidance_scale=2.0,
    )


def test_every_tracker_gets_every_image(parts):
    trackers = [Tracker("tensorboard"), Tracker("wandb"), CometExperiment("comet_ml")]
    images = run(parts, trackers, student=parts[1], target=parts[0].unet)
    tags = [f"validation/{name}_{k}_steps" for name in ("student", "target") for k in (1, 2)]
    assert list(images) == tags and all(i.shape == (2, 16, 16, 3) and i.dtype == np.uint8 for i in images.values())
    assert list(trackers[0].got[0][0]) == tags and trackers[0].got[0][1:] == (7, {"dataformats": "NHWC"})
    assert [len(v) for v in trackers[1].got[0][0].values()] == [2] * 4
    assert len(trackers[2].got) == 8 and {step for *_, step in trackers[2].got} == {7}


def test_samples_disturb_neither_the_run_nor_the_mode(parts):
    unet = parts[1]
    unet.mid_block.eval()
    unet.train()
    state = torch.get_rng_state()
    first = run(parts, [])
    assert torch.equal(torch.get_rng_state(), state) and unet.training
    assert all(np.array_equal(a, b) for a, b in zip(first.values(), run(parts, []).values(), strict=True))


def test_samples_are_made_in_eval_mode_on_the_modules_at_hand(parts, monkeypatch):
    modes = []
    parts[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)  # a reload would fail
    run(parts, [])
    assert modes == [False] * (2 * (1 + 2))


def test_images_are_those_of_the_stock_pipeline(parts):
    pipeline, unet, scheduler = parts
    images = run(parts, [])["validation/student_2_steps"]
    stock = samples.make_pipeline(pipeline, unet.eval(), scheduler)
    expected = stock("b", num_inference_steps=2, guidance_scale=2.0, height=16, width=16,
                     generator=torch.Generator().manual_seed(6), output_type="np").images[0]  # fmt: skip
    assert np.abs(images[1] - expected * 255).max() <= 0.5 + 1e-4


def two_processes(body):
    """Fork two gloo processes that call body(accelerator): their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def start(rank):
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent's is of one process
        options = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=20))  # of a process that would hang
        body(Accelerator(cpu=True, kwargs_handlers=[options]))

    return [end_of(process) for process in [fork(lambda rank=rank: start(rank)) for rank in range(2)]]


def test_two_processes_share_the_images_that_one_makes(parts):
    pipeline, unet, scheduler = parts
    modules, calls = {"student": unet, "target": pipeline.unet}, []
    expected = run(parts, [], **modules)
    for module in modules.values():
        module.register_forward_pre_hook(lambda *_: calls.append(1))

    def body(accelerator):
        options = scheduler, ["a", "b"], [1, 2], 5, 16, 7
        images = samples.sample_grid(accelerator, pipeline, modules, *options, guidance_scale=2.0)
        assert len(calls) == 2 * (1 + 2)  # half of 2 networks x 2 prompts x (1 + 2) steps
        assert list(images) == list(expected)
        assert all(np.array_equal(images[tag], expected[tag]) for tag in images)  # the same computations

    assert two_processes(body) == [0, 0]


def test_an_error_on_one_process_ends_both():
    def body(accelerator):
        def work(job):
            if job == 3:
                raise ValueError("bad job")
            return job

        assert samples.share(accelerator, [5, 6, 7], work) == [5, 6, 7]
        assert samples.share(accelerator, [], work) == []
        is_mine = accelerator.process_index == 1
        kind, text = (ValueError, "^bad job$") if is_mine else (UserError, "process 1 of 2 .*ValueError: bad job")
        with pytest.raises(kind, match=text):
            samples.share(accelerator, [2, 3, 4], work)
        assert samples.share(accelerator, [1], work) == [1]  # nobody is left behind

    assert two_processes(body) == [0, 0]

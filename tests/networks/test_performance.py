"""Levers of speed and memory: none changes a result, and each does what it is for."""

import shutil
import sys
from pathlib import Path

import train_direct_distill as direct
import train_lcm_distill_sd_wds as lcm
from common.direct import pipelines
from common.errors import UserError
from common.flags import ArgumentParser
from common.networks import performance
from common.run import checkpointing, engine
from common.run.preemption import Stopper
from common.tscd.discriminator import copy_encoder
from tests import tiny_pipelines as tiny
from tests.cases import ROOT, SCRIPTS, one_sentence, scalars, soak_but, train
from tests.made import CONFIG

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

UNET = {
    "sample_size": 16, "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8, "attention_head_dim": 2,
}  # fmt: skip
LIKE_SDXL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture
def compiles_at_once(monkeypatch):
    """torch.compile traces and guards as ever, and runs what it traced without making kernels of it."""
    monkeypatch.setattr(performance, "COMPILE_OPTIONS", performance.COMPILE_OPTIONS | {"backend": "eager"})
    torch._dynamo.reset()
    counters.clear()
    limits = {name: getattr(torch._dynamo.config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with torch._dynamo.config.patch(**limits, optimize_ddp=torch._dynamo.config.optimize_ddp):  # put back afterwards
        with torch._inductor.config.patch(fallback_random=torch._inductor.config.fallback_random):
            yield
    torch._dynamo.reset()


def make_network(kind):
    torch.manual_seed(0)
    if kind == "ct":
        return UNet2DModel(**CONFIG | {"sample_size": 16, "_class_name": None, "dropout": 0.3}).train()
    return UNet2DConditionModel(**{"sd": UNET, "sdxl": LIKE_SDXL}[kind]).train()


def run(network):
    """One forward pass of a U-Net on fixed inputs: its output."""
    generator = torch.Generator().manual_seed(0)
    channels = network.config.in_channels
    latents = torch.randn(2, channels, 16, 16, generator=generator)
    text = [torch.randn(2, 5, 8, generator=generator)] if isinstance(network, UNet2DConditionModel) else []
    torch.manual_seed(1)  # dropout
    return network(latents, torch.tensor([3, 5]), *text).sample


# --- recomputed activations


def backward(network):
    """(loss, {parameter: gradient}, bytes kept for the backward pass beside the weights)."""
    weights, kept = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run(network).square().mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in network.named_parameters()}, sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ct"])
def test_recomputing_changes_no_gradient_and_selective_keeps_less(kind):
    results = {}
    for which in performance.CHECKPOINTING:
        network = make_network(kind)
        performance.recompute(network, which)
        results[which] = backward(network)
    loss, gradients, plain = results["none"]
    for which in ("selective", "full"):
        # of networks in different memory: equal up to rounding
        assert results[which][0] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(results[which][1], gradients, rtol=1e-4, atol=1e-6)
    assert results["full"][2] < 0.9 * results["selective"][2] and results["selective"][2] < 0.9 * plain


def test_selective_is_the_levels_down_to_the_first_with_text():
    for kind, down, up in (("sd", [0], [2]), ("sdxl", [0, 1], [1, 2]), ("ct", [0], [1])):
        network = make_network(kind)
        chosen = performance.recomputed_blocks(network)
        assert [i for i, block in enumerate(network.down_blocks) if block in chosen] == down
        assert [i for i, block in enumerate(network.up_blocks) if block in chosen] == up
        assert network.mid_block not in chosen
    encoder = copy_encoder(make_network("sd"))  # of a discriminator: no up blocks
    performance.recompute(encoder, "selective")
    assert encoder.down_blocks[0] in performance.recomputed_blocks(encoder)


@pytest.mark.parametrize("name", ["Flux", "SD3", "AuraFlow", "Z-Image", "Wan"])
def test_selective_recomputes_every_second_block_of_a_transformer(name):
    """A recomputation ends early, so that a hook after the block would miss it."""
    pipeline = tiny.make(name)
    for network in pipelines.denoisers(pipeline).values():
        blocks, calls = performance.repeated_blocks(network), []
        assert len(blocks) >= 1
        performance.recompute(network, "selective")
        for block in blocks:
            block.register_forward_pre_hook(lambda block, *_, calls=calls: calls.append(block))
        rollout = pipelines.Rollout(pipeline, **tiny.KWARGS[name] | {"num_inference_steps": 1}).requires_grad_(True)
        output = rollout(["a", "b"], [0, 1])
        forward = list(calls)
        output.float().square().mean().backward()
        again = calls[len(forward) :]
        assert set(forward) == set(blocks) and set(again) == set(blocks[::2])


def test_a_denoiser_that_cannot_be_recomputed_in_part_is_refused():
    denoisers = {"transformer": (type(tiny.make("HunyuanDiT").transformer), {})}
    with pytest.raises(UserError, match="`gradient_checkpointing`=selective: the teacher's transformer.*; pass full"):
        pipelines.check_performance(denoisers, "selective", False, False)
    pipelines.check_performance(denoisers, "full", False, False)


@pytest.mark.parametrize(
    ("words", "value"),
    [([], "none"), (["--gradient_checkpointing"], "full"), (["--gradient_checkpointing=selective"], "selective")],
)
def test_the_bare_flag_is_full(words, value):
    required = ["--pretrained_teacher_model=t", "--train_shards_path_or_url=s"]
    assert lcm.parse_args([*words, *required]).gradient_checkpointing == value
    assert lcm.parse_args([*required, *words]).gradient_checkpointing == value


@pytest.mark.parametrize("saved", [True, False, None])
def test_checkpoints_of_earlier_versions_are_of_the_same_run(saved):
    now = {"seed": 1, "gradient_checkpointing": "selective", "compile": True, "channels_last": True}
    before = {"seed": 1} | ({} if saved is None else {"gradient_checkpointing": saved})
    lcm.parse_args(["--pretrained_teacher_model=t", "--train_shards_path_or_url=s"])
    checkpointing.check_same_run("checkpoint-1", before, now, **ArgumentParser.latest.resume_rules())


# --- compiled blocks

# Beside --compile, and the update after which nothing is left to compile. TSCD: its first stage goes through all that
# a discriminator does; later stages do the same.
COMPILED = {
    "lcm": ({}, 1),
    "lcm_lora": ({"mixed_precision": "bf16", "gradient_checkpointing": "selective", "channels_last": True}, 1),
    "tscd": ({"stage_steps": "2,2"}, 2),
    "tscd_lora": ({"stage_steps": "2,2", "mixed_precision": "bf16"}, 2),
    "ct": ({"max_train_steps": 4, "checkpointing_steps": 2}, 1),
    "direct": ({"gradient_checkpointing": True}, 1),
}


@pytest.mark.parametrize("name", soak_but("ct"))
def test_nothing_is_compiled_after_the_first_updates_and_results_are_the_same(
    tmp_path, command, monkeypatch, compiles_at_once, name
):
    """Samples between updates have other shapes, and are not compiled. 4 updates of a batch that does not divide the
    number of samples: no batch is shorter than the others."""
    changes, warm = COMPILED[name]
    changes = {"train_batch_size": 5, "max_train_steps": 4, "validation_steps": 2, "report_to": "none"} | changes
    check, step = Stopper.check, [0]

    def no_more(self):
        step[0] += 1
        if step[0] == warm:
            torch.compiler.set_stance("fail_on_recompile")
        return check(self)

    monkeypatch.setattr(Stopper, "check", no_more)
    try:
        train(command(name, tmp_path / "a", **changes, compile=True), SCRIPTS[name])
    finally:
        torch.compiler.set_stance("default")
    assert step[0] == 4 and counters["stats"]["unique_graphs"] >= 8 and not counters["graph_break"]
    monkeypatch.setattr(Stopper, "check", check)

    # without the flag, and going on from the compiled run's checkpoint without it
    train(command(name, tmp_path / "b", **changes), SCRIPTS[name])
    (tmp_path / "c").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "c" / "checkpoint-2")
    shutil.copy(tmp_path / "a" / checkpointing.CONFIG, tmp_path / "c")
    train(command(name, tmp_path / "c", **changes, resume_from_checkpoint="latest"), SCRIPTS[name])
    a, b, c = (state_of(tmp_path / x / "checkpoint-4") for x in "abc")
    assert a.keys() == b.keys() == c.keys()
    for key in b:  # traced and not: up to rounding, and what Adam makes of it
        np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(c[key], b[key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_transformers_compile_for_once(compiles_at_once, name):
    results = []
    for compiles in (False, True):
        pipeline = tiny.make(name)
        for network in pipelines.denoisers(pipeline).values():
            if compiles:
                performance.compile_blocks(network)
        options = tiny.KWARGS.get(name, {}) | {"num_inference_steps": 2}
        rollout = pipelines.Rollout(pipeline, **options).requires_grad_(True)
        output = rollout(["a", "b"], [0, 1])
        output.float().square().mean().backward()
        results.append(output.detach())
    torch.testing.assert_close(*results)  # of two pipelines, in different memory: equal up to rounding
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    try:
        torch.compiler.set_stance("fail_on_recompile")
        rollout(["c", "d"], [2, 3]).float().sum().backward()
    finally:
        torch.compiler.set_stance("default")


def state_of(checkpoint):
    """Weights and optimizer states of a checkpoint, as nested lists: whatever their layout in memory."""
    tensors = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    assert tensors
    tensors["optimizer"] = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    flat = {}
    for name, group in tensors.items():
        for key, value in group.items():
            for part, tensor in (value if isinstance(value, dict) else {"": value}).items():
                flat[name, key, part] = tensor.flatten().tolist() if torch.is_tensor(tensor) else tensor
    return flat


# --- convolutions' layout


def test_channels_last_reaches_activations_of_every_network_and_changes_little(tmp_path, command, monkeypatch):
    """Latents and images need no conversion of their own: a convolution gives its weights' layout to its output."""
    words = command("lcm", tmp_path / "a", channels_last=True)
    seen, forward = {}, torch.nn.Conv2d.forward

    def watched(self, x):
        y = forward(self, x)
        if len(y) > 1 and min(y.shape[1:]) > 1:  # in training, and else both layouts are one
            kind = (self.weight.requires_grad, self.in_channels)
            seen.setdefault(kind, set()).add(y.is_contiguous(memory_format=torch.channels_last))
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    train(words, lcm)
    assert {trains for trains, _ in seen} == {True, False} and {3, 4, 32} <= {width for _, width in seen}
    assert set.union(*seen.values()) == {True}
    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    train(command("lcm", tmp_path / "b"), lcm)
    a, b = (list(scalars(tmp_path / x, "loss").values()) for x in "ab")
    assert a == pytest.approx(b, rel=1e-4)
    unets = [DiffusionPipeline.from_pretrained(tmp_path / x).unet for x in "ab"]
    for p, q in zip(*(unet.parameters() for unet in unets), strict=True):
        assert p.is_contiguous() and torch.allclose(p, q, atol=1e-3)


def test_resumed_optimizer_states_have_their_parameters_layout():
    """Fused kernels refuse others."""
    weight = torch.nn.Parameter(torch.randn(4, 6, 3, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.randn(4, 6, 3, 3)
    optimizer.step()
    expected = optimizer.state[weight]["exp_avg"].clone()
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    checkpointing._match_layout(optimizer)
    state = optimizer.state[weight]
    assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == weight.stride() != expected.stride()
    assert torch.equal(state["exp_avg"], expected) and state["step"].ndim == 0


def test_channels_last_is_for_convolutions(tmp_path, direct_flags, capsys, monkeypatch):
    pipelines.check_performance({"unet": (UNet2DConditionModel, UNET)}, "none", False, True)
    words = direct_flags(tmp_path / "out", "dit", channels_last=True, dry_run=True)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)  # nothing is loaded before
    assert "--channels_last is a layout of convolutions, and the teacher's transformer" in one_sentence(
        capsys, train, words, direct
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--channels_last", "--use_8bit_adam"], "--use_8bit_adam puts weights back into the other layout"),
        (["--compile"], "--compile: torch.compile needs a C++ compiler"),
        (["--gradient_checkpointing=some"], "invalid choice: 'some'"),
    ],
)
def test_levers_that_cannot_work_are_refused(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sentence in one_sentence(
        capsys, lcm.parse_args, [*words, "--pretrained_teacher_model=t", "--train_shards_path_or_url=s"]
    )


@pytest.mark.parametrize(("has_gpu", "missing"), [(False, "needs a GPU"), (True, None)])
def test_xformers_is_asked_for_where_it_may_run(tmp_path, has_gpu, missing, flags, capsys, monkeypatch):
    monkeypatch.setattr(performance.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    args = lcm.parse_args(flags(tmp_path, enable_xformers_memory_efficient_attention=True))
    engine.make_accelerator(args)
    out = capsys.readouterr().out
    assert args.enable_xformers_memory_efficient_attention == has_gpu
    assert missing in out and "torch's attention" in out if missing else not out


# --- nothing waits for the device


class Pulls(TorchDispatchMode):
    """Notes where values are asked for that a GPU would have to be waited for: .item(), bool(), .cpu(), and
    operators whose output's size depends on values. Between two updates, `watching` alone."""

    OPERATORS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.watching, self.places = False, []

    def note(self):
        if not self.watching:
            return
        frame, files = sys._getframe(2), []
        while frame:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        ours = [file for file in files if ROOT in Path(file).parents and file != __file__]
        self.places.append((Path(ours[0]).name if ours else files[0], files))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in self.OPERATORS:
            self.note()
        return operator(*args, **(kwargs or {}))


# What a script may ask for, by the file of ours that does: see docs/performance.md.
ALLOWED = {
    # RAdam is not fused, so that the host decides whether it steps, and torch reads its step count, which the host
    # holds; noise levels and their shares are the host's too
    "ct": {"updates.py", "consistency.py"},
    # inside a pipeline's call: how its scheduler finds its place; pairs and embeddings are the host's
    "direct": {"pipelines.py", "pairs.py", "embeddings.py"},
}


@pytest.mark.parametrize("name", soak_but("lcm"))  # what the host reads of the others: tests/run/test_simulation.py
def test_nothing_is_asked_of_the_device_between_log_entries(tmp_path, command, monkeypatch, name):
    """Watched: updates 2 and 3 of two micro-batches each; log entries and checkpoints are after the fourth."""
    pulls, check, updates = Pulls(), Stopper.check, [0]

    def counted(self):
        updates[0] += 1
        pulls.watching = updates[0] in (1, 2)
        return check(self)

    monkeypatch.setattr(Stopper, "check", counted)
    for pull in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, pull)
        monkeypatch.setattr(torch.Tensor, pull, lambda t, *a, method=method, **k: pulls.note() or method(t, *a, **k))
    adamw = torch.optim.AdamW  # fused, as on a GPU
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: adamw(*args, **kwargs | {"fused": True}))
    changes = {"max_train_steps": 4, "logging_steps": 4, "checkpointing_steps": 4, "gradient_accumulation_steps": 2}
    changes |= {"stage_steps": "4,4", "max_train_steps": 8, "logging_steps": 8} if name.startswith("tscd") else {}

    class Enough(Exception):
        pass

    def end(*args):
        raise Enough

    monkeypatch.setattr(checkpointing, "save_checkpoint", end)
    with pulls, pytest.raises(Enough):
        train(command(name, tmp_path / "out", report_to="none", **changes), SCRIPTS[name])
    found = [(place, files) for place, files in pulls.places if place not in ALLOWED.get(name, ())]
    assert updates[0] >= 3 and not found, [(place, files[:6]) for place, files in found[:3]]

"""End layers in float32 under autocast: what rounding leaves of a difference of outputs, and what dtypes are kept."""

import copy
import functools
import types

from common.networks import lora, performance
from common.run import engine

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

ENDS = ("conv_in", "conv_norm_out", "conv_out")
BF16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def text_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "block_out_channels": [16, 32]}
    blocks["up_block_types"] = ["CrossAttnUpBlock2D", "UpBlock2D"]
    return UNet2DConditionModel(**blocks, layers_per_block=1, cross_attention_dim=8, norm_num_groups=8, sample_size=8)


def inputs(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 3, 8, generator=draw)
    return x.to(dtype), torch.tensor([999, 499]), text.to(dtype)


def answer(unet, x, t, text):
    return unet(x, t, text).sample


@torch.no_grad()
def test_the_ends_round_nothing_and_a_copy_has_its_own():
    plain, ends = text_unet(), text_unet()
    performance.float32_ends(ends)
    copied = copy.deepcopy(ends)
    torch.nn.init.zeros_(copied.conv_out.weight)
    for name, width in (("conv_in", 4), ("conv_norm_out", 16), ("conv_out", 16)):
        hidden_states = torch.randn(2, width, 8, 8, generator=torch.Generator().manual_seed(0))
        exact = getattr(plain, name)(hidden_states)
        with BF16():
            assert torch.equal(getattr(ends, name)(hidden_states), exact)  # the same computation, twice
            if name != "conv_norm_out":
                assert (getattr(plain, name)(hidden_states) - exact).abs().max() > 1e-4
    assert ends.conv_out.weight.abs().max() > 0 and copied.conv_out.forward.__self__ is copied.conv_out


@torch.no_grad()
def test_only_the_ends_are_in_float32_under_autocast_and_nothing_changes_without():
    unet, seen = text_unet(), {}
    performance.float32_ends(unet)
    plain = text_unet()
    assert torch.equal(answer(plain, *inputs()), answer(unet, *inputs()))
    for name, module in unet.named_modules():
        if name in ENDS or isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output.dtype}))
    with BF16():
        assert answer(unet, *inputs()).dtype == torch.float32
    assert {seen.pop(name) for name in ENDS} == {torch.float32} and set(seen.values()) == {torch.bfloat16}


def test_the_base_of_a_lora_stays_a_half_teacher_outside_of_autocast():
    unet = text_unet().to(torch.bfloat16)
    lora.add_lora(unet, 2, 2, 0.0, ("to_q", "conv_out"))
    performance.float32_ends(unet)
    dtypes = {name: getattr(unet, name).weight.dtype for name in ENDS}
    assert set(dtypes.values()) == {torch.float32} and unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    with torch.no_grad(), lora.adapters_off(unet):
        assert answer(unet, *inputs(torch.bfloat16)).dtype == torch.bfloat16
    with BF16():
        answer(unet, *inputs()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.lora_parameters(unet))


def test_a_network_without_text_has_them_and_one_without_an_end_is_left_alone():
    unet = UNet2DModel(block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"],
                       norm_num_groups=4, layers_per_block=1, sample_size=8).to(torch.bfloat16)  # fmt: skip
    performance.float32_ends(unet)
    assert {getattr(unet, name).weight.dtype for name in ENDS} == {torch.float32}
    encoder = text_unet().to(torch.bfloat16)
    encoder.conv_out = torch.nn.Identity()  # as of the discriminator
    performance.float32_ends(encoder)
    assert encoder.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True, False]),  # a teacher in half precision stays what it is
        ({"float32_end_layers": False}, [False] * 3),
        ({"mixed_precision": "no"}, [False] * 3),
    ],
)
def test_the_flag_is_for_student_and_target_under_autocast(changes, expected):
    flags = {"mixed_precision": "bf16", "float32_end_layers": True, "gradient_checkpointing": "none"}
    flags |= dict.fromkeys(("compile", "channels_last", "enable_xformers_memory_efficient_attention"), False)
    student, target, teacher = text_unet(), text_unet(), text_unet().to(torch.bfloat16)
    args = types.SimpleNamespace(**flags | changes)
    engine.apply_performance_flags(args, trained=[student], frozen=[target, teacher])
    assert [hasattr(unet.conv_in, "answers_in") for unet in (student, target, teacher)] == expected

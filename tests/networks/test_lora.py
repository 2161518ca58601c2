import copy
import json

from common.errors import UserError
from common.networks import lora
from common.tools.demo import digits

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SMALL = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8, "cross_attention_dim": 32,
    "layers_per_block": 1, "block_out_channels": (16, 32, 32), "attention_head_dim": 4,
}  # fmt: skip
SD = SMALL | {
    "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
XL = {
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}  # fmt: skip
SDXL = SMALL | XL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 4, 4),
}  # fmt: skip
# The SDXL refiner's blocks: an upsampler without attention before it, which has another number in sgm names.
REFINER = SMALL | XL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
FULL_SD = {"cross_attention_dim": 768, "attention_head_dim": 8}  # the defaults of the class are SD1.5's
FULL_SDXL = XL | {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "addition_time_embed_dim": 256,
    "down_block_types": SDXL["down_block_types"], "up_block_types": SDXL["up_block_types"],
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
CONFIGS = {"sd": SD, "sdxl": SDXL, "refiner": REFINER}


def make_unet(config):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**config).eval()


def full_unet(config):
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**config)


def make_student(unet, rank=4, alpha=4, target_modules=lora.TARGET_MODULES, **options):
    """A copy of the U-Net with adapters that all change its output."""
    student = copy.deepcopy(unet)
    lora.add_lora(student, rank, alpha, 0.0, target_modules, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.lora_parameters(student):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def run(unet):
    dtype = next(unet.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    noisy_latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    prompt_embeds = torch.randn(2, 7, 32, generator=generator).to(dtype)
    added = {"text_embeds": torch.randn(2, 16, generator=generator).to(dtype), "time_ids": torch.full((2, 6), 8.0)}
    return unet(noisy_latents, torch.tensor([7, 400]), prompt_embeds, added_cond_kwargs=added).sample


def make_pipeline(unet):
    """A stock pipeline of random parts around (a copy of) the U-Net."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = digits.build_tokenizer()
    text_config = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=16, **sizes)
    parts = {
        "vae": diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "scheduler": diffusers.DDIMScheduler(),
    }
    parts |= {"unet": copy.deepcopy(unet), "text_encoder": CLIPTextModel(text_config), "tokenizer": tokenizer}
    if unet.config.addition_embed_type == "text_time":
        second = CLIPTextModelWithProjection(text_config)
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def adapted(unet):
    return {path for path, module in unet.named_modules() if isinstance(module, LoraLayer)}


def largest_difference(a, b):
    return (a - b).abs().max().item()


def assert_same(one, other):
    """Outputs of two networks with the same weights in different memory, whose kernels may add in another order: some
    roundings of the dtype, 6.6e-7 in float32 on an Intel Xeon."""
    assert largest_difference(one, other) <= 40 * torch.finfo(one.dtype).eps * other.abs().max()


# Which modules


def test_lcm_lora_on_sd15_is_67_million_parameters():
    unet = full_unet(FULL_SD)
    paths = lora.target_paths(unet, lora.TARGET_MODULES)
    lora.add_lora(unet, 64, 64)
    assert set(paths) == adapted(unet) and len(paths) == 278
    assert sum(parameter.numel() for parameter in lora.lora_parameters(unet)) == 67_252_224


def test_target_modules_of_the_flag():
    assert lora.parse_target_modules(None) == lora.TARGET_MODULES
    assert lora.parse_target_modules(" to_q, to_k,,to_q ") == ("to_q", "to_k")
    with pytest.raises(UserError, match="names no module"):
        lora.parse_target_modules(" , ")


@pytest.mark.parametrize("name", ["to_x", "attn1", "norm1", "q", "0"])
def test_names_that_are_no_linear_or_convolution_are_refused(name):
    with pytest.raises(UserError, match=f"`lora_target_modules`: '{name}'"):
        lora.target_paths(make_unet(SD), ("to_q", name))


@pytest.mark.parametrize("names", [ATTENTION, lora.TARGET_MODULES, ("conv_in", "linear_1", "upsamplers.0.conv")])
def test_checked_modules_are_those_that_get_adapters(names):
    unet = make_unet(SD)
    paths = lora.target_paths(unet, names)
    lora.add_lora(unet, 2, 2, 0.0, names)
    assert set(paths) == adapted(unet) and len(paths) == len(set(paths)) > 2


# Attach, train, switch off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_float32_and_all_that_trains_over_a_base_of_any_dtype(dtype):
    unet = make_unet(SD).to(dtype)
    expected = run(unet)
    lora.add_lora(unet, 4, 8)
    adapters = set(lora.lora_parameters(unet))
    assert len(adapters) == 2 * len(adapted(unet))
    for parameter in unet.parameters():
        assert parameter.dtype == (torch.float32 if parameter in adapters else dtype)
        assert parameter.requires_grad == (parameter in adapters)
    assert torch.equal(run(unet), expected), "B = 0: the student starts as the teacher"
    assert unet.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_off_is_the_base_and_every_adapter_trains_afterwards(dtype):
    base = make_unet(SD).to(dtype)
    student = make_student(base)
    with torch.no_grad():
        with lora.adapters_off(student):
            teacher_output = run(student)
        assert_same(teacher_output, run(base))
        assert largest_difference(run(student), teacher_output) > 0.01
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = run(student)
    (output - teacher_output).float().square().mean().backward()
    for name, parameter in lora.adapter_tensors(student).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_adapters_come_back_with_the_requires_grad_they_had():
    student = make_student(make_unet(SD))
    lora.lora_parameters(student)[3].requires_grad_(False)
    expected = [parameter.requires_grad for parameter in student.parameters()]
    output = run(student)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), lora.adapters_off(student):
        assert [parameter.requires_grad for parameter in student.parameters()] == expected
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in student.parameters()] == expected
    assert torch.equal(run(student), output)


def test_adapters_off_with_gradients_is_a_mistake():
    student = make_student(make_unet(SD))
    output = run(student)
    with pytest.raises(AssertionError, match="no_grad"), lora.adapters_off(student):
        pass
    assert torch.equal(run(student), output)


def test_a_second_adapter_computes_inside_alone_and_is_in_no_file(tmp_path):
    unet = make_unet(SD)
    student = make_student(unet)
    alone, files = run(student), [lora.save_lora(tmp_path / x, student)[0] for x in "a"]
    lora.add_second(student, 2, "fake")
    second = lora.adapter_tensors(student, "fake")
    assert {name.rpartition(".lora")[0] for name in second} == set(lora.lora_layers(student))
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in second.values())
    assert all(p.requires_grad for p in lora.lora_parameters(student))
    assert torch.equal(run(student), alone)
    with lora.adapter_on(student, "fake"), torch.no_grad():
        assert torch.equal(run(student), run(unet))  # it begins as nothing
        for parameter in second.values():
            torch.nn.init.normal_(parameter, std=0.2)
        assert (run(student) - run(unet)).abs().max() > 1e-3
    for parameter in second.values():
        parameter.requires_grad_(True)
    with pytest.raises(RuntimeError, match="from inside"), lora.adapter_on(student, "fake"):
        run(student).square().mean().backward()
        raise RuntimeError("from inside")
    assert all(p.grad is None for p in lora.lora_parameters(student)) and any(
        p.grad.abs().sum() for p in second.values()
    )
    assert torch.equal(run(student), alone)
    with torch.no_grad(), lora.adapters_off(student):
        assert torch.equal(run(student), run(unet))
    files += [lora.save_lora(tmp_path / "b", student)[0]]
    before, after = map(load_file, files)  # the header's own order is any
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert files[0].stat().st_size == files[1].stat().st_size


def test_adapters_off_under_compile_and_in_a_copy():
    student = make_student(make_unet(SD))
    twin = torch.compile(copy.deepcopy(student), backend="eager")
    with torch.no_grad(), lora.adapters_off(twin):
        assert not any(layer.disable_adapters for layer in lora.lora_layers(student).values())
        assert all(layer.disable_adapters for layer in lora.lora_layers(twin).values())
    assert not any(layer.disable_adapters for layer in lora.lora_layers(twin).values())
    assert lora.adapter_tensors(twin).keys() == lora.adapter_tensors(student).keys()


# Files for other programs


@pytest.mark.parametrize(
    ("name", "alpha", "target_modules"),
    [(name, 10.5, lora.TARGET_MODULES) for name in CONFIGS] + [("sdxl", 4, ATTENTION)],
)
def test_a_stock_pipeline_with_either_file_is_the_student(tmp_path, name, alpha, target_modules):
    """Up to rounding, which float64 tells from an error: 1e-6 of float32 is 1e-15."""
    base = make_unet(CONFIGS[name])
    student = make_student(base, 4, alpha, target_modules)
    expected, base_output = run(student), run(base)
    assert largest_difference(expected, base_output) > 0.01
    files = lora.save_lora(tmp_path, student)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([lora.WEIGHTS, lora.KOHYA_WEIGHTS])
    expected_double = run(copy.deepcopy(student).double())
    for options in ({}, {"weight_name": files[1].name}):
        pipe = make_pipeline(base)
        pipe.load_lora_weights(str(tmp_path), **options)
        assert adapted(pipe.unet) == adapted(student)
        assert_same(run(pipe.unet), expected)
        pipe.disable_lora()
        assert_same(run(pipe.unet), base_output)
        pipe.enable_lora()
        pipe.fuse_lora()
        fused = run(pipe.unet)
        assert largest_difference(fused, expected) <= 3e-6
        pipe.unload_lora_weights()
        assert not adapted(pipe.unet) and torch.equal(run(pipe.unet), fused)

        pipe = make_pipeline(base)
        pipe.load_lora_weights(str(tmp_path), **options)
        pipe.unet.double()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert largest_difference(run(pipe.unet), expected_double) <= 1e-12


def test_both_files_carry_alpha_and_rank(tmp_path):
    student = make_student(make_unet(SD), rank=4, alpha=10.5)
    files = lora.save_lora(tmp_path, student)
    with safe_open(files[0], "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 10.5)
    saved = load_file(files[1])
    alphas = {name: tensor for name, tensor in saved.items() if name.endswith(".alpha")}
    assert len(alphas) == len(adapted(student)) and {alpha.item() for alpha in alphas.values()} == {10.5}
    with safe_open(files[1], "pt") as opened:
        header = opened.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "10.5")


def test_kohya_names_of_sdxl_are_the_original_checkpoints():
    """diffusers' reader of original checkpoints turns each name, with dots, back into the module it came from."""
    unet = full_unet(FULL_SDXL)
    others = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
              "add_embedding.linear_2")  # fmt: skip
    paths = lora.target_paths(unet, lora.TARGET_MODULES)
    assert len(paths) == 788
    keys = lora.kohya_keys(unet.config, [*paths, *others])
    assert len(set(keys.values())) == len(paths) + len(others)
    original = {}
    for path in [*paths, *others]:
        name = lora._sgm_path(path, 2)
        assert keys[path] == "lora_unet_" + name.replace(".", "_")
        original |= {f"model.diffusion_model.{name}.{end}": f"{path}.{end}" for end in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert converted == {name: name for name in original.values()}


@pytest.mark.parametrize("other", [{}, {"layers_per_block": 3}, {"layers_per_block": (1, 1, 1)}])
def test_networks_laid_out_unlike_sdxl_keep_the_diffusers_names(other):
    path = "up_blocks.0.upsamplers.0.conv"
    assert lora.kohya_keys(SDXL, [path]) == {path: "lora_unet_output_blocks_1_2_conv"}
    config = SDXL | other if other else REFINER
    assert lora.kohya_keys(config, [path]) == {path: "lora_unet_up_blocks_0_upsamplers_0_conv"}


@pytest.mark.parametrize("config", [FULL_SD, FULL_SDXL], ids=["sd15", "sdxl"])
def test_diffusers_finds_every_module_of_the_full_networks_in_a_kohya_file(config):
    unet = full_unet(config)
    paths = lora.target_paths(unet, lora.TARGET_MODULES)
    tensors = {}
    for key in lora.kohya_keys(unet.config, paths).values():
        tensors |= {f"{key}.{end}": torch.ones(()) for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    read, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)
    names = convert_unet_state_dict_to_peft(read)
    assert names.keys() == {f"unet.{path}.{end}.weight" for path in paths for end in ("lora_A", "lora_B")}
    assert len(alphas) == len(paths)


def test_a_save_that_dies_leaves_the_earlier_file(tmp_path, monkeypatch):
    student = make_student(make_unet(SD))
    files = lora.save_lora(tmp_path, student)
    earlier = files[1].read_bytes()

    def die(tensors, path, **_):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(lora, "save_file", die)
    with pytest.raises(OSError, match="disk full"):
        lora.save_lora(tmp_path, student)
    assert files[1].read_bytes() == earlier and sorted(tmp_path.iterdir()) == sorted(files)


# Starting from an earlier LoRA


@pytest.mark.parametrize("name", CONFIGS)
def test_an_earlier_run_in_either_format_is_the_start(tmp_path, name):
    base, alpha = make_unet(CONFIGS[name]), 0.3
    student = make_student(base, 4, alpha)
    files = lora.save_lora(tmp_path, student)
    for source in (tmp_path, *files):
        unet = copy.deepcopy(base)
        lora.add_lora(unet, 4, alpha, init_lora=str(source))
        with torch.no_grad():
            assert_same(run(unet), run(student))
        assert all(p.requires_grad and p.dtype == torch.float32 for p in lora.lora_parameters(unet))


def test_diffusers_names_of_sdxl_are_read_too(tmp_path):
    """Other trainers write kohya files with the diffusers paths for SDXL."""
    base = make_unet(SDXL)
    student = make_student(base, 4, 2)
    tensors = {}
    for name, tensor in lora.adapter_tensors(student).items():
        path, end = name.split(".lora_")
        stem = "lora_unet_" + path.replace(".", "_")
        tensors[f"{stem}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = tensor.detach()
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "other.safetensors")
    lora.add_lora(base, 4, 2, init_lora=str(tmp_path / "other.safetensors"))
    assert_same(run(base), run(student))


@pytest.mark.parametrize(
    ("rank", "alpha", "target_modules", "message"),
    [
        (8, 2, lora.TARGET_MODULES, "rank is 4, not 8"),
        (4, 4, lora.TARGET_MODULES, "alpha is 2.*, not 4"),
        (4, 2, ATTENTION, "adapts other modules"),
        (4, 2, (*lora.TARGET_MODULES, "conv_in"), "adapts other modules"),
    ],
)
@pytest.mark.parametrize("file", [lora.WEIGHTS, lora.KOHYA_WEIGHTS])
def test_a_start_that_does_not_fit_is_refused(tmp_path, file, rank, alpha, target_modules, message):
    lora.save_lora(tmp_path, make_student(make_unet(SD), 4, 2))
    with pytest.raises(UserError, match=f"`init_lora`=.*{message}"):
        lora.check_lora(SD, rank, alpha, target_modules, str(tmp_path / file))


def test_a_start_that_is_no_lora_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a LoRA file nor a folder"):
        lora.add_lora(make_unet(SD), 4, 4, init_lora=str(tmp_path))
    (tmp_path / lora.WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        lora.add_lora(make_unet(SD), 4, 4, init_lora=str(tmp_path))
    wider = make_student(make_unet(SD | {"cross_attention_dim": 40}))
    lora.save_lora(tmp_path, wider)
    with pytest.raises(UserError, match="another network"):
        lora.add_lora(make_unet(SD), 4, 4, init_lora=str(tmp_path))
    lora.check_lora(SD | {"cross_attention_dim": 40}, 4, 4, lora.TARGET_MODULES, str(tmp_path))


# Checkpoints


def prepared(seed):
    """Accelerator, a student over a bfloat16 base, another prepared model before it, and their optimizer."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    unet = make_student(make_unet(SD).to(torch.bfloat16))
    with torch.no_grad():
        for parameter in lora.lora_parameters(unet):
            parameter.add_(torch.randn_like(parameter))
    lora.register_adapter_checkpointing(accelerator, unet)
    other = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([*lora.lora_parameters(unet), *other.parameters()], lr=0.1)
    return accelerator, *accelerator.prepare(other, unet, optimizer)


def update(unet, other, optimizer):
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(unet).float().square().mean() + other(torch.ones(3)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state(unet, other):
    tensors = lora.adapter_tensors(unet) | dict(other.named_parameters())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_checkpoints_hold_the_adapters_alone_and_resume_exactly(tmp_path):
    accelerator, other, unet, optimizer = prepared(seed=1)
    update(unet, other, optimizer)
    at_save = state(unet, other)
    accelerator.save_state(str(tmp_path))
    update(unet, other, optimizer)
    expected = state(unet, other)

    saved = load_file(tmp_path / lora.CHECKPOINT)
    assert saved.keys() == lora.adapter_tensors(unet).keys()
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {lora.CHECKPOINT, "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}, "the other model, and no base"

    accelerator, other, unet, optimizer = prepared(seed=2)
    accelerator.load_state(str(tmp_path))
    resumed = state(unet, other)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in at_save.items())
    update(unet, other, optimizer)
    resumed = state(unet, other)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_of_other_adapters_is_not_loaded(tmp_path):
    accelerator, _, unet, _ = prepared(seed=1)
    accelerator.save_state(str(tmp_path))
    tensors = load_file(tmp_path / lora.CHECKPOINT)
    tensors.popitem()
    save_file(tensors, tmp_path / lora.CHECKPOINT)
    with pytest.raises(AssertionError, match="other adapters"):
        accelerator.load_state(str(tmp_path))

"""What two processes hold, exchange and write of split weights: the body of a test in tests/run/test_sharding.py."""

import copy
import os
from pathlib import Path

from common import ema
from common.ct import unet
from common.direct import pipelines, student
from common.direct.validation import exchanged
from common.networks import lora, outlines, performance, sharded, teachers
from common.run import meter, sharding, updates
from common.tscd.discriminator import Discriminator
from tests import tiny_pipelines

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file

RANK = int(os.environ.get("RANK", "0"))
SIZE = {"sample_size": 8, "block_out_channels": (4, 10), "norm_num_groups": 2, "layers_per_block": 1}
SIZE |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}

CONDITIONAL = {"sample_size": 8, "block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
CONDITIONAL |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8}
CONDITIONAL |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2}


def network(seed):
    torch.manual_seed(seed)
    return UNet2DModel(**SIZE)


def output(net):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return net(images[2 * RANK : 2 * RANK + 2] if torch.distributed.is_initialized() else images, 3).sample


def gathered(net):
    return {name: sharded.whole(tensor) for name, tensor in net.state_dict().items()}


def differ(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def check_lora():
    """A frozen base in bfloat16 and float32 adapters, both split: what it computes, its gradients and its files."""
    torch.manual_seed(2)
    whole = UNet2DConditionModel(**CONDITIONAL).to(torch.bfloat16)
    lora.add_lora(whole, 4, 8.0)
    with torch.no_grad():
        for parameter in lora.lora_parameters(whole):
            parameter.normal_(std=0.1)
    split = copy.deepcopy(whole)
    split._lora_layers = list(lora.lora_layers(split).values())
    with torch.no_grad():  # what each process draws is the first one's afterwards
        lora.lora_parameters(split)[0].add_(RANK)
    AcceleratorState._reset_state()
    accelerator = sharding.ShardingAccelerator({"reshard_after_forward": False}, cpu=True, mixed_precision="bf16")
    sharding.shard(accelerator, [], plain=[split])
    plain = sharded.plain_forward(split)
    prepared, _ = accelerator.prepare(split, torch.optim.AdamW(lora.lora_parameters(split)))
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    inputs = images, 5, torch.ones(2, 3, 8)
    with torch.no_grad(), lora.adapters_off(whole), lora.adapters_off(split):
        inputs_of_base = [x.bfloat16() if torch.is_tensor(x) else x for x in inputs]
        assert (plain(*inputs_of_base).sample - whole(*inputs_of_base).sample).abs().max() < 1e-6
    with accelerator.autocast():
        expected = whole(*inputs).sample.float()
    output = prepared(*inputs).sample
    assert (output - expected).abs().max() < 1e-6 and output.dtype == torch.float32
    expected.square().mean().backward()
    accelerator.backward(output.square().mean())
    tensors, gradients = lora.adapter_tensors(whole), lora.adapter_tensors(split)
    for name, tensor in tensors.items():
        gradient = sharded.whole(gradients[name].grad)
        # gradients are added in bfloat16, 2^-8 apart, in another order on each processor: 0.03 was the most; a sum for
        # a mean, or a part that lacks, is 0.5 or more
        assert (gradient - tensor.grad).norm() <= 1e-1 * tensor.grad.norm(), name
    assert all(p.grad is None for name, p in split.named_parameters() if ".lora_" not in name)
    assert differ(lora.saved_tensors(split), lora.saved_tensors(whole)) == 0
    assert differ(pipelines.merged_weights(split).state_dict(), pipelines.merged_weights(whole).state_dict()) == 0


def gradients(net):
    return {name: sharded.whole(p.grad) for name, p in net.named_parameters()}


def check_fp16(folder):
    """Gradients that a GradScaler unscales are float32's up to fp16's rounding; where one process's are not finite,
    nobody updates and all lower their scale."""
    whole, split = network(1), network(1)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole(images, 3).sample.square().mean().backward()
    AcceleratorState._reset_state()
    accelerator = sharding.ShardingAccelerator({"reshard_after_forward": True}, cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True  # which accelerate makes on GPUs alone
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sharding.shard(accelerator, [split])
    weights = list(split.parameters())
    prepared, optimizer = accelerator.prepare(split, torch.optim.AdamW(weights, lr=0.01, fused=True))
    accelerator.backward(output(prepared).square().mean())
    norm = accelerator.clip_grad_norm_(weights, 1e9)
    expected, found = (torch.cat([g.flatten() for g in gradients(net).values()]) for net in (whole, split))
    assert 1e-6 < (found - expected).norm() / expected.norm() < 1e-2  # half precision's 2^-11, through a few layers
    assert norm.item() == pytest.approx(found.norm().item(), rel=1e-4)
    before = gathered(split)
    optimizer.step()
    optimizer.zero_grad()
    assert differ(gathered(split), before) == pytest.approx(0.01, rel=0.1) and accelerator.scaler.get_scale() == 1024
    before, guard = gathered(split), updates.UpdateGuard(accelerator, folder, limit=9)
    accelerator.backward(output(prepared).square().mean() * (float("inf") if RANK == 1 else 1.0))
    assert not guard.step(optimizer, weights, 1.0, torch.tensor(1.0), ["a"])
    assert differ(gathered(split), before) == 0 and accelerator.scaler.get_scale() == 512


def check_compiled():
    """Compiled blocks give what they give uncompiled; what gathers their weights is no part of a graph."""
    graphs, made = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for compiles in (False, True):
        AcceleratorState._reset_state()
        accelerator = sharding.ShardingAccelerator({"reshard_after_forward": True}, cpu=True)
        net = network(1)
        sharding.shard(accelerator, [net])
        if compiles:
            performance.COMPILE_OPTIONS = performance.COMPILE_OPTIONS | {"backend": backend}
            performance.compile_blocks(net)
        prepared, _ = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
        for _ in range(2):
            accelerator.backward(output(prepared).square().mean())
        made.append(gradients(net))
    assert len(graphs) > 3 and differ(made[0], made[1]) < 1e-6 < made[0]["conv_in.weight"].abs().max()


LOADED = {"Qwen-Image": torch.bfloat16, "Wan": torch.bfloat16, "SD3": torch.float32, "SD1.5": torch.float32}


def save_networks(folder):
    """Denoisers in files of another dtype than they are loaded in, of Qwen-Image in several; Wan's class keeps some
    layers in float32, SD3's has a table in its files."""
    for name, dtype in LOADED.items():
        (network,) = pipelines.denoisers(tiny_pipelines.make(name)).values()
        network.to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
        network.save_pretrained(folder / name, max_shard_size=20_000 if name == "Qwen-Image" else "1GB")


class Counted:
    """safetensors' file that counts the values that are read."""

    def __init__(self, path, framework):
        self.file = safe_open(path, framework)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        pass

    def get_slice(self, name):
        values = self.file.get_slice(name)

        class Slice:
            def __getitem__(self, rows):
                read = values[rows]
                Counted.read += read.numel()
                return read

        return Slice()


class Memory(meter.Meter):
    """Of what a process holds: a split tensor says the size of the whole."""

    def add(self, tensor):
        return None if sharded.is_split(tensor) else super().add(tensor)


def check_loading(folder):
    """Outlines that were split hold what was loaded whole, with adapters on them or not; each process has read and
    made a half of it."""
    outlines.safe_open, meter.BLOCK = Counted, 1
    for name, dtype in LOADED.items():
        (like,) = pipelines.denoisers(tiny_pipelines.make(name)).values()
        whole = type(like).from_pretrained(folder / name, dtype=dtype)
        outline = outlines.outline("x", folder / name, type(like), dtype)
        bytes_of_all = sum(p.nbytes for p in outline.parameters())
        for network in (whole, outline) if name == "Wan" else ():
            torch.manual_seed(0)
            lora.add_lora(network, 2, 1.0, 0.0, lora.target_paths(network))
        AcceleratorState._reset_state()
        accelerator = sharding.ShardingAccelerator({"reshard_after_forward": True}, cpu=True)
        Counted.read = 0
        with Memory() as counted:
            sharding.shard(accelerator, [], plain=[outline])
        if name != "Wan":  # whose adapters are as large as the tiny layers
            read = max(p.numel() for p in whole.parameters()) * (4 if dtype == torch.bfloat16 else 2)
            assert 0.5 * bytes_of_all <= counted.live < 0.55 * bytes_of_all, (name, counted.live, bytes_of_all)
            assert counted.most <= counted.live + 2 * read, (name, counted.most, counted.live, read)  # a tensor
        values = sum(p.numel() for path, p in whole.named_parameters() if ".lora_" not in path)
        assert 0.4 * values < Counted.read < 0.6 * values, name
        made = outline.state_dict()
        assert not outlines.is_one(outline) and sharded.is_sharded(outline)
        for path, tensor in whole.state_dict().items():
            assert made[path].dtype == tensor.dtype and torch.equal(sharded.whole(made[path]), tensor), (name, path)
        for (path, table), (_, other) in zip(whole.named_buffers(), outline.named_buffers(), strict=True):
            assert table.dtype == other.dtype and torch.equal(table, other), (name, path)
        public = [{key: n.config[key] for key in n.config if key[0] != "_"} for n in (whole, outline)]
        assert public[0] == public[1] and not outline.training


def check_teacher(folder):
    """What the scripts make of a teacher with two LoRAs in it, and of networks to start from: each process holds its
    part of what whole weights give, and makes two tensors at most beside it; a discriminator's encoder is whole."""
    files = [folder / "style" / lora.WEIGHTS, folder / "other" / lora.KOHYA_WEIGHTS]
    options = {"lora": f"{files[0]}:0.5,{files[1]}", "vae": None, "text_encoder": None, "tokenizer": None}
    made, first = [], str(folder / f"start-{RANK}")
    for outlined in (False, True):
        AcceleratorState._reset_state()
        accelerator = sharding.ShardingAccelerator({"reshard_after_forward": True}, cpu=True)
        with Memory() as counted:
            teacher = teachers.load_teacher(str(folder / "teacher"), outlined=outlined, **options)
            student = teachers.make_student(teacher.unet, 32)
            target = copy.deepcopy(student).requires_grad_(False).to("cpu")
            encoder = Discriminator(teacher.unet, 8).encoder
            networks = {"student": student, "target": target, "teacher": teacher.unet.to("cpu", torch.bfloat16)}
            networks["started"] = teachers.make_student(teacher.unet, 32, first) if outlined else student
            networks["images"] = unet.make_unet(SIZE | {"dropout": 0.1}, str(folder / "one"), outlined)
            if outlined:
                sharding.shard(accelerator, list(networks.values()))
                assert all(map(sharded.is_sharded, networks.values())) and not sharded.is_sharded(encoder)
        if not outlined:
            student.save_pretrained(first)
        made.append(networks | {"encoder": encoder})
    held = sum(ema.part(p).nbytes for network in made[1].values() for p in network.parameters())
    held += sum(file.stat().st_size for file in files) + 2 * max(p.nbytes for p in student.parameters())
    assert counted.most < 1.02 * held, (counted.most, held)
    for name, network in made[0].items():
        other = made[1][name]
        assert gathered(other).keys() == network.state_dict().keys() and other.training == network.training, name
        for path, tensor in network.state_dict().items():
            found = sharded.whole(other.state_dict()[path])
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), (name, path)
        trained = [[p.requires_grad for p in net.parameters()] for net in (network, other)]
        assert trained[0] == trained[1], name
        public = [{key: net.config[key] for key in net.config if key[0] != "_"} for net in (network, other)]
        assert public[0] == public[1], name


def expected(folder):
    """One process: the network after two updates, the second one clipped, its average, and its optimizer's states."""
    net, average = network(1), network(1)
    # eps: the gradient of a bias of keys is nothing but rounding
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, eps=1e-3)
    norms = []
    for step in range(2):
        output(net).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9 if step == 0 else 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
        ema.ema_update(average.parameters(), net.parameters(), 0.0 if step == 0 else 0.75)
    torch.save([net.state_dict(), average.state_dict(), optimizer.state_dict(), norms], folder / "one.pt")
    net.save_pretrained(folder / "one", max_shard_size=20_000)


def body(folder):
    folder, state = Path(folder), PartialState(cpu=True)
    one, one_average, one_states, norms = torch.load(folder / "one.pt")
    accelerator = sharding.ShardingAccelerator({"reshard_after_forward": True}, cpu=True)
    net, average = network(1), network(1).requires_grad_(False)
    sharding.shard(accelerator, [net, average])
    weights = list(net.parameters())
    optimizer = torch.optim.AdamW(weights, lr=0.01, eps=1e-3, fused=True)
    prepared, prepared_optimizer = accelerator.prepare(net, optimizer)

    # Both hold halves, and go by their own class's name.
    held = sum(ema.part(p).numel() for p in weights)
    assert 0.4 < held / sum(p.numel() for p in weights) < 0.6 and all(map(sharded.is_split, weights))
    assert type(net).__name__ == "UNet2DModel" and type(net).__module__ == UNet2DModel.__module__

    # A gradient of one process that is not finite: nobody updates.
    guard = updates.UpdateGuard(accelerator, folder, limit=9)
    before = gathered(net)
    accelerator.backward(output(prepared).square().mean() * (float("nan") if RANK == 1 else 1.0))
    finite = guard.step(prepared_optimizer, net.parameters(), 1.0, torch.tensor(1.0), ["a"])
    assert not finite and differ(gathered(net), before) == 0
    optimizer.zero_grad()

    # Updates, norm, clipping and average are those of one process.
    for step in range(2):
        accelerator.backward(output(prepared).square().mean())
        norm = sharded.total_norm(net.parameters())
        assert norm.item() == pytest.approx(norms[step], rel=1e-5)
        finite = guard.step(prepared_optimizer, net.parameters(), 1e9 if step == 0 else 0.1, torch.tensor(1.0), ["a"])
        assert finite
        optimizer.zero_grad()
        ema.ema_update(average.parameters(), net.parameters(), 0.0 if step == 0 else 0.75, finite)
    assert differ(gathered(net), one) < 1e-5 and differ(gathered(average), one_average) < 1e-5
    assert guard.count() == 1

    # Inside, the forward is the average's; after it, the network's own again.
    with torch.no_grad():
        own, averaged = output(net), output(average)
        with exchanged(net.parameters(), average.parameters()):
            assert (output(net) - averaged).abs().max() < 1e-6 < (output(net) - own).abs().max()
        assert torch.equal(output(net), own)

    # Files are those of whole weights, and are read by halves.
    accelerator.save_state(folder / "two")
    accelerator.wait_for_everyone()
    written = load_file(folder / "two" / "model.safetensors")
    assert differ(written, gathered(net)) == 0
    states = torch.load(folder / "two" / "optimizer.bin", weights_only=True)
    assert states["param_groups"][0].keys() == one_states["param_groups"][0].keys()
    for index, state_of_one in one_states["state"].items():
        assert differ(states["state"][index], state_of_one) < 1e-5
    saved = gathered(net), states["state"]
    with torch.no_grad():
        for p in weights:
            p.mul_(2)
            for value in optimizer.state[p].values():
                value.mul_(2)
    accelerator.wait_for_everyone()
    accelerator.load_state(folder / "two")
    assert differ(gathered(net), saved[0]) == 0
    for index, p in enumerate(weights):
        assert differ({name: sharded.whole(v) for name, v in optimizer.state[p].items()}, saved[1][index]) == 0
    for key, kind in (("conv_in.bias", "another shape"), ("else.bias", "other tensors, like")):
        path = folder / f"bad-{RANK}.safetensors"
        sharded._is_main, is_main = lambda: True, sharded._is_main
        sharded.write_tensors(path, written | {key: torch.zeros(9)})
        sharded._is_main = is_main
        with pytest.raises(ValueError, match=kind):
            sharded.read_tensors(path, net.state_dict())

    # An export in several files is the one that diffusers writes.
    sharded.write_network(folder / "export", net, max_shard_size=20_000)
    accelerator.wait_for_everyone()
    assert len(list((folder / "export").glob("*.safetensors"))) > 1
    loaded = UNet2DModel.from_pretrained(folder / "export")
    assert differ(loaded.state_dict(), saved[0]) == 0
    if state.is_main_process:
        assert (folder / "export" / "config.json").read_text() == (folder / "one" / "config.json").read_text()
    other = network(2)
    sharding.shard(accelerator, [other])
    student.start_from(folder, {"export": other})
    assert differ(gathered(other), saved[0]) == 0
    check_lora()
    check_fp16(folder)
    check_compiled()
    check_loading(folder)
    check_teacher(folder)
    accelerator.end_training()

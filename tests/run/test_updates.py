"""Updates that are not finite: what is held, counted, reported, and when a run ends."""

import itertools
import json

from common.ct import consistency
from common.direct import pairs, student
from common.errors import UserError
from common.networks import encoders
from common.run import checkpointing, training_run, updates
from common.run.training_run import RunningMeans
from common.run.updates import UpdateGuard, broken_weights, step_beside, step_if
from tests.cases import SCRIPTS, digests, micro_batches, scalars, soak_but, train

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import AdamW8bit

NAN, INF = float("nan"), float("inf")
OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "8-bit AdamW": lambda p: AdamW8bit(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
}


def copied(optimizer, parameter):
    states = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[parameter].items()}
    return [parameter.detach().clone(), *[states[name] for name in sorted(states) if torch.is_tensor(states[name])]]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_skipped_step_changes_neither_weights_nor_states_and_the_next_one_counts(make):
    torch.manual_seed(0)
    one, two = (torch.nn.Parameter(torch.linspace(-1, 1, 4096)) for _ in range(2))
    skipping, plain = make([one]), make([two])
    for step in range(4):
        gradient = torch.randn(4096)
        two.grad = gradient.clone()
        plain.step()
        if step == 2:  # one update between them is poisoned
            one.grad, before = torch.full((4096,), NAN), copied(skipping, one)
            step_if(one.grad.norm().isfinite(), skipping)
            assert all(torch.equal(a, b) for a, b in zip(before, copied(skipping, one), strict=True))
        one.grad = gradient.clone()
        step_if(one.grad.norm().isfinite(), skipping)
    assert all(torch.equal(a, b) for a, b in zip(copied(plain, two), copied(skipping, one), strict=True))
    assert not hasattr(skipping, "found_inf")


def test_means_leave_out_what_is_not_finite():
    means = RunningMeans()
    for value in (1.0, NAN, 3.0, INF):
        means.add({"a": torch.tensor(value), "b": torch.tensor(NAN)})
    logs = means.take(Accelerator(cpu=True), 4)
    assert logs["a"] == 2.0 and logs["b"] != logs["b"] and logs["samples_per_second"] > 0


def guarded(tmp_path, limit=10, accumulation=1, scaler=None):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    if scaler is not None:  # as on a GPU with fp16
        accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = scaler, True, "fp16"
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = accelerator.prepare(torch.optim.SGD([parameter], lr=1.0))
    guard = UpdateGuard(accelerator, tmp_path, limit)

    def update(*factors, max_grad_norm=100.0, loss=1.0):
        for factor in factors:
            with accelerator.accumulate(torch.nn.Identity()):
                value = (parameter * torch.tensor([1.0, factor])).sum() * loss
                accelerator.backward(value)
                finite = guard.step(optimizer, [parameter], max_grad_norm, value, [f"key {factor}"])
                optimizer.zero_grad()
        return finite

    return guard, parameter, update


@pytest.mark.parametrize("max_grad_norm", [100.0, None])
def test_the_guard_counts_and_lists_the_samples(tmp_path, max_grad_norm):
    guard, parameter, update = guarded(tmp_path, accumulation=2)
    assert update(1.0, 3.0, max_grad_norm=max_grad_norm)
    assert torch.equal(parameter.data, torch.tensor([0.0, -1.0]))
    assert not update(1.0, NAN, max_grad_norm=max_grad_norm)
    assert torch.equal(parameter.data, torch.tensor([0.0, -1.0])) and guard.count() == 1
    assert guard.count() == 1 and guard.global_step == 2
    entry = json.loads((tmp_path / "nonfinite_updates.jsonl").read_text())
    assert entry == {"step": 2, "keys": ["key 1.0", "key nan"]}


def test_another_optimizer_may_speak_of_the_update_at_which_the_host_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "MAX_PENDING", 2)
    guard, _, update = guarded(tmp_path, accumulation=2)
    for i, finite in enumerate([True, False, True, False, True]):
        update(1.0, float(i))
        guard.count_as_skipped_unless(torch.tensor(finite))
        assert len(guard.pending) <= 2
    assert guard.count() == 2 and guard.global_step == 5
    entries = list(map(json.loads, (tmp_path / "nonfinite_updates.jsonl").read_text().splitlines()))
    assert entries == [{"step": 2, "keys": ["key 1.0"] * 2}, {"step": 4, "keys": ["key 1.0", "key 3.0"]}]


def test_gradients_are_clipped(tmp_path):
    _, parameter, update = guarded(tmp_path)
    update(1.0, max_grad_norm=0.5)
    torch.testing.assert_close((1 - parameter.data).norm(), torch.tensor(0.5), rtol=1e-4, atol=0)


def test_the_limit_is_of_updates_in_a_row(tmp_path, capsys):
    guard, _, update = guarded(tmp_path, limit=3)
    for factor in (NAN, NAN, 1.0, INF, INF):
        update(factor)
    assert guard.count() == 4
    assert capsys.readouterr().out.count("WARNING: step 1 changed nothing") == 1
    update(NAN)
    with pytest.raises(UserError, match="max_nonfinite_steps`=3: .* in 3 updates in a row.* step 6 .*samples key nan"):
        guard.count()


def test_a_gradscaler_finds_its_scale_without_being_counted_and_a_poisoned_loss_counts(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    guard, parameter, update = guarded(tmp_path, scaler=scaler)
    assert not update(16.0)  # the gradient overflows at this scale only
    assert guard.count() == 0 and scaler.get_scale() == 2.0**126 and torch.equal(parameter.data, torch.ones(2))
    for _ in range(4):
        update(16.0)
    assert guard.count() == 0 and not torch.equal(parameter.data, torch.ones(2))
    held = parameter.data.clone()
    assert not update(NAN)
    assert guard.count() == 1 and torch.equal(parameter.data, held)


def test_a_gradscaler_whose_scale_cannot_fall_further_counts(tmp_path):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * INF

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    guard, parameter, _ = guarded(tmp_path, scaler=scaler)
    optimizer = guard.accelerator._optimizers[0]
    for _ in range(5):  # scales 2, 1, 1/2, 1/4, 1/8
        loss = Bad.apply(parameter).sum()
        guard.accelerator.backward(loss)
        guard.step(optimizer, [parameter], 1.0, loss, ["key"])
        optimizer.zero_grad()
    assert guard.count() == 3 and torch.equal(parameter.data, torch.ones(2))


def test_running_means_leave_out_what_means_nothing():
    means, accelerator = RunningMeans(), Accelerator(cpu=True)
    yes, no = torch.tensor(True), torch.tensor(False)
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    means.add({"a": torch.tensor(3.0, requires_grad=True)})
    means.add({"c": torch.tensor(8.0), "d": torch.tensor(0.0)}, weight=no)
    means.add({"c": torch.tensor(2.0)}, weight=yes)
    means.add({"c": torch.tensor(4.0)}, weight=torch.tensor(3))  # a mean of three
    means = means.take(accelerator, 4)
    assert means.pop("samples_per_second") > 0 and means == {"a": 2.0, "b": 4.0, "c": 3.5}


def poison(monkeypatch, is_poisoned):
    """Latents become NaN, as those of a VAE that overflows in half precision, for images that `is_poisoned` says."""
    encode = encoders.encode_images

    def encode_images(vae, images, *args):
        latents = encode(vae, images, *args)
        return torch.full_like(latents, NAN) if is_poisoned(images) else latents

    monkeypatch.setattr(encoders, "encode_images", encode_images)


@pytest.mark.parametrize("name", ["lcm", "tscd", "ct", "direct"])
def test_a_poisoned_sample_costs_its_update_and_nothing_else(tmp_path, command, shards, monkeypatch, name):
    """NaN in the second update: latents; a loss of RAdam's, which has no fused step that could skip; a pair."""
    keys, options = [], {"checkpointing_steps": 1} | ({} if name in ("ct", "direct") else {"ema_decay": 0.5})
    if name == "ct":
        huber, calls = consistency.pseudo_huber, []
        once = lambda: calls.append(1) or (NAN if len(calls) == 2 else 1.0)  # noqa: E731
        monkeypatch.setattr(consistency, "pseudo_huber", lambda *args: huber(*args) * once())
    elif name == "direct":
        bad, latents = next(i for i in pairs.PairOrder(20, 4, seed=1)[1] if i >= 4), pairs.PairShards.latents
        factors = lambda indices: torch.tensor([NAN if i == bad else 1.0 for i in indices])  # noqa: E731
        of_bad = lambda data, i: latents(data, i) * factors(i).view(-1, 1, 1, 1)  # noqa: E731
        monkeypatch.setattr(pairs.PairShards, "latents", of_bad)
        keys = [str(bad)]
    else:
        _, bad = itertools.islice(micro_batches(shards), 2)
        poison(monkeypatch, lambda images: torch.equal(images, bad["images"]))
        keys = bad["keys"]
    train(command(name, tmp_path, **options), SCRIPTS[name])
    saved = [digests(tmp_path / f"checkpoint-{n}") for n in (1, 2, 3)]
    weights = [k for k in saved[0] if k.endswith(".safetensors")]
    assert len(weights) == (3 if name == "tscd" else 2)
    for key in [*weights, *(["optimizer"] if name != "tscd" else [])]:
        assert saved[0][key] == saved[1][key] != saved[2][key]
    assert scalars(tmp_path, "updates_skipped") == {1: 0, 2: 1, 3: 1, 4: 1}
    assert [n for n, loss in scalars(tmp_path, "loss").items() if loss != loss] == [2]
    assert checkpointing.read_state(tmp_path / "checkpoint-4")["updates_skipped"] == 1
    entry = json.loads((tmp_path / "nonfinite_updates.jsonl").read_text())
    assert entry["step"] == 2 and len(entry["keys"]) == 4 and set(keys) <= set(entry["keys"])


BROKEN = {  # one network of each script, and what its sentence calls it
    "lcm": "the target",
    "lcm_lora": "the teacher's text_encoder",
    "tscd": "the student",
    "tscd_lora": "the teacher's vae",
    "ct": "the student",
    "direct": "the teacher's unet",
}


@pytest.mark.parametrize("name", soak_but("lcm", "ct", "direct at its start", names=[*BROKEN, "direct at its start"]))
def test_weights_that_are_not_finite_are_named_and_no_sample_is(tmp_path, command, monkeypatch, capsys, name):
    name, at_start = name.split(" ")[0], " " in name
    broken, poisoned = BROKEN[name], []

    def poison(networks):
        key, tensor = next((k, v) for k, v in networks[broken].state_dict().items() if v.is_floating_point())
        tensor.fill_(INF)
        poisoned.append(f"{key}, {tensor.numel()} of {tensor.numel()} values (float32)")

    def guard_of_poisoned(*args, networks, **options):
        poison(networks)
        return UpdateGuard(*args, networks=networks, **options)

    def check_poisoned(networks):
        poison(networks)
        return broken_weights(networks)

    if at_start:
        monkeypatch.setattr(student, "broken_weights", check_poisoned)
    else:
        monkeypatch.setattr(training_run, "UpdateGuard", guard_of_poisoned)
    words = command(name, tmp_path / "out", max_train_steps=8 if name == "ct" else 4, report_to="none")
    with pytest.raises(SystemExit) as stopped:
        train([*words, "--logging_steps=1"], SCRIPTS[name])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{broken} holds NaN or infinity in {poisoned[0]}; take other weights" in err
    assert ("step 1 has" in err) != at_start and "samples" not in err and "Traceback" not in err
    assert not (tmp_path / "out" / "nonfinite_updates.jsonl").exists()


def test_another_networks_gradients_are_clipped_by_themselves():
    weights = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for limit, length in ((10.0, 5.0), (1.0, 1.0)):
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])  # the last one has none
        before = torch.cat([weight.detach().clone() for weight in weights])
        assert step_beside(optimizer, scaler, world_size=1, max_grad_norm=limit)
        moved = torch.cat([weight.detach() for weight in weights]) - before
        assert moved.norm().item() == pytest.approx(length, rel=1e-4) and moved[-1] == 0
        assert all(weight.grad is None for weight in weights)

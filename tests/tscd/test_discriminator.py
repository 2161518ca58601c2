import math

from common.run import updates
from common.schedules import alpha_sigma
from common.tscd import adversarial
from common.tscd.discriminator import Discriminator, copy_encoder, make_head
from common.tscd.segments import draw_segment, plan_stages, share_whole
from common.tscd.solver import TrajectorySolver
from tests.networks.test_lora import SD, SDXL, make_unet

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler


def inputs(xl=False, batch=3):
    g = torch.Generator().manual_seed(0)
    real, fake, noisy = torch.randn(3, batch, 4, 8, 8, generator=g)
    cond = {"encoder_hidden_states": torch.randn(batch, 7, 32, generator=g)}
    if xl:
        time_ids = torch.randint(64, (batch, 6), generator=g)
        cond["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 16, generator=g), "time_ids": time_ids}
    return real, fake, noisy, torch.tensor([5, 100, 700])[:batch], torch.tensor([200, 500, 999])[:batch], cond


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
def test_the_encoder_ends_with_the_middle_block(config):
    unet, seen = make_unet(config), []
    unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    real, _, _, t, _, cond = inputs(config is SDXL)
    unet(real, t, **cond)
    encoder = copy_encoder(unet)
    output = encoder(real, t, **cond).sample
    torch.testing.assert_close(output, seen[0])  # of weights in other memory: equal up to rounding
    names = set(dict(unet.named_parameters()))
    mine = set(dict(encoder.named_parameters()))
    assert mine < names and not any(n.startswith(("up_blocks", "conv_out", "conv_norm_out")) for n in mine)
    assert len(unet.up_blocks) == len(config["block_out_channels"])  # the U-Net itself is whole


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("conditional", [True, False])
def test_one_batch_gives_the_logits_of_separate_ones(config, conditional):
    discriminator = Discriminator(make_unet(config), 8)
    discriminator.reset(1)
    real, fake, noisy, adv_t, t, cond = inputs(config is SDXL)
    context = adv_t, cond, noisy, t, conditional
    with discriminator.trainable():
        both = discriminator([real, fake], *context)
    assert both.shape == (2, 3) and both.dtype == torch.float32
    for sample, logits in zip((real, fake), both, strict=True):
        torch.testing.assert_close(discriminator([sample], *context)[0], logits)
        for i in range(3):
            one = {"encoder_hidden_states": cond["encoder_hidden_states"][i : i + 1]}
            if "added_cond_kwargs" in cond:
                one["added_cond_kwargs"] = {k: v[i : i + 1] for k, v in cond["added_cond_kwargs"].items()}
            place = adv_t[i : i + 1], one, noisy[i : i + 1], t[i : i + 1], conditional
            torch.testing.assert_close(discriminator([sample[i : i + 1]], *place)[0], logits[i : i + 1])


def test_only_a_conditional_one_sees_where_the_student_started():
    discriminator = Discriminator(make_unet(SD), 8)
    real, _, noisy, adv_t, t, cond = inputs()
    with torch.no_grad():
        for conditional in (True, False):
            a = discriminator([real], adv_t, cond, noisy, t, conditional)
            b = discriminator([real], adv_t, cond, noisy + 1, t, conditional)
            assert torch.equal(a, b) != conditional


@pytest.mark.parametrize("frozen_dtype", [None, torch.bfloat16])
def test_no_gradient_crosses_between_the_two_phases(frozen_dtype):
    discriminator = Discriminator(make_unet(SD), 8, frozen_dtype)
    discriminator.reset(1)
    before = {name: p.clone() for name, p in discriminator.named_parameters()}
    optimizer, scaler = discriminator.make_optimizer(1e-3, 1e-2, use_scaler=False)
    real, fake, noisy, adv_t, t, cond = inputs()
    fake.requires_grad_()
    context = adv_t, cond, noisy, t, True
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=frozen_dtype is not None)

    with autocast:
        (logits,) = discriminator([fake], *context)
    adversarial.generator_loss(logits).sum().backward()
    assert fake.grad.norm() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    fake.grad = None

    with discriminator.trainable():
        with autocast:
            real_logits, fake_logits = discriminator([real, fake.detach()], *context)
        adversarial.discriminator_loss(real_logits, fake_logits).sum().backward()
    assert fake.grad is None and not any(p.requires_grad for p in discriminator.parameters())
    trained = {name for name, p in discriminator.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    encoder = {name for name in trained if name.startswith("encoder")}
    assert bool(encoder) == (frozen_dtype is None) and {n for n in before if n.startswith("head")} <= trained
    updates.step_beside(optimizer, scaler, world_size=1)
    assert all(p.grad is None for p in discriminator.parameters())
    moved = {name for name, p in discriminator.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


def test_the_learning_rates_are_of_encoder_and_head():
    discriminator = Discriminator(make_unet(SD), 8)
    optimizer, _ = discriminator.make_optimizer(1e-6, 1e-5, use_scaler=False)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-6, 1e-5]
    assert sizes == [sum(p.numel() for p in part.parameters()) for part in (discriminator.encoder, discriminator.head)]
    assert optimizer.defaults["betas"] == (0.0, 0.99)


def test_reset_starts_anew_whatever_happened_before_and_leaves_the_random_state():
    discriminator = Discriminator(make_unet(SD), 8)
    other = Discriminator(make_unet(SD), 8)
    with torch.no_grad():
        other.encoder.conv_in.weight.add_(1.0)
    discriminator.load_state_dict(other.state_dict())  # as a resumed run does before its first reset
    discriminator.reset(5)
    first = {name: p.clone() for name, p in discriminator.state_dict().items()}
    with torch.no_grad():
        for p in discriminator.parameters():
            p.add_(1.0)
    state = torch.get_rng_state()
    discriminator.reset(5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, first[name]) for name, p in discriminator.state_dict().items())
    assert all(torch.equal(p, first["encoder." + n]) for n, p in copy_encoder(make_unet(SD)).state_dict().items())
    discriminator.reset(6)
    assert not torch.equal(discriminator.head[0].weight, first["head.0.weight"])
    assert torch.equal(discriminator.encoder.conv_in.weight, first["encoder.conv_in.weight"])


@pytest.mark.parametrize(("size", "kernels"), [(8, [4, 4]), (16, [4, 4]), (4, [4, 3]), (3, [3, 3]), (1, [3, 3])])
def test_the_head_fits_features_of_any_size(size, kernels):
    head = make_head(48, size, 0)
    convolutions = [layer for layer in head if isinstance(layer, torch.nn.Conv2d)]
    norms = [layer for layer in head if isinstance(layer, torch.nn.GroupNorm)]
    assert [layer.kernel_size[0] for layer in convolutions] == kernels
    assert [layer.stride[0] for layer in convolutions] == [2 if k == 4 else 1 for k in kernels]
    assert [layer.num_groups for layer in norms] == [2, 2] and make_head(1280, 8, 0)[1].num_groups == 32
    assert head(torch.randn(2, 96, size, size)).shape == (2, 1)


def learn(discriminator, real, fake, num_updates, learning_rate=1e-3):
    """The discriminator's losses on batches of real() and fake(), renoised as in a stage of one segment."""
    alpha, _ = alpha_sigma(DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    optimizer, scaler = discriminator.make_optimizer(learning_rate, learning_rate, use_scaler=False)
    generator, found = torch.Generator().manual_seed(0), []
    zeros, cond = torch.zeros(32, dtype=torch.long), {"encoder_hidden_states": torch.zeros(32, 7, 32)}
    for _ in range(num_updates):
        samples = real(generator), fake(generator)
        t, q, noise = adversarial.draw_renoising(alpha, zeros, zeros + 999, samples[0].shape, generator)
        with discriminator.trainable():
            logits = discriminator([q * x + noise for x in samples], t, cond, samples[0], t, False)
            losses = adversarial.discriminator_loss(*logits)
            losses.mean().backward()
        updates.step_beside(optimizer, scaler, world_size=1)
        found.append(losses.mean().item())
    return found


def test_it_learns_to_tell_sharp_from_blurred_and_one_distribution_from_itself_not():
    """A student of one step blurs: here noise, averaged over 2 x 2 places."""

    def sharp(generator):
        return torch.randn(32, 4, 8, 8, generator=generator)

    def blurred(generator):
        return torch.nn.functional.avg_pool2d(sharp(generator), 2).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def losses_against(fake):
        discriminator = Discriminator(make_unet(SD), 8)
        discriminator.reset(1)
        return np.mean(learn(discriminator, sharp, fake, 40)[-10:])

    assert losses_against(blurred) < 1.3
    assert losses_against(sharp) > adversarial.GUESSING - adversarial.MARGIN


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_renoising_has_the_moments_of_the_forward_process():
    """x_s = alpha_s x_0 + sigma_s e carried to t* must be distributed as alpha_* x_0 + sigma_* e."""
    alpha, sigma = alpha_sigma(DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    generator, n = torch.Generator().manual_seed(0), 4000
    s, top = torch.full((n,), 499), torch.full((n,), 749)
    t, q, noise = adversarial.draw_renoising(alpha, s, top, (n, 4, 4, 4), generator)
    assert t.min() == 499 and t.max() == 749 and t.float().mean().item() == pytest.approx(624, abs=5)
    x_0 = 0.7
    x_s = alpha[499] * x_0 + sigma[499] * torch.randn(n, 4, 4, 4, generator=generator)
    standardised = (q * x_s + noise - alpha[t].view(-1, 1, 1, 1) * x_0) / sigma[t].view(-1, 1, 1, 1)
    assert standardised.mean().item() == pytest.approx(0, abs=0.01)
    for part in (t < 560, t > 690):  # for early and for late times alike
        assert standardised[part].std().item() == pytest.approx(1, abs=0.01)


def test_renoising_to_the_same_time_changes_nothing():
    alpha, _ = alpha_sigma(DDPMScheduler().alphas_cumprod)
    s = torch.tensor([0, 24, 999])
    t, q, noise = adversarial.draw_renoising(alpha, s, s, (3, 4, 8, 8), torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(t, s) and torch.equal(q * x + noise, x)


def test_noised_data_is_the_forward_process_and_the_data_itself_at_its_end():
    alpha, sigma = alpha_sigma(DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    solver, n = TrajectorySolver(alpha, sigma, "epsilon"), 2000
    s, z_0 = torch.tensor([0, 499]).repeat(n), torch.tensor([0.7, -0.3]).view(1, 2, 1, 1).expand(2 * n, 2, 2, 2)
    noised = adversarial.noise_data(solver, z_0, s, torch.Generator().manual_seed(0))
    assert torch.equal(noised[s == 0], z_0[s == 0])
    standardised = (noised - alpha[499] * z_0)[s == 499] / sigma[499]
    assert standardised.mean((0, 2, 3)).abs().max() < 0.05 and standardised.std().item() == pytest.approx(1, abs=0.02)


def stage_of(length=300, adv_real="target"):
    return plan_stages([1], [length], length, None, None, "l2", adv_real=adv_real)[0]


def note(watch, stage, steps, loss, mask=(True, True)):
    for step in steps:
        values = torch.full((2,), float(loss))
        watch.note(stage, step, torch.tensor(mask), values, values, values)
    return watch.warning()


@pytest.mark.parametrize("adv_real", ["target", "data"])
def test_a_discriminator_that_guesses_is_told_of_once_in_a_stage(adv_real):
    watch, stage = adversarial.Watch(), stage_of(adv_real=adv_real)  # of 300 updates, 30 of warm-up
    assert watch.warning() == "" and note(watch, stage, range(59), 1.386) == ""
    said = note(watch, stage, [59], 1.386)
    assert said.startswith("WARNING: the discriminator of stage-0-k1 sees no difference (its loss is 1.386, ")
    assert ("`adv_real`=data" in said) == (adv_real == "target") and said.endswith("`adv_weights`=0\n")
    assert note(watch, stage, range(60, 300), 1.386) == ""
    assert "stage-1-k1" in note(watch, stage._replace(index=1, start=300, end=600), range(300, 400), 1.5)


def test_one_that_sees_is_not_told_of_nor_one_that_only_warms_up_or_skips():
    stage = stage_of()
    assert note(adversarial.Watch(), stage, range(300), 1.37) == ""
    assert note(adversarial.Watch(), stage, range(30), 1.386) == ""
    watch = adversarial.Watch()
    note(watch, stage, range(31), math.nan)
    note(watch, stage, range(31, 50), 0.5, mask=(False, False))  # no jump that ends its segment
    assert note(watch, stage, range(50, 100), 1.3) == ""
    assert note(adversarial.Watch(), stage, range(100), math.nan) == ""


def test_what_is_noted_is_the_mean_over_the_mask():
    values = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0], [5.0, 6.0, 9.0]])
    noted = adversarial.Watch().note(stage_of(), 0, torch.tensor([True, True, False]), *values)
    assert {name: value.item() for name, value in noted.items()} == {
        "loss_discriminator": 1.5, "logit_real": 3.5, "logit_fake": 5.5
    }  # fmt: skip


def test_the_losses_are_those_of_a_binary_classifier():
    real, fake = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50) % 3 == 0
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(real[mask], torch.ones(17)) + bce(fake[mask], torch.zeros(17))
    torch.testing.assert_close(adversarial.masked_mean(adversarial.discriminator_loss(real, fake), mask), expected)
    g_losses = adversarial.generator_loss(fake)
    torch.testing.assert_close(adversarial.masked_mean(g_losses, mask), bce(fake[mask], torch.ones(17)))
    assert adversarial.masked_mean(g_losses, torch.zeros(50, dtype=torch.bool)) == 0


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("boundary_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("top_prob", "from_top"), [(0.0, False), (0.3, False), (0.3, True), (1.0, True)])
def test_the_adversarial_mean_does_not_depend_on_how_an_update_is_split(k, boundary_prob, top_prob, from_top):
    """A loss of 1 for every jump is 1 on average, for micro-batches of 1, 2 and all; values split as they add up."""
    count, generator = 2**18, torch.Generator().manual_seed(k)
    n, _, m, top = draw_segment(k, 40, boundary_prob, count, generator, top_prob)
    mask, length = top - m == 40 // k, 40 // k
    # In closed form: a start at place i of its segment ends at the bottom in 1 of i + 1 draws.
    starts = np.full(length, (1 - top_prob) / length)
    starts[-1] += top_prob
    whole = starts * (boundary_prob + (1 - boundary_prob) / np.arange(1, length + 1))
    share, mask = (whole[-1], mask & (n == top)) if from_top else (whole.sum(), mask)
    assert share_whole(k, 40, boundary_prob, top_prob, from_top) == pytest.approx(share, rel=1e-12)
    spread = (max(1 - share, 0) / share / count) ** 0.5  # of the mean of so many draws
    assert adversarial.masked_mean(torch.ones(count), mask, count * share) == pytest.approx(1, abs=4 * spread + 1e-5)

    values, mask, means = torch.rand(256, generator=generator), mask[:256], []
    for size in (256, 2, 1):  # one process, more of them, accumulation: the mean over the parts
        parts = zip(values.split(size), mask.split(size), strict=True)
        means.append(np.mean([adversarial.masked_mean(v, w, size * share).item() for v, w in parts]))
    assert means == pytest.approx([means[0]] * 3, rel=1e-5)  # float32 sums in another order


def test_no_generator_of_a_gpu_is_seeded(monkeypatch):
    """torch.manual_seed would: all ranks would then draw equal dropout masks."""
    unet = make_unet(SD)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    Discriminator(unet, 8).reset(3)


@pytest.mark.parametrize("fused", [False, True])
def test_the_discriminator_holds_too(fused):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([parameter], fused=fused), torch.amp.GradScaler("cpu", enabled=False)
    (parameter * torch.tensor([1.0, math.nan, 3.0])).sum().backward()
    assert not updates.step_beside(optimizer, scaler, world_size=1)
    assert torch.equal(parameter.data, torch.ones(3)) and parameter.grad is None
    parameter.sum().backward()
    assert updates.step_beside(optimizer, scaler, world_size=1) and not torch.equal(parameter.data, torch.ones(3))


def test_the_discriminators_gradscaler_unscales():
    parameter = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((parameter * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    updates.step_beside(torch.optim.SGD([parameter], lr=1.0), scaler, world_size=1)
    torch.testing.assert_close(parameter.data, torch.tensor([0.0, -1.0, -2.0]))


def test_the_discriminators_gradscaler_is_counted_once_its_scale_cannot_fall():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([parameter]), torch.amp.GradScaler("cpu", init_scale=2.0)
    finite = []
    for _ in range(3):  # scales 2, 1, 1/2
        scaler.scale((parameter * math.nan).sum()).backward()
        finite.append(bool(updates.step_beside(optimizer, scaler, world_size=1)))
    assert finite == [True, True, False] and torch.equal(parameter.data, torch.ones(3))

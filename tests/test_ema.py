from common.ema import ema_update

import pytest
import torch


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("finite", [None, True, False])
def test_update_is_the_formula_in_float64_and_skips_on_the_device(decay, finite):
    torch.manual_seed(0)
    target, source = ([torch.randn(5, 7), torch.randn(3)] for _ in range(2))
    want = [decay * t.double() + (1 - decay) * s.double() for t, s in zip(target, source, strict=True)]
    want = want if finite is not False else [t.double() for t in target]
    before = [s.clone() for s in source]
    ema_update(target, source, decay, None if finite is None else torch.tensor(finite))
    assert all(torch.equal(s, b) for s, b in zip(source, before, strict=True))
    exact = finite is False or decay in (0, 1)
    for got, expected in zip(target, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=0 if exact else 3e-7)


def test_layouts_that_differ_are_averaged_by_place():
    target, source = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    want = torch.lerp(target, source, 0.1)
    for layouts in ((torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)):
        mine, other = (x.clone().to(memory_format=layout) for x, layout in zip((target, source), layouts, strict=True))
        ema_update([mine], [other], 0.9)
        torch.testing.assert_close(mine, want)


def test_one_kernel_for_all_tensors():
    from torch.profiler import ProfilerActivity, profile

    target, source = ([torch.randn(3) for _ in range(50)] for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        ema_update(target, source, 0.9, torch.tensor(True))
    counts = {event.key: event.count for event in run.key_averages() if not event.key.endswith("detach")}
    assert counts["aten::_fused_sgd_"] == 1 and max(counts.values()) < 50

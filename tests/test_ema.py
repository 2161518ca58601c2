import copy

from common.ema import ema_update

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def test_update_is_that_of_torch_and_changes_the_source_in_nothing():
    torch.manual_seed(0)
    source = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    target = copy.deepcopy(source)
    for p in source.parameters():
        p.data.add_(1.0)
    expected = [p.detach().clone() for p in target.parameters()]
    before = [p.detach().clone() for p in source.parameters()]
    get_ema_multi_avg_fn(0.95)(expected, [p.detach() for p in source.parameters()], None)
    ema_update(target.parameters(), source.parameters(), 0.95)
    for got, want in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(got.data, want)
    assert all(torch.equal(p, b) for p, b in zip(source.parameters(), before, strict=True))


def test_decay_zero_copies_and_decay_one_keeps():
    target, source = [torch.zeros(3)], [torch.ones(3)]
    ema_update(target, source, 1.0)
    assert target[0].sum() == 0
    ema_update(target, source, 0.0)
    assert target[0].sum() == 3


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("finite", [None, True, False])
def test_update_is_the_formula_in_float64_and_skips_on_the_device(decay, finite):
    torch.manual_seed(0)
    target, source = ([torch.randn(5, 7), torch.randn(3)] for _ in range(2))
    want = [decay * t.double() + (1 - decay) * s.double() for t, s in zip(target, source, strict=True)]
    want = want if finite is not False else [t.double() for t in target]
    ema_update(target, source, decay, None if finite is None else torch.tensor(finite))
    exact = finite is False or decay == 0
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

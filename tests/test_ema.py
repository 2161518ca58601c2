import copy

from common.ema import ema_update

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

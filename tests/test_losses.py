from common.losses import distance

import pytest
import torch
import torch.nn.functional as F


def test_l2_is_the_mean_squared_error():
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(distance(a, b, "l2", 0.001), F.mse_loss(a, b))


def test_huber_is_square_near_zero_and_linear_far_away():
    c = 0.001
    near, far = torch.tensor([1e-5]), torch.tensor([1e3])
    zero = torch.zeros(1)
    torch.testing.assert_close(distance(near, zero, "huber", c), near[0] ** 2 / (2 * c), rtol=0.05, atol=1e-10)
    torch.testing.assert_close(distance(far, zero, "huber", c), far[0] - c)
    assert distance(far, far, "huber", c) == 0


def test_huber_gradient_is_bounded_by_the_mean():
    d = torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6], requires_grad=True)
    distance(d, torch.zeros(5), "huber", 0.001).backward()
    torch.testing.assert_close(d.grad, torch.tensor([-0.2, -0.2, 0.0, 0.2, 0.2]), rtol=1e-4, atol=1e-6)


def test_half_precision_inputs_are_compared_in_float32():
    a, b = torch.full((1000,), 300.0, dtype=torch.float16), torch.zeros(1000, dtype=torch.float16)
    loss = distance(a, b, "l2", 0.001)  # 90000 overflows float16
    assert loss.dtype == torch.float32 and loss == 90000


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss_type 'l1'"):
        distance(torch.zeros(1), torch.zeros(1), "l1", 0.1)

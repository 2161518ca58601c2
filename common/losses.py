"""Distances between the two sides of a consistency loss, always float32."""

LOSS_TYPES = ("l2", "huber")


def distance(model_pred, target, loss_type, huber_c=None):
    """l2: mean d^2;  huber: mean (sqrt(d^2 + c^2) - c), the pseudo-Huber loss of 2310.14189 taken per element.

    The mean is over every element. model_pred, target: (B, ...), any floating dtype. Returns a float32 scalar.
    """
    d2 = (model_pred.float() - target.float()) ** 2
    if loss_type == "l2":
        return d2.mean()
    if loss_type == "huber":
        return ((d2 + huber_c**2).sqrt() - huber_c).mean()
    raise ValueError(f"loss_type {loss_type!r} is none of {LOSS_TYPES}")

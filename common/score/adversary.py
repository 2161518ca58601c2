"""An adversary of the student: it tells its results from the pairs by what the fake score makes of them half-way.

As in DMD2 (2405.14867, Section 4.3). A head reads the fake score's features of x_tau, in the middle of its denoiser:

    student:              softplus(-D(x_tau))
    fake score and head:  softplus(-D(z_tau)) + softplus(D(x_tau)),   z: real latents, of pairs or images.
"""

import contextlib

from common.networks import sharded

import torch


class Head(torch.nn.Module):
    """float32 logits (B,) for "this is real" from features (B, tokens, width): each token by itself, their mean.

    The same weights for a seed; the run's own random state stays what it is.
    """

    def __init__(self, width, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.token = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.LayerNorm(width), torch.nn.SiLU())
            self.logit = torch.nn.Linear(width, 1)

    def forward(self, features):
        return self.logit(self.token(features.float()).mean(1)).float().squeeze(1)


def middle(network):
    """The module of a denoiser whose outputs are the features: a U-Net's middle block, else the middle one of its
    longest list of blocks, the last of these: shorter ones refine text or latents before. None where it has none."""
    if isinstance(block := getattr(network, "mid_block", None), torch.nn.Module):
        return block
    lists = [module for module in network.children() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(reversed(lists), key=len, default=())
    return blocks[(len(blocks) - 1) // 2] if len(blocks) else None


@contextlib.contextmanager
def noting(asked):
    """A list, to which every call of the score's denoisers inside adds what their middle gives."""
    found, middles = [], {middle(network): network for network in asked.denoisers()}

    def note(module, inputs, output):
        found.append(output)
        sharded.gather_for_backward(middles[module], _tensors(output))

    hooks = [module.register_forward_hook(note) for module in middles if module]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def features(output, batch_size):
    """(B, tokens, width) of what a middle module gives: a tensor (B, C, ...) of convolutions, or tensors (B, T, C) of
    a transformer, whose tokens of image and text stand one after another. Frames that stand in B become tokens."""
    tokens = [x if x.ndim == 3 else x.flatten(2).transpose(1, 2) for x in _tensors(output)]
    width = tokens[-1].shape[-1]
    return torch.cat([x.reshape(batch_size, -1, width) for x in tokens if x.shape[-1] == width], dim=1)


def _tensors(output):
    return [output] if torch.is_tensor(output) else [x for x in output if torch.is_tensor(x) and x.ndim >= 3]

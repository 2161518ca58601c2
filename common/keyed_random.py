"""Draws keyed by (seed, name, micro-batch): the same after a resume and for any number of processes."""

import hashlib

import torch


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings: the same parts give the same seed on every machine and version."""
    assert all(type(part) in (int, str) for part in parts), parts
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def keyed_generator(seed: int, name: str, micro_batch: int, device) -> torch.Generator:
    """A generator on `device` for the draws called `name` of global micro-batch j, whatever was drawn before."""
    return torch.Generator(device=device).manual_seed(keyed_seed(seed, name, micro_batch))

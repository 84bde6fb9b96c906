"""Streams of random numbers, each a function of the seed, of what it is for, and of when.

Nothing draws from a generator that lives on: so a resumed run draws what it would have drawn, one process draws what
several would, and evaluating more often changes nothing.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, when: int = 0) -> torch.Generator:
    """Make the generator of one stream.

    Args:
        seed: Seed of the run.
        purpose: What the numbers are for.
        when: Step or epoch.

    Returns:
        A generator on the CPU, always the same for the same arguments.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{when}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)

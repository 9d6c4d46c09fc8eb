"""Where pages and examples run, and where their random numbers come from."""

import os

import torch


def default_device() -> torch.device:
    """Device on which the book's pages run.

    CUDA where there is one, otherwise the CPU; the environment variable ``LMLOSSES_DEVICE``
    overrides the choice. The library itself never asks: it computes where its inputs are.

    Example:
        >>> from lmlosses import default_device
        >>> default_device().type in {"cpu", "cuda"}
        True
    """
    chosen = os.environ.get("LMLOSSES_DEVICE")
    if chosen:
        return torch.device(chosen)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_generator(seed: int) -> torch.Generator:
    """A seeded generator on the CPU, so that a page draws the same numbers on every device.

    Draw with it on the CPU, then move what was drawn.

    Example:
        >>> import torch
        >>> from lmlosses import cpu_generator
        >>> one = torch.rand(3, generator=cpu_generator(0))
        >>> bool((one == torch.rand(3, generator=cpu_generator(0))).all())
        True
    """
    return torch.Generator(device="cpu").manual_seed(seed)

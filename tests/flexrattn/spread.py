"""Weights far from the small initialisation, so that every branch matters to what a model computes."""

import torch


def spread_weights(model: torch.nn.Module, std: float, seed: int = 0) -> None:
    """Initialise `model`, then draw each of its matrices from a normal distribution of deviation `std`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)

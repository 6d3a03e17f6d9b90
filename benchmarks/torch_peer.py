"""The same attack written the ordinary way in PyTorch (extra `peers`): Inverting Gradients' objective.

Networks come from the layer view of ours, with the same weights, so that both compute one number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from invjax.base import Layer

ACTIVATIONS = {"identity": lambda x: x, "sigmoid": torch.sigmoid, "relu": F.relu}


def parameters(layers: Sequence[Layer]) -> list[torch.Tensor]:
    """Weights and biases in PyTorch's layouts, in the order of the layers."""
    tensors = []
    for layer in layers:
        if layer.weight is None:
            continue
        weight = np.asarray(layer.weight)
        axes = (3, 2, 0, 1) if layer.kind == "conv" else (1, 0)
        tensors.append(torch.tensor(np.ascontiguousarray(weight.transpose(axes))))
        tensors.append(torch.tensor(np.asarray(layer.bias).copy()))
    return [tensor.requires_grad_() for tensor in tensors]


def from_images(images: Any) -> torch.Tensor:
    """Images `[..., H, W, C]` in PyTorch's layout."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, -3)))


def to_images(tensor: torch.Tensor) -> np.ndarray:
    """The other way round."""
    return np.ascontiguousarray(np.moveaxis(tensor.numpy(), -3, -1))


def logits(layers: Sequence[Layer], params: Sequence[torch.Tensor], x: torch.Tensor):
    """The network on images `[B, C, H, W]`; flattening follows our channels-last order."""
    remaining = iter(params)
    for layer in layers:
        if layer.kind == "conv":
            pad = layer.padding[0][0]
            x = F.conv2d(x, next(remaining), next(remaining), layer.strides, pad)
        elif layer.kind == "dense":
            x = F.linear(x, next(remaining), next(remaining))
        elif layer.kind == "flatten":
            x = x.permute(0, 2, 3, 1).flatten(1)
        elif layer.kind == "max_pool":
            x = F.max_pool2d(x, layer.window)
        elif layer.kind == "global_average_pool":
            x = x.mean(dim=(2, 3))
        x = ACTIVATIONS[layer.activation](x)
    return x


def objective(layers, params, target, labels, weight: float) -> Callable[[torch.Tensor], Any]:
    """Cosine distance of the gradients plus weighted anisotropic total variation."""

    def value(x: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits(layers, params, x), labels)
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        dot = sum((a * b).sum() for a, b in zip(gradient, target, strict=True))
        norms = sum((a * a).sum() for a in gradient) * sum((b * b).sum() for b in target)
        variation = (x[:, :, 1:] - x[:, :, :-1]).abs().mean() + (
            x[:, :, :, 1:] - x[:, :, :, :-1]
        ).abs().mean()
        return 1 - dot / norms.sqrt() + weight * variation

    return value


def target_gradient(layers, params, x, labels) -> list[torch.Tensor]:
    """The observed gradient."""
    loss = F.cross_entropy(logits(layers, params, x), labels)
    return [gradient.detach() for gradient in torch.autograd.grad(loss, params)]


def attack_loop(
    value, starts: torch.Tensor, steps: int, box: Any = (0, 1), decay: bool = False
) -> Callable[[], list[torch.Tensor]]:
    """Restarts one after another, as the frameworks do: signed Adam and a box, `steps` each.

    With `decay` the rate falls to a tenth after 3/8, 5/8 and 7/8 of the steps.
    """

    def run() -> list[torch.Tensor]:
        results = []
        milestones = [int(steps * part / 8) for part in (3, 5, 7)] if decay else []
        for start in starts:
            x = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([x], lr=0.1)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
            for _ in range(steps):
                optimizer.zero_grad()
                (x.grad,) = torch.autograd.grad(value(x), [x])
                x.grad.sign_()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    x.clamp_(*box)
            results.append(x.detach())
        return results

    return run


def attack_vmapped(layers, params, target, labels, weight, starts, steps: int):
    """Restarts by `torch.func.vmap`."""
    fixed = [tensor.detach() for tensor in params]

    def loss(weights, x):
        return F.cross_entropy(logits(layers, weights, x), labels)

    def value(x):
        gradient = torch.func.grad(loss)(fixed, x)
        dot = sum((a * b).sum() for a, b in zip(gradient, target, strict=True))
        norms = sum((a * a).sum() for a in gradient) * sum((b * b).sum() for b in target)
        variation = (x[:, :, 1:] - x[:, :, :-1]).abs().mean() + (
            x[:, :, :, 1:] - x[:, :, :, :-1]
        ).abs().mean()
        return 1 - dot / norms.sqrt() + weight * variation

    slope = torch.func.vmap(torch.func.grad(value))

    def run() -> torch.Tensor:
        x = starts.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(steps):
            x.grad = slope(x.detach()).sign()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        return x.detach()

    return run

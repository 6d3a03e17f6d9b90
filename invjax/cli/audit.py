"""`invjax audit`: what a model's layers give away of one sample, before any attack is run."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from invjax import models
from invjax.base import Model
from invjax.cli import shared
from invjax.theory.security_index import (
    Change,
    SecurityIndex,
    closing_changes,
    security_index,
)

LIMITS = (
    "Not covered: batches of more than one sample; defended gradients (noise, clipping, pruning), "
    "where approximations remain; and attacks with a prior on images, which fill such gaps: a "
    "negative index is no proof of privacy."
)


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Count the equations that the gradient of one sample gives about every layer's input.

    invjax audit lenet

    invjax audit cnn3_c1 --mode numeric
    """

    model: tyro.conf.Positional[str]
    """A model as `invjax attack --model` takes it.
    Among them the reference architectures of layer-wise attacks: cnn2_c1, cnn3_c2, lenet2, cnn6_d, ..."""
    input_shape: tuple[int, int, int] = (32, 32, 3)
    """Height, width and channels of its inputs."""
    num_classes: int = 10
    """Number of classes; 1 for a single logit."""
    mode: Literal["closed", "numeric"] = "closed"
    """closed: ranks by formulas, at once. numeric: in float64, for random weights; up to minutes."""
    seed: int = 0
    """Of the random weights of numeric."""


def audit(argv: Sequence[str]) -> int:
    """Run `invjax audit`.

    Args:
      argv: its arguments.

    Returns:
      The exit code: 0, 2 for bad input, 130 if interrupted.
    """
    config = tyro.cli(AuditConfig, args=argv, prog="invjax audit")
    return shared.guarded("audit", lambda: _run(config))


def _run(config: AuditConfig) -> int:
    model = prepare(config)
    key = jax.random.key(config.seed) if config.mode == "numeric" else None
    found = security_index(model, config.input_shape, mode=config.mode, key=key)
    changes = closing_changes(model, config.input_shape) if found.layers else ()
    size = " x ".join(map(str, config.input_shape))
    console = Console()
    console.print(f"[bold]{model.name}[/bold] on {size} inputs, one sample, {config.mode} ranks")
    if found.layers:
        console.print(index_table(found))
    for line in verdict(found, changes):
        console.print(line, highlight=False)
    return 0


def prepare(config: AuditConfig) -> Model:
    """The model that is audited.

    Args:
      config: the options.

    Returns:
      The model.

    Raises:
      ValueError: anything amiss, by the option's name.
    """
    if min(config.input_shape) < 1:
        raise ValueError(f"--input-shape must be at least 1 1 1, got {config.input_shape}.")
    if config.num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {config.num_classes}.")
    if config.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {config.seed}.")
    model = models.by_name(config.model, config.num_classes)
    if model.layers is None:
        raise ValueError(
            f"MODEL {config.model} is no plain chain of layers (it has norm layers or skips), and "
            "an audit needs one; invjax.theory.jacobian_rank takes any model."
        )
    return model


def index_table(found: SecurityIndex) -> Table:
    """The index layer by layer.

    Args:
      found: the index, of at least one convolution.

    Returns:
      The table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("layer", "unknowns", "rank", "deficit", "weight", "term", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason")
    for layer in found.layers:
        numbers = (layer.position, layer.unknowns, layer.rank, layer.deficit)
        cells = ["-" if number is None else str(number) for number in numbers]
        term = "-" if layer.term is None else str(layer.term)
        cells += [f"{layer.weight:.2f}", term, str(layer.joint_rank), layer.reason]
        table.add_row(*cells)
    return table


def verdict(found: SecurityIndex, changes: Sequence[Change]) -> list[str]:
    """What the index means, in plain words.

    Args:
      found: the index.
      changes: of `closing_changes`.

    Returns:
      A line a statement; the last says what is not covered.
    """
    lines = [_recovery(found)]
    if found.reason:
        lines.append(f"Besides the convolutions: {found.reason}.")
    if found.layers:
        lines.append(_first_layer(found))
    if len(found.layers) > 1:
        leaking = [str(layer.position) for layer in found.layers if layer.deficit == 0]
        if leaking and not found.exact:
            lines.append(
                f"Layers that give their input away once their output is known: {', '.join(leaking)}."
            )
    if found.layers and changes:
        ways = [
            f"{change.filters} filters and stride {change.stride} ({-change.deficit} short)"
            for change in changes
        ]
        lines.append(
            f"Least changes of layer {found.layers[0].position} that leave it short: "
            f"{', or '.join(ways)}; the more is missing, the better."
        )
    return [*lines, LIMITS]


def _recovery(found: SecurityIndex) -> str:
    if found.exact and not found.layers:
        return "Exact recovery is possible: dense layers alone, and each gives its input away."
    if found.exact:
        return (
            "Exact recovery is possible (c(M) = 0): every layer has as many independent equations as "
            "unknowns, and the recursion from the last layer to the first returns the sample."
        )
    if found.index is None or not found.layers:
        return (
            "The recursion ends before the first layer, and c(M) is not defined. This is no "
            "protection: other attacks need no recursion."
        )
    worst = min(found.layers, key=lambda layer: (layer.term or 0, layer.deficit or 0))
    text = (
        f"c(M) = {found.index}: no exact recovery layer by layer. Most is missing at layer "
        f"{worst.position}: {-(worst.deficit or 0)} of {worst.unknowns} unknowns."
    )
    if any(layer.rows == "gradient" for layer in found.layers):
        text += (
            " Behind ReLU only gradient equations were counted; the outputs that are positive give "
            "more, so exact recovery is not ruled out."
        )
    return text


def _first_layer(found: SecurityIndex) -> str:
    first = found.layers[0]
    missing = first.unknowns - first.joint_rank
    if missing:
        return (
            f"Layer {first.position} cannot determine its input: a space of {missing} dimensions of "
            "inputs shares the very same gradient, and no attack without a prior tells them apart."
        )
    if first.rows != "all":
        return (
            f"Layer {first.position} may have equations enough for its input; how many an adversary "
            "can write down depends on the sample."
        )
    text = f"Layer {first.position} has equations enough ({first.joint_rank}) for its input"
    if found.exact:
        return f"{text}: it is where the sample leaks."
    return f"{text}: gaps deeper in the network may be closed by the gradients of earlier layers."

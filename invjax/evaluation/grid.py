"""A sweep as data: settings, the cells that they span, and the blocks of jobs that each is run in."""

import dataclasses
import itertools
import json
import pathlib
import re
import tomllib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from invjax import calls

Settings = TypeVar("Settings")
AXES = ("datasets", "models", "train_steps", "defenses", "attacks", "batch_sizes", "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to attack, with what: every combination of the swept axes.

    Attributes:
      datasets: names or paths, as `datasets.load` takes them.
      models: names, perhaps with settings.
      train_steps: steps of Adam that a model is trained for before it is attacked; 0 is fresh.
      defenses: one text a defence: `clip(1.0),gaussian(0.01)`.
      attacks: names, perhaps with settings.
      batch_sizes: samples of one victim.
      seeds: of the victims, the weights, the defence and the attack.
      num_victims: batches attacked in every cell and for every seed.
      restarts: of every attack; its own where `None`.
      steps: of every attack, at most; its own where `None`.
      labels: what the adversary knows of them; the attack's own choice where `None`.
      data_dir: folder of data sets on disk.

    Raises:
      ValueError: an empty or repeating axis, a number out of range, text that cannot be read.
    """

    datasets: tuple[str, ...] = ("digits",)
    models: tuple[str, ...] = ("lenet",)
    train_steps: tuple[int, ...] = (0,)
    defenses: tuple[str, ...] = ("none",)
    attacks: tuple[str, ...] = ("dlg",)
    batch_sizes: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    num_victims: int = 8
    restarts: int | None = None
    steps: int | None = None
    labels: Literal["known", "recovered", "joint"] | None = None
    data_dir: str | None = None

    def __post_init__(self):
        """Check what can be checked without loading anything."""
        for axis in AXES:
            values = getattr(self, axis)
            if not isinstance(values, tuple) or not values:
                raise ValueError(f"{axis} must name at least one value, got {values!r}.")
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} must not repeat a value, got {values!r}.")
            kind = int if axis in ("train_steps", "batch_sizes", "seeds") else str
            if not all(type(value) is kind for value in values):
                raise ValueError(f"{axis} must hold {kind.__name__}s, got {values!r}.")
        least = {"train_steps": 0, "seeds": 0, "batch_sizes": 1}
        least |= {"num_victims": 1, "restarts": 1, "steps": 1}
        for name, low in least.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and (type(value) is not int or value < low):
                    raise ValueError(f"{name} must be at least {low}, got {value!r}.")
        if self.labels not in (None, "known", "recovered", "joint"):
            raise ValueError(
                f"labels must be 'known', 'recovered' or 'joint', got {self.labels!r}."
            )
        for what, texts in (("defense", self.defenses), ("attack", self.attacks)):
            for text in texts:
                calls.parse(text, what)


class Cell(NamedTuple):
    """One combination of everything but the seed.

    Attributes:
      dataset: name or path, as `datasets.load` takes it.
      model: the model, as text.
      train_steps: steps that it was trained for before the attack.
      defense: the defence, as text.
      attack: the attack, as text.
      batch_size: samples behind one gradient.
    """

    dataset: str
    model: str
    train_steps: int
    defense: str
    attack: str
    batch_size: int

    @property
    def identity(self) -> int:
        """A number of 32 bits that this combination has in every sweep."""
        return zlib.crc32(json.dumps(self).encode())

    @property
    def name(self) -> str:
        """A readable name, fit for files, no two alike in a sweep."""
        parts = (pathlib.Path(self.dataset).stem, self.model, self.defense, self.attack)
        plain = "-".join(text.split("(")[0] for text in parts)
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', plain)}-{self.identity:08x}"


class Block(NamedTuple):
    """Jobs that are run, recorded and resumed together: victims `first` to `first + count - 1`.

    Attributes:
      cell: what they have in common.
      seed: of the sweep's `seeds`.
      first: number of the first victim, from 0.
      count: number of victims.
    """

    cell: Cell
    seed: int
    first: int
    count: int

    @property
    def name(self) -> str:
        """A name fit for files."""
        return f"{self.cell.name}-s{self.seed}-v{self.first}"


def cells(sweep: Sweep) -> list[Cell]:
    """Every cell, in the order in which the axes are written.

    Args:
      sweep: the settings.

    Returns:
      The cells.
    """
    axes = [getattr(sweep, axis) for axis in AXES if axis != "seeds"]
    return [Cell(*values) for values in itertools.product(*axes)]


def blocks(sweep: Sweep, size: int) -> list[Block]:
    """Every job once, `size` or fewer at a time.

    They depend on nothing else, so that any number of devices and processes runs the same blocks.

    Args:
      sweep: the settings.
      size: jobs of a block.

    Returns:
      The blocks, cell by cell and seed by seed.
    """
    return [
        Block(cell, seed, first, min(size, sweep.num_victims - first))
        for cell in cells(sweep)
        for seed in sweep.seeds
        for first in range(0, sweep.num_victims, size)
    ]


def from_mapping(settings: Mapping[str, Any]) -> Sweep:
    """A sweep from a mapping, as TOML and JSON give it.

    Args:
      settings: by the names of `Sweep`; an axis may be one value or a list.

    Returns:
      The sweep.

    Raises:
      ValueError: an unknown name, with the nearest known one; or what `Sweep` refuses.
    """
    return Sweep(**with_tuples(settings, Sweep, AXES))


def with_tuples(settings: Mapping[str, Any], kind: type, lists: Sequence[str]) -> dict[str, Any]:
    """Settings of a dataclass, those that hold lists as tuples; a single value is a list of one.

    Args:
      settings: by name.
      kind: the dataclass.
      lists: which of them hold lists.

    Returns:
      Keywords of the dataclass.

    Raises:
      ValueError: an unknown name, with the nearest known one.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            raise ValueError(
                f"Unknown setting {name!r}: known are {', '.join(sorted(known))}."
                f"{calls.nearest(name, known)}"
            )
    values = dict(settings)
    for name in lists:
        if name in values:
            value = values[name]
            values[name] = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values


def from_toml(path: pathlib.Path | str) -> Sweep:
    """A sweep from a TOML file.

    Args:
      path: the file.

    Returns:
      The sweep.

    Raises:
      ValueError: no such file, no TOML, or what `from_mapping` refuses; it names the file.
    """
    return read_toml(path, from_mapping)


def read_toml(
    path: pathlib.Path | str, from_mapping: Callable[[Mapping[str, Any]], Settings]
) -> Settings:
    """Settings from a TOML file.

    Args:
      path: the file.
      from_mapping: makes them of what it says.

    Returns:
      The settings.

    Raises:
      ValueError: no such file, no TOML, or what `from_mapping` refuses; it names the file.
    """
    try:
        return from_mapping(tomllib.loads(pathlib.Path(path).read_text()))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML: {error}.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def as_mapping(sweep: Sweep) -> dict[str, Any]:
    """The settings as JSON holds them; `from_mapping` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(sweep)))


PRESETS = {
    "digits": Sweep(
        defenses=("none", "gaussian_noise(0.0001)", "gaussian_noise(0.01)", "magnitude_prune(0.9)"),
        attacks=("dlg", "bayes(num_steps=300)"),
        num_victims=8,
        restarts=2,
    ),
}
"""Sweeps that come with the package, by name."""

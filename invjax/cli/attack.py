"""`invjax attack`: one attack on a few victims, and a report."""

import dataclasses
import os
import pathlib
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from invjax import attacks, datasets, defenses, driver, models, report
from invjax.cli import shared
from invjax.evaluation import run, store


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Reconstruct private samples from the gradients that a client would share.

    With no options: digits that scikit-learn brings, LeNet, DLG. For example:

    invjax attack --defense 'clip(1.0),gaussian(0.01)' --attack bayes

    invjax attack --dataset cifar10 --data-dir DIR --attack 'inverting_gradients(restarts=4)'
    """

    dataset: str = "digits"
    """digits (embedded), mnist, fashion_mnist, cifar10, an npz file, or a folder of images."""
    data_dir: pathlib.Path | None = None
    """Folder with the files of mnist, fashion_mnist or cifar10."""
    model: str = "lenet"
    """A model, perhaps with settings: mlp((64, 32)), convnet(width=32), resnet18, ..."""
    weights: pathlib.Path | None = None
    """Weights of the model (npz, from invjax.models.save_params); random ones if not given."""
    defense: tuple[str, ...] = ("none",)
    """Defences in the order in which they act: 'clip(1.0),gaussian(0.01)', or several values."""
    attack: str = "dlg"
    """By matching gradients: dlg, idlg, inverting_gradients, gradinversion, tag, bayes, strong.
    Without a search, for dense networks: bias_trick, exclusivity, row_scan, spear, tensor.
    For one image and convolutions: layerwise, hybrid.
    Perhaps with settings: 'tag(restarts=8)'; or a function of a module of yours: 'mylab.mine(0.1)'."""
    batch_size: int = 1
    """Samples behind one gradient."""
    num_victims: int = 8
    """Gradients to attack, each on its own."""
    restarts: int | None = None
    """Independent starts, of which the best by the objective counts; the attack's own (4 of dlg)."""
    steps: int | None = None
    """Steps of the attack, at most; its own if not given."""
    labels: Literal["known", "recovered", "joint"] | None = None
    """Labels told to the adversary, inferred first, or optimised; the attack's own if not given."""
    seed: int = 0
    """Of victims, weights, defence and attack."""
    out: pathlib.Path | None = None
    """Folder of the results; a new one under invjax-runs if not given."""
    overwrite: bool = False
    """Replace the results of an earlier run in that folder."""


def attack(argv: Sequence[str]) -> int:
    """Run `invjax attack`.

    Args:
      argv: its arguments.

    Returns:
      The exit code: 0, 1 if writing failed, 2 for bad input, 130 if interrupted.
    """
    config = tyro.cli(AttackConfig, args=argv, prog="invjax attack")

    def work() -> int:
        try:
            experiment, out = prepare(config)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return execute(config, experiment, out, Console())

    return shared.guarded("attack", work)


def prepare(config: AttackConfig) -> tuple[run.Experiment, pathlib.Path]:
    """Check everything that can be checked before any compilation.

    Args:
      config: the options.

    Returns:
      The experiment and the folder of its results.

    Raises:
      ValueError: anything amiss, by the option's name.
      TypeError: settings in the text of a model of a wrong type.
    """
    for name in ("batch_size", "num_victims", "restarts", "steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if config.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {config.seed}.")
    out = default_folder(config) if config.out is None else config.out
    store.check_folder(out, config.overwrite)
    dataset = datasets.load(config.dataset, config.data_dir)
    total = config.batch_size * config.num_victims
    if total > len(dataset):
        raise ValueError(
            f"--num-victims {config.num_victims} of --batch-size {config.batch_size} need {total} "
            f"samples, {dataset.name} has {len(dataset)}."
        )
    model = models.by_name(config.model, dataset.num_classes)
    if dataset.inputs.ndim == 2 and not config.model.startswith("mlp"):
        raise ValueError(f"--model {config.model} needs images; {dataset.name} holds vectors: mlp.")
    defense = defenses.parse(",".join(config.defense), model)
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    params = model.init(key, dataset.input_shape)
    if config.weights is not None:
        params = models.load_params(config.weights, params)
    settings: dict[str, Any] = {
        "restarts": config.restarts,
        "num_steps": config.steps,
        "labels": config.labels,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if config.attack == "dlg" and config.restarts is None:
        settings["restarts"] = 4
    made = attacks.by_name(config.attack, model, defense, **settings)
    experiment = run.Experiment(
        dataset,
        model,
        params,
        defense,
        made,
        config.batch_size,
        config.num_victims,
        attacks.needs_labels(config.attack, config.labels),
        config.seed,
    )
    run.check(experiment)
    return experiment, out


def default_folder(config: AttackConfig) -> pathlib.Path:
    """A folder under `invjax-runs` that is not there yet.

    Args:
      config: the options, of which data set, model, attack and seed make the name.

    Returns:
      The folder, relative; one that is there and empty will do.
    """
    names = (pathlib.Path(config.dataset).stem, config.model, config.attack)
    plain = "-".join(name.split("(")[0] for name in names)
    base = pathlib.Path("invjax-runs") / f"attack-{plain}-seed{config.seed}"
    folder, number = base, 2
    while folder.exists() and any(folder.iterdir()):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def execute(
    config: AttackConfig, experiment: run.Experiment, out: pathlib.Path, console: Console
) -> int:
    """Run the attack with progress, write its folder, print its table.

    Args:
      config: the options.
      experiment: what they make.
      out: the folder.
      console: where to print.

    Returns:
      The exit code.
    """
    samples = f"{config.num_victims} x {config.batch_size} from {experiment.dataset.name}"
    console.print(
        f"[bold]{config.attack}[/bold] on {experiment.model.name}, {samples}, "
        f"defense {experiment.defense.name}"
    )
    outcome = interruptible(lambda on_chunk: run.attack_victims(experiment, on_chunk), console)
    if outcome is None:
        console.print("Interrupted before anything was reconstructed; nothing written.")
        # The compiler cannot be stopped from outside, and must not hold up the exit.
        sys.stdout.flush()
        os._exit(130)
    try:
        store.write_folder(out, contents(config, experiment, outcome))
    except OSError as error:
        print(f"invjax attack: --out {out}: {error}; nothing was written.", file=sys.stderr)
        return 1
    console.print(result_table(outcome))
    console.print(summary(outcome))
    console.print(f"Report: {out / 'report.html'}")
    return 130 if outcome.interrupted else 0


def interruptible(
    work: Callable[[Callable[[driver.Progress], None]], run.Outcome], console: Console
) -> run.Outcome | None:
    """Do the work in a thread, so that Ctrl-C is heard at once, whatever the compiler does.

    Args:
      work: takes `on_chunk`.
      console: for the progress.

    Returns:
      The outcome, of an interrupted attack its best so far; `None` if it was interrupted before
      there was one.

    Raises:
      BaseException: whatever the work raised.
    """
    # Not `Thread.join`: interrupted, it may take a running thread for a finished one.
    stop, begun, finished, box = threading.Event(), threading.Event(), threading.Event(), {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("compiling", total=None)
    printed = [-1.0]

    def on_chunk(progress: driver.Progress) -> None:
        begun.set()
        if stop.is_set():
            raise KeyboardInterrupt
        value = np.nan if progress.objective is None else float(np.median(progress.objective))
        text = f"median objective {value:.3e}"
        bar.update(task, description=text, completed=progress.step, total=progress.num_steps)
        share = progress.step / progress.num_steps
        if not console.is_terminal and share >= printed[0] + 0.1:
            printed[0] = share
            console.print(f"attacking: step {progress.step} of {progress.num_steps}: {text}")

    def target() -> None:
        try:
            box["outcome"] = work(on_chunk)
        except BaseException as error:
            box["error"] = error
        finally:
            finished.set()

    thread = threading.Thread(target=target, daemon=True)
    with bar:
        thread.start()
        try:
            while not finished.wait(0.1):
                pass
        except KeyboardInterrupt:
            stop.set()
            # Before the first step there is nothing to save; after it, the end of a chunk and the
            # measurements are near.
            finished.wait(15 if begun.is_set() else 1)
    if "error" in box:
        raise box["error"]
    return box.get("outcome")


def contents(
    config: AttackConfig, experiment: run.Experiment, outcome: run.Outcome
) -> dict[str, bytes]:
    """The files of a run folder, by name."""
    settings = dataclasses.asdict(config) | {"defense": experiment.defense.name}
    made = store.versions()
    flat_truth = outcome.truth.reshape(-1, *outcome.truth.shape[2:])
    flat_reconstruction = outcome.reconstruction.reshape(flat_truth.shape)
    captions = [
        "exact" if row["psnr"] == np.inf else f"{row['psnr']:.1f} dB" for row in outcome.rows
    ]
    span = run.raw_range(experiment.dataset)
    comparison = report.comparison(flat_truth, flat_reconstruction, captions, span)
    drawn = {"Truth and reconstruction": ("comparison.png", comparison)}
    if outcome.trace.size:  # closed forms take no steps
        drawn["Objective"] = ("objective.png", report.objective_curves(outcome.trace))
    plain = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in settings.items()
    }
    whole = {"interrupted": outcome.interrupted, "seconds": outcome.seconds, **plain, **made}
    rows = [row | whole for row in outcome.rows]
    page = report.attack_page(
        headline=f"{config.attack} on {experiment.model.name}: {experiment.dataset.name}",
        lead=summary(outcome),
        rows=[short_row(row) for row in outcome.rows],
        figures={title: png for title, (_, png) in drawn.items()},
        settings={**settings, "seconds": f"{outcome.seconds:.1f}"},
        versions=made,
        command=command(config),
    )
    return {
        "results.parquet": store.parquet(rows),
        "reconstructions.npz": store.npz(
            truth=outcome.truth,
            labels=outcome.labels,
            reconstruction=outcome.reconstruction,
            recovered_labels=outcome.recovered_labels,
            trace=outcome.trace,
        ),
        **{f"figures/{name}": png for name, png in drawn.values()},
        "settings.json": store.json_file({"settings": settings, "versions": made}, indent=2),
        "report.html": page.encode(),
    }


def command(config: AttackConfig) -> str:
    """The command that repeats a run: every option that is not its default.

    Args:
      config: the options.

    Returns:
      The command line, quoted for a shell; without `--out` and `--overwrite`.
    """
    parts = ["invjax", "attack"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in ("out", "overwrite"):
            continue
        values = value if isinstance(value, tuple) else (value,)
        parts += [f"--{field.name.replace('_', '-')}", *(str(value) for value in values)]
    return shlex.join(parts)


def short_row(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that a person reads."""
    names = {
        "victim": "victim",
        "label": "label",
        "recovered_label": "recovered",
        "psnr": "PSNR",
        "ssim": "SSIM",
        "baseline_grey_psnr": "grey",
        "baseline_mean_psnr": "mean",
        "objective": "objective",
        "found": "found",
    }
    return {title: row[name] for name, title in names.items() if name in row}


def result_table(outcome: run.Outcome) -> Table:
    """The table at the end of a run."""
    rows = [short_row(row) for row in outcome.rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in rows[0]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(
                {True: "yes", False: "no"}[value]
                if isinstance(value, bool)
                else f"{value:.4g}"
                if isinstance(value, float)
                else str(value)
                for value in row.values()
            )
        )
    return table


def summary(outcome: run.Outcome) -> str:
    """What came of it, in a sentence or two."""
    psnr = np.array([row["psnr"] for row in outcome.rows])
    grey = np.mean([row["baseline_grey_psnr"] for row in outcome.rows])
    mean = np.mean([row["baseline_mean_psnr"] for row in outcome.rows])
    close = int((psnr > 30).sum())
    right = sum(row["label_right"] for row in outcome.rows)
    text = (
        f"{close} of {len(psnr)} samples came back above 30 dB (median {np.median(psnr):.1f} dB), "
        f"{right} labels right. Guesses without the gradient: grey {grey:.1f} dB, mean image "
        f"{mean:.1f} dB. {outcome.seconds:.0f} s."
    )
    return f"Interrupted; the best so far: {text}" if outcome.interrupted else text

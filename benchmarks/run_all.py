"""Every benchmark, one after another, each with its own log and JSON.

    python benchmarks/run_all.py --quick --out runs
    python benchmarks/run_all.py --full --out runs --data-dir DATA

`--quick` runs each at its smallest, from the embedded digits alone; `--full` as `RESULTS.md` has them, those
that read real data only with `--data-dir`. `--only` takes names. What needs PyTorch (the extra `peers`) is
left out where it is not installed. A benchmark that fails does not stop the others; the exit code is then 1.
"""

import argparse
import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import timing

HERE = pathlib.Path(__file__).parent
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


class Run(NamedTuple):
    """A benchmark: its arguments in each mode (`None`: not in it), what it needs, what it writes."""

    script: str
    quick: str | None
    full: str | None
    needs: tuple[str, ...] = ()
    figure: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012 (a constant)


DATA = "--data-dir {data}"
RUNS = {
    "quality-dlg": Run("attack_quality.py", "dlg --images 4 --restarts 2", "dlg"),
    "quality-dlg-cifar10": Run(
        "attack_quality.py", None, f"dlg --dataset cifar10 {DATA}", ("data",)
    ),
    "quality-anchor": Run("attack_quality.py", None, f"anchor {DATA}", ("data",)),
    "quality-peer": Run(
        "attack_quality.py", None, f"peer --images 10 --steps 4800 {DATA}", ("data", "torch")
    ),
    "quality-peer-batch": Run(
        "attack_quality.py", None, f"peer --images 10 --batch-size 8 {DATA}", ("data", "torch")
    ),
    "speed": Run(
        "attack_speed.py",
        "--models lenet --batch-sizes 1 --restarts 1 8 --rounds 3",
        "",
        ("torch",),
    ),
    "per-sample": Run("per_sample_gradients.py", "--models 'mlp(256)' --rounds 3", ""),
    "sweeps": Run(
        "sweep_scaling.py",
        "--models mlp --jobs 8 --steps 50 --rounds 1 --devices 1 2",
        "--jobs 1 8 64 --devices 1 2 4 8",
        environment=EIGHT,
    ),
    "bayes": Run(
        "papers/bayes_framework.py",
        "--images 2 --tuning-images 1 --steps 20 --attacks l2 bayes",
        f"--dataset mnist --images 16 {DATA}",
        ("data",),
    ),
    "federated": Run("papers/federated_rounds.py", "--quick", ""),
    "tabular": Run("papers/tabular_data.py", None, DATA, ("data",)),
    "course": Run(
        "papers/course_of_training.py", "--victims 2 --attack-steps 30", "", figure="--figures"
    ),
    "exclusivity": Run(
        "papers/exclusivity.py",
        "--batches 1 --batch-sizes 2 8 --attacks exclusivity 'row scan' spear",
        "--batches 3 --batch-sizes 2 4 8 16 32 64 96 128 --train-steps 0 300",
        figure="--figure",
    ),
    "exclusivity-mnist": Run(
        "papers/exclusivity.py",
        None,
        "--dataset mnist --widths 512 2048 --batches 2 --batch-sizes 4 16 64 --train-steps 0 300 "
        + DATA,
        ("data",),
    ),
    "exclusivity-cifar10": Run(
        "papers/exclusivity.py",
        None,
        "--dataset cifar10 --widths 1000 --batches 2 --batch-sizes 4 16 64 --train-steps 0 300 "
        + DATA,
        ("data",),
    ),
    "exclusivity-speed": Run(
        "papers/exclusivity.py",
        None,
        "--widths 512 2048 --batches 5 --batch-sizes 2 4 8 "
        "--attacks exclusivity 'row scan' spear dlg 'inverting gradients'",
    ),
    "spear": Run(
        "papers/exclusivity.py",
        "--widths 200 --batches 1 --batch-sizes 10 --attacks spear --spear-limit 10",
        "--widths 200 --batch-sizes 10 12 14 16 --attacks spear --spear-limit 16 --spear-steps 500",
    ),
    "layerwise-index": Run("papers/layerwise.py", "index --images 1", "index", figure="--figure"),
    "layerwise-compare": Run("papers/layerwise.py", None, f"compare {DATA}", ("data",)),
    "layerwise-noise": Run("papers/layerwise.py", None, "noise"),
    "bounds": Run(
        "papers/two_layer_bounds.py",
        "--attacks moments --trials 1 --batches 1",
        "",
        figure="--figure",
    ),
    "optimal": Run("papers/optimal_defenses.py", "--batches 2", ""),
    "tensor": Run(
        "papers/systematic_evaluation.py", "tensor --quick --tables regression", "tensor"
    ),
    "tradeoff-preset": Run("invjax", None, "tradeoff --preset digits"),
    "tradeoff": Run("invjax", None, "tradeoff '{here}/tradeoff_digits_all.toml'"),
    "strong": Run(
        "papers/strong_attack.py",
        "--batches 1 --steps 20 --defenses none",
        "--batches 1 --steps 500",
        figure="--figure",
    ),
    "reconstructor": Run(
        "papers/informed_reconstructor.py",
        "digits --only default --shadows 200 --epochs 3",
        "digits",
    ),
    "reconstructor-mnist": Run(
        "papers/informed_reconstructor.py", None, f"mnist {DATA}", ("data",)
    ),
    "glm": Run("papers/informed_exact.py", "glm --draws 10", "glm"),
    "bounds-dp": Run("papers/informed_exact.py", "bounds --settings 5", "bounds"),
    "privacy": Run(
        "papers/dp_reconstruction.py",
        "--attacks glm --releases 1",
        "--attacks prior glm --trials 200",
        figure="--figure",
    ),
    "privacy-hidden": Run(
        "papers/dp_reconstruction.py",
        None,
        "--attacks hidden weights glm --trials 100",
        figure="--figure",
    ),
    "privacy-mnist": Run(
        "papers/dp_reconstruction.py",
        None,
        f"--dataset mnist --known 199 --trials 100 --attacks prior glm {DATA}",
        ("data",),
        figure="--figure",
    ),
    "privacy-mnist-weights": Run(
        "papers/dp_reconstruction.py",
        None,
        f"--dataset mnist --attacks weights --shadows 400 --targets 50 {DATA}",
        ("data",),
        figure="--figure",
    ),
}


def missing(run: Run, full: bool, data: str | None) -> str:
    """Why a benchmark cannot run here, or nothing."""
    if full and "data" in run.needs and data is None:
        return "needs --data-dir"
    if "torch" in run.needs and importlib.util.find_spec("torch") is None:
        return "needs PyTorch: the extra peers"
    return ""


def command(name: str, run: Run, full: bool, out: pathlib.Path, data: str | None) -> list[str]:
    """What is run."""
    given = (run.full if full else run.quick) or ""
    words = [word.format(data=data, here=HERE) for word in shlex.split(given)]
    if run.script == "invjax":
        return [sys.executable, "-m", "invjax", *words, "--out", str(out / name), "--overwrite"]
    words += ["--json", str(out / f"{name}.json")]
    if run.figure:
        words += [run.figure, str(out / (name if run.figure == "--figures" else f"{name}.png"))]
    return [sys.executable, str(HERE / run.script), *words]


def main() -> None:
    """Run, and say what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--quick", action="store_true", help="minutes, embedded data alone")
    mode.add_argument("--full", action="store_true", help="as in RESULTS.md; many hours on a CPU")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS)
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("invjax-runs/benchmarks"),
        help="folder for logs and JSON (default: %(default)s)",
    )
    parser.add_argument("--data-dir", help="folder of data sets on disk")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.only:
        run = RUNS[name]
        if (run.full if options.full else run.quick) is None:
            continue  # Not in this mode.
        row = {
            "benchmark": name,
            "outcome": missing(run, options.full, options.data_dir),
            "seconds": 0.0,
        }
        if not row["outcome"]:
            words = command(name, run, options.full, options.out, options.data_dir)
            print(shlex.join(words), flush=True)
            started = time.perf_counter()
            with open(options.out / f"{name}.log", "w") as log:
                code = subprocess.run(
                    words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | run.environment
                ).returncode
            row["seconds"] = time.perf_counter() - started
            row["outcome"] = f"failed ({code}): see {log.name}" if code else "done"
        rows.append(row)
    print("\n" + timing.table(rows))
    timing.write(options.out / "summary.json", rows, benchmark="run_all", full=options.full)
    sys.exit(any(row["outcome"].startswith("failed") for row in rows))


if __name__ == "__main__":
    main()

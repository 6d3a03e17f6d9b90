"""The commands, by name."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax

import invjax
from invjax import calls
from invjax.cli import attack, audit, privacy, sweep, tradeoff

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "attack": (attack.attack, "reconstruct private samples from their gradients, and report on it"),
    "sweep": (
        sweep.sweep,
        "attack every combination of data, models, defences and attacks; resumable",
    ),
    "tradeoff": (
        tradeoff.tradeoff,
        "compare defences that cost the same utility, by the strongest attack on each; resumable",
    ),
    "report": (sweep.report, "write the page of a sweep's folder, finished or running"),
    "privacy": (
        privacy.privacy,
        "tell what parameters of DP-SGD mean for the reconstruction of a record",
    ),
    "audit": (audit.audit, "tell from a model's layers whether its gradient gives a sample away"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments; those of the process where `None`.

    Returns:
      The exit code: 0, 1 if writing failed, 2 for bad input, 130 if interrupted; of a sweep or
      a comparison with failures, 10 and their number, 99 at most.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if argv[0] == "--version":
        print(f"invjax {invjax.__version__}, jax {jax.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = calls.nearest(argv[0], COMMANDS)
        text = f"invjax: unknown command {argv[0]!r}: known are {known}.{hint} See invjax --help."
        print(text, file=sys.stderr)
        return 2
    use_compilation_cache()
    return COMMANDS[argv[0]][0](argv[1:])


def overview() -> str:
    """What `invjax --help` prints."""
    lines = [f"  {name:<9} {explained}" for name, (_, explained) in COMMANDS.items()]
    return (
        "usage: invjax COMMAND [options]\n       invjax --version\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n"
        "`invjax attack` alone reconstructs handwritten digits. `invjax COMMAND --help` explains the "
        "options.\n"
    )


def entry() -> None:
    """The console script."""
    sys.exit(main())


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the environment says where already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "invjax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

"""What the commands share: exit codes, and settings from a preset, a file or an earlier run."""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from invjax import calls
from invjax.evaluation import store

Settings = TypeVar("Settings")


def guarded(command: str, work: Callable[[], int], resumable: bool = False) -> int:
    """Do a command's work; what goes wrong becomes a line and an exit code.

    Args:
      command: its name.
      work: what it does; gives the exit code where all goes well.
      resumable: whether it keeps a record, which the lines then say.

    Returns:
      Its own exit code; 1 if writing failed, 2 for bad input, 130 if interrupted.
    """
    try:
        return work()
    except ValueError as error:
        print(f"invjax {command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        stays = "; what was recorded stays: --resume." if resumable else ""
        print(f"invjax {command}: {error}{stays}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = "; go on with --resume" if resumable else ""
        print(f"\nInterrupted{more}.", file=sys.stderr)
        return 130


def failures(command: str, count: int) -> int:
    """The exit code of so many failed jobs: 0 of none, else 10 and their number, 99 at most."""
    if not count:
        return 0
    jobs = "1 job" if count == 1 else f"{count} jobs"
    print(f"invjax {command}: {jobs} failed; the report says why.", file=sys.stderr)
    return 10 + min(count, 89)


def chosen(
    config: Any,
    command: str,
    presets: Mapping[str, Settings],
    from_toml: Callable[[pathlib.Path], Settings],
    recorded: Callable[[pathlib.Path], Settings],
) -> tuple[Settings, pathlib.Path]:
    """Settings and folder, from exactly one of a file, a preset, or an earlier run.

    Args:
      config: the options, `file`, `preset`, `out` and `resume` among them.
      command: its name, of which the folder's is made where none is given.
      presets: settings by name.
      from_toml: reads a file of settings.
      recorded: reads those of a folder.

    Returns:
      Both.

    Raises:
      ValueError: none or two of these, an unknown preset, or settings that cannot be read.
    """
    if config.file is None and config.preset is None and config.resume and config.out is not None:
        return recorded(config.out), config.out
    if (config.file is None) == (config.preset is None):
        raise ValueError(
            f"give a TOML file, or --preset {' or '.join(presets)}, or --resume --out FOLDER of an "
            f"earlier {command}."
        )
    if config.preset is not None:
        if config.preset not in presets:
            hint = calls.nearest(config.preset, presets)
            raise ValueError(
                f"Unknown preset {config.preset!r}: known are {', '.join(presets)}.{hint}"
            )
        settings, name = presets[config.preset], config.preset
    else:
        assert config.file is not None
        settings, name = from_toml(config.file), config.file.stem
    return settings, config.out or pathlib.Path("invjax-runs") / f"{command}-{name}"


def check_new(config: Any, out: pathlib.Path) -> None:
    """Refuse a folder that holds an earlier run, unless it is to go on or to be replaced."""
    if config.resume:
        return
    if (out / "sweep.json").exists() and not config.overwrite:
        raise ValueError(
            f"--out {out}: holds an earlier run; go on with --resume, or replace it with --overwrite."
        )
    store.check_folder(out, config.overwrite)

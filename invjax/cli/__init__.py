"""The command line: a module a command, and `main`, which chooses among them."""

from invjax.cli.attack import AttackConfig as AttackConfig
from invjax.cli.attack import command as command
from invjax.cli.attack import default_folder as default_folder
from invjax.cli.attack import prepare as prepare
from invjax.cli.main import entry as entry
from invjax.cli.main import main as main

__all__ = ["AttackConfig", "command", "default_folder", "entry", "main", "prepare"]

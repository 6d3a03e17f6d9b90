"""`python -m invjax` is the `invjax` command."""

from invjax.cli import entry

entry()

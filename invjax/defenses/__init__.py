"""Defences: optax gradient transformations that also know their own channel.

`chain` composes them; every family has a file of its own. What an adversary may compute of a
defence is its `law`.
"""

from invjax.defenses.base import chain as chain

__all__ = ["chain"]

"""Attacks: estimators of the private batch from an observation.

`matching` holds gradient matching and its presets, `labels` the recovery of labels alone. Every
attack is an `invjax.base.Attack`: pure, `jit`- and `vmap`-able.
"""

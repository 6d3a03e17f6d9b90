"""Automatic transformation search (ATS): images are transformed before their gradient is taken."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from invjax.base import Array, Bound, Defense
from invjax.checks import check_count, check_number, describe
from invjax.defenses.base import from_stages, on_inputs
from invjax.defenses.operations import (
    GREY,
    Operation,
    from_levels,
    operations,
    to_levels,
)
from invjax.ranges import check_range

FILL = GREY / 255
"""What shears and translations bring in: grey, as in AutoAugment."""

SubPolicy = tuple[int, ...]
Policy = tuple[SubPolicy, ...]

POOL: tuple[tuple[str, int], ...] = (
    ("invert", 7),
    ("contrast", 6),
    ("rotate", 2),
    ("translateX", 9),
    ("sharpness", 1),
    ("sharpness", 3),
    ("shearY", 2),
    ("translateY", 2),
    ("autocontrast", 5),
    ("equalize", 2),
    ("shearY", 5),  # 10
    ("posterize", 5),
    ("color", 3),
    ("brightness", 5),
    ("sharpness", 9),
    ("brightness", 9),
    ("equalize", 5),
    ("equalize", 1),
    ("contrast", 7),
    ("sharpness", 5),
    ("color", 5),  # 20
    ("translateX", 5),
    ("equalize", 7),
    ("autocontrast", 8),
    ("translateY", 3),
    ("sharpness", 6),
    ("brightness", 6),
    ("color", 8),
    ("solarize", 0),
    ("invert", 0),
    ("equalize", 0),  # 30
    ("autocontrast", 0),
    ("equalize", 8),
    ("equalize", 4),
    ("color", 5),
    ("equalize", 5),
    ("autocontrast", 4),
    ("solarize", 4),
    ("brightness", 3),
    ("color", 0),
    ("solarize", 1),  # 40
    ("autocontrast", 0),
    ("translateY", 3),
    ("translateY", 3),
    ("autocontrast", 1),
    ("solarize", 1),
    ("equalize", 5),
    ("invert", 0),
    ("translateY", 3),
    ("autocontrast", 1),
)
"""Operation and magnitude index of every transformation, in the order that policies count in."""


def parse_policy(text: str) -> Policy:
    """A policy from text: `3-1-7` is one sub-policy of three transformations, `3-1-7+43-18-18` two.

    Args:
      text: indices into `POOL`, `-` within a sub-policy and `+` between them; the empty text is the
        policy without transformations.

    Returns:
      A tuple of indices for every sub-policy.

    Raises:
      ValueError: text that is not that, or an index out of the pool.
    """
    if not isinstance(text, str):
        raise ValueError(f"A policy must be text such as '3-1-7+43-18-18', got {text!r}.")
    if not text.strip():
        return ((),)
    return tuple(
        tuple(_index(part, text) for part in sub_policy.split("-"))
        for sub_policy in text.split("+")
    )


def _index(part: str, text: str) -> int:
    part = part.strip()
    if not (part.isascii() and part.isdigit()):
        raise ValueError(
            f"The policy {text!r} must be indices joined by '-' and '+', such as '3-1-7+43-18-18': "
            f"{part!r} is none."
        )
    if int(part) >= len(POOL):
        raise ValueError(
            f"The policy {text!r} names transformation {part}; there are 0 to {len(POOL) - 1}."
        )
    return int(part)


def policy_text(indices: Sequence[int] | Array) -> str:
    """A sub-policy as `ats` takes it.

    Args:
      indices: `[T]` indices into `POOL`; -1 is no transformation.

    Returns:
      The indices but for -1, joined by `-`.
    """
    return "-".join(str(int(index)) for index in indices if int(index) >= 0)


def augment(
    key: Array,
    inputs: Array,
    policy: Policy | Array,
    *,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
    crop_padding: int = 4,
    flip: bool = True,
    fill: float = FILL,
) -> Array:
    """Crop, flip and transform every image on its own.

    Args:
      key: PRNG key; every image has draws of its own.
      inputs: `[B, H, W, C]`, of 1 or 3 channels.
      policy: from `parse_policy`; or one sub-policy as `[T]` integers, which may be traced, -1 being
        no transformation.
      input_range: as in `ats`.
      crop_padding: as in `ats`.
      flip: as in `ats`.
      fill: as in `ats`.

    Returns:
      The images, rounded to 8 bits in the input range.

    Raises:
      ValueError: inputs that are not such images.
    """
    if inputs.ndim != 4 or inputs.shape[-1] not in (1, 3):
        raise ValueError(
            f"ATS transforms images [B, H, W, C] of 1 or 3 channels, got shape {inputs.shape}."
        )
    known = operations(jnp.round(255 * jnp.asarray(fill)).astype(jnp.int32))
    policies = policy if isinstance(policy, tuple) else (policy,)
    choices = [functools.partial(_transform, known, sub_policy) for sub_policy in policies]
    size, *shape = inputs.shape
    longest = max(len(sub_policy) for sub_policy in policies)
    crop_key, flip_key, choice_key, sign_key = jax.random.split(key, 4)
    offsets = jax.random.randint(crop_key, (size, 2), 0, 2 * crop_padding + 1)
    flipped = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (size,))
    chosen = jax.random.randint(choice_key, (size,), 0, len(choices))
    signs = jax.random.bernoulli(sign_key, shape=(size, longest)).astype(jnp.int32)
    sides = ((crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0))

    def one(image, offset, flipped, choice, signs):
        image = jax.lax.dynamic_slice(jnp.pad(image, sides), (*offset, 0), shape)
        image = jnp.where(flipped, image[:, ::-1], image)
        return jax.lax.switch(choice, choices, signs, image)

    levels = to_levels(inputs, input_range)
    levels = jax.vmap(one)(levels, offsets, flipped, chosen, signs)
    return from_levels(levels, input_range, inputs.dtype)


def _transform(
    known: dict[str, Operation], sub_policy: SubPolicy | Array, signs: Array, image: Array
) -> Array:
    if isinstance(sub_policy, tuple):
        # A hybrid's signs are as many as its longest sub-policy has transformations.
        for index, sign in zip(sub_policy, signs, strict=False):
            name, magnitude = POOL[index]
            image = known[name](sign, image, magnitude)
        return image

    def step(image, position):
        index, sign = position
        return _traced(known, index, sign, image), None

    # One by one in a loop, which compiles the operations once.
    return jax.lax.scan(step, image, (sub_policy, signs))[0]


def _traced(known: dict[str, Operation], index: Array, sign: Array, image: Array) -> Array:
    """The operation at an index into the pool that is not known yet; -1 is none."""
    names = list(known)
    branch = jnp.array([1 + names.index(name) for name, _ in POOL])[index]
    magnitude = jnp.array([magnitude for _, magnitude in POOL])[index]
    branches = [lambda sign, image, magnitude: image, *known.values()]
    return jax.lax.switch(jnp.where(index < 0, 0, branch), branches, sign, image, magnitude)


def ats(
    policy: str,
    input_range: tuple[Bound, Bound] = (0.0, 1.0),
    crop_padding: int = 4,
    flip: bool = True,
    fill: float = FILL,
) -> Defense:
    """Transform the images before their gradient is taken (ATS; Gao et al. 2021).

    A random crop, a horizontal flip, then the transformations of the policy one after another, each
    of them always; of several sub-policies every image draws one. Images are rounded to 8 bits
    first, as the published search works on 8-bit images. On images of 255 pixels or fewer
    equalisation does nothing, as in Pillow.

    What it does not stop: the gradient is that of the transformed image `T(x)`, and gradient matching
    recovers `T(x)` as well as any image (Balunovic et al. 2022). Safe is at most what `T` destroyed:
    report the PSNR against `T(x)` (`invjax.observe.prepared_batch`) and against `x`.

    Departures: what shears and translations bring in is grey where the released code has black
    (`fill=0.0`), and shears take the nearest pixel where it interpolates. The first matters to the
    search: see `invjax.defenses.policy_search.search_policies`.

    Args:
      policy: indices into `POOL`, as `parse_policy` reads them: `3-1-7`, or `21-13-3+7-4-15`; empty
        for crop and flip alone.
      input_range: lowest and highest value of an input, each one number or one per channel.
      crop_padding: pixels of padding (of the lowest value) for the random crop; 0 for none.
      flip: whether half of the images are flipped from left to right.
      fill: what shears and translations bring in, 0 to 1 in the input range.

    Returns:
      The defence.

    Raises:
      ValueError: a policy that cannot be read, a setting out of range; and, when it meets them,
        inputs that are not images of 1 or 3 channels.
    """
    parsed = parse_policy(policy)
    check_range(input_range)
    check_count("crop_padding", crop_padding, 0)
    check_number("fill", fill, 0.0, 1.0)
    settings = {
        name: value
        for name, value, default in (
            ("input_range", input_range, (0.0, 1.0)),
            ("crop_padding", crop_padding, 4),
            ("flip", flip, True),
            ("fill", fill, FILL),
        )
        if isinstance(value, jax.Array) or value != default
    }

    # Compiled, so that an observation outside a jit does not run it operation by operation.
    transformed = jax.jit(
        functools.partial(
            augment,
            policy=parsed,
            input_range=input_range,
            crop_padding=crop_padding,
            flip=flip,
            fill=fill,
        )
    )

    def transform(key, batch):
        return batch._replace(inputs=transformed(key, batch.inputs))

    return from_stages(on_inputs(describe("ats", policy, **settings), transform))

"""Figures as PNG bytes."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LIMIT = 16
"""Samples shown at most."""


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file.

    Args:
      figure: of matplotlib.

    Returns:
      The file's bytes.
    """
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def comparison(
    truth: np.ndarray,
    reconstruction: np.ndarray,
    captions: list[str],
    input_range: tuple[float, float],
) -> bytes:
    """Truth above, reconstruction below, a column a sample.

    Args:
      truth: `[N, H, W, C]` images, or `[N, d]` vectors (drawn as curves).
      reconstruction: likewise.
      captions: under every reconstruction.
      input_range: what is drawn black and white.

    Returns:
      A PNG file.
    """
    number = min(len(truth), LIMIT)
    columns = min(number, 8)
    blocks = -(-number // columns)
    figure = Figure(figsize=(1.15 * columns + 0.9, 2.75 * blocks), dpi=130, layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index in range(number):
        block, column = divmod(index, columns)
        for row, sample in ((2 * block, truth[index]), (2 * block + 1, reconstruction[index])):
            axis = axes[row, column]
            axis.set_axis_on()
            axis.set_xticks([])
            axis.set_yticks([])
            _draw(axis, sample, input_range)
            if column == 0:
                axis.set_ylabel("truth" if row % 2 == 0 else "reconstructed", fontsize=9)
        axes[2 * block + 1, column].set_xlabel(captions[index], fontsize=8)
    return png(figure)


def _draw(axis, sample: np.ndarray, input_range: tuple[float, float]) -> None:
    low, high = input_range
    if sample.ndim != 3:
        axis.plot(sample.reshape(-1), linewidth=0.8)
        return
    image = np.clip((np.nan_to_num(sample) - low) / (high - low), 0, 1)
    if image.shape[-1] == 3:
        axis.imshow(image, interpolation="nearest")
    else:
        axis.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def objective_curves(trace: np.ndarray) -> bytes:
    """Best objective against the step, a line a victim.

    Args:
      trace: `[N, T]`.

    Returns:
      A PNG file.
    """
    figure = Figure(figsize=(6.5, 3.4), dpi=130, layout="constrained")
    axis = figure.subplots()
    for victim, values in enumerate(trace[:LIMIT]):
        axis.plot(values, linewidth=1.1, label=f"victim {victim}")
    finite = trace[np.isfinite(trace)]
    if finite.size and finite.min() > 0:
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("objective, best restart so far")
    axis.grid(alpha=0.25)
    if 0 < len(trace) <= 10:
        axis.legend(fontsize=7, ncols=2)
    return png(figure)

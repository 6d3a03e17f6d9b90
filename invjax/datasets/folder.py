"""Folders of images."""

import pathlib

import numpy as np

from invjax.datasets.files import list_folder
from invjax.datasets.types import Dataset, DatasetError, from_arrays

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def image_folder(
    path: str | pathlib.Path, size: int | tuple[int, int] | None = None, name: str | None = None
) -> Dataset:
    """A folder of images: one subfolder a class, or, without such, all of one class.

    Classes and images go by name; other files and hidden ones are passed over.

    Args:
      path: the folder.
      size: height and width (one number for both) to which images are cropped, centred, and
        resized; all images must be of one size where `None`.
      name: for tables; the folder's name where `None`.

    Returns:
      The data set in [0, 1]: one channel where every image is grey, else RGB.

    Raises:
      ValueError: a size below 1.
      DatasetError: no such folder, no images, an unreadable image, different sizes.
    """
    path = pathlib.Path(path)
    size = (size, size) if isinstance(size, int) else size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both at least 1, got {size}.")
    classes = _classes(path)
    if not classes:
        raise DatasetError(f"{path}: holds no images ({', '.join(SUFFIXES)}).")
    images, labels = [], []
    for label, files in enumerate(classes.values()):
        for file in files:
            images.append(_image(file, size))
            labels.append(label)
            if images[-1].shape[:2] != images[0].shape[:2]:
                raise DatasetError(
                    f"{file}: is {images[-1].shape[:2]} pixels, the first image "
                    f"{images[0].shape[:2]}; give size= to crop and resize."
                )
    channels = max(image.shape[-1] for image in images)
    images = [np.broadcast_to(image, image.shape[:2] + (channels,)) for image in images]
    names = tuple(folder.name for folder in classes)
    name = path.resolve().name if name is None else name
    return from_arrays(name, np.stack(images), np.asarray(labels), names, source=path)


def _classes(path: pathlib.Path) -> dict[pathlib.Path, list[pathlib.Path]]:
    """The images of every subfolder that has some; of the folder itself where none has."""

    def images(folder: pathlib.Path) -> list[pathlib.Path]:
        return [file for file in list_folder(folder) if file.suffix.lower() in SUFFIXES]

    folders = {child: images(child) for child in list_folder(path) if child.is_dir()}
    folders = {folder: files for folder, files in folders.items() if files}
    if folders:
        return folders
    files = images(path)
    return {path: files} if files else {}


def _image(file: pathlib.Path, size: tuple[int, int] | None) -> np.ndarray:
    """One image as `[H, W, 1]` or `[H, W, 3]` bytes."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if opened.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {opened.mode}, not bytes")
            mode = "L" if opened.mode in ("1", "L", "LA") else "RGB"
            image = ImageOps.exif_transpose(opened).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{file}: cannot be read as an image: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels

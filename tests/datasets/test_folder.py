"""Folders of images: classes, modes, sizes, and damage."""

import numpy as np
import pytest
from PIL import Image
from written import check, pixels

from invjax import datasets
from invjax.datasets import DatasetError


def save_image(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(raw).save(path)


def test_image_folder_has_a_class_a_subfolder(tmp_path):
    raw = pixels(3, 4, 5, 3)
    for name, image in zip(["dog/b.png", "cat/x.PNG", "dog/a.bmp"], raw, strict=True):
        save_image(tmp_path / name, image)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    dataset = datasets.image_folder(tmp_path)
    check(dataset, raw[[1, 2, 0]], [0, 1, 1])
    assert dataset.class_names == ("cat", "dog")
    assert dataset.name == tmp_path.name


def test_a_flat_folder_is_one_class_and_grey_stays_grey(tmp_path):
    raw = pixels(2, 4, 5)
    save_image(tmp_path / "0.png", raw[0])
    save_image(tmp_path / "1.png", np.dstack([raw[1], pixels(4, 5)]))  # With an alpha channel.
    dataset = datasets.image_folder(str(tmp_path), name="mine")
    check(dataset, raw[..., None], [0, 0])
    assert (dataset.name, dataset.num_classes) == ("mine", 1)


def test_grey_among_color_becomes_color(tmp_path):
    grey, color = pixels(4, 4), pixels(4, 4, 3)
    save_image(tmp_path / "a.png", grey)
    save_image(tmp_path / "b.png", color)
    save_image(tmp_path / "c.png", np.dstack([color, pixels(4, 4)]))
    expected = np.stack([np.repeat(grey[..., None], 3, axis=2), color, color])
    check(datasets.image_folder(tmp_path), expected, [0, 0, 0])


@pytest.mark.parametrize(("size", "shape"), [(4, (4, 4)), ((6, 3), (6, 3))])
def test_size_crops_the_center_and_resizes(tmp_path, size, shape):
    # White in the middle, black at the sides that a centred square crop cuts off.
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 7:17] = 255
    save_image(tmp_path / "wide.png", wide)
    save_image(tmp_path / "square.png", np.full((8, 8, 3), 255, np.uint8))
    dataset = datasets.image_folder(tmp_path, size)
    assert dataset.input_shape == (*shape, 3)
    np.testing.assert_array_equal(dataset.inputs, np.ones_like(dataset.inputs))


def test_images_stand_as_their_camera_was_held(tmp_path):
    image = Image.fromarray(pixels(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert datasets.image_folder(tmp_path).input_shape == (6, 4, 3)


def test_different_sizes_are_refused(tmp_path):
    save_image(tmp_path / "a.png", pixels(4, 4))
    save_image(tmp_path / "b.png", pixels(4, 5))
    with pytest.raises(
        DatasetError, match=r"b.png: is \(4, 5\).* first image \(4, 4\); give size="
    ):
        datasets.image_folder(tmp_path)


def test_unreadable_images_are_refused(tmp_path):
    save_image(tmp_path / "a.png", pixels(16, 16, 3))
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(DatasetError, match=r"b.png: cannot be read as an image"):
            datasets.image_folder(tmp_path)
    save_image(tmp_path / "b.png", np.full((16, 16), 60000, np.uint16))
    with pytest.raises(DatasetError, match=r"b.png: .*mode I;16, not bytes"):
        datasets.image_folder(tmp_path)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no images"):
        datasets.image_folder(tmp_path)
    with pytest.raises(DatasetError, match="nowhere: not a folder that can be read"):
        datasets.image_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, (4, 0), (4, 4, 3)])
def test_sizes_that_are_none_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        datasets.image_folder(tmp_path, size)

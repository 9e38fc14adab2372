"""Image folders: which pixels come out, which labels belong to them, and what is said about files that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from pyvit_accel.images import ImageFolder, read_image, read_labels


def pixels(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def folder_of(root, *names, size=16):
    for name in names:
        save(root / name, pixels(size, size))
    return root


@pytest.mark.parametrize("height, width, top, left", [(16, 16, 0, 0), (18, 18, 1, 1), (17, 30, 0, 7), (40, 16, 12, 0)])
def test_crops_only_what_was_prepared(tmp_path, height, width, top, left):
    array = pixels(height, width)
    image, enlarged = read_image(save(tmp_path / "a.png", array), 16, 3)
    assert (image.dtype, enlarged) == (torch.uint8, False) and image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0), array[top : top + 16, left : left + 16])


@pytest.mark.parametrize("height, width, enlarged", [(32, 32, False), (20, 50, False), (8, 8, True), (1, 1, True)])
def test_resizes_then_crops(tmp_path, height, width, enlarged):
    array = pixels(height, width)
    image, was_enlarged = read_image(save(tmp_path / "a.png", array), 16, 3)
    scaled = (16 * width // height, 16)
    expected = np.array(Image.fromarray(array).resize(scaled, Image.Resampling.BICUBIC))
    left = (scaled[0] - 16) // 2
    assert was_enlarged == enlarged
    assert np.array_equal(image.permute(1, 2, 0), expected[:, left : left + 16])


def test_wide_images_do_not_grow_while_resized(tmp_path):
    image, _ = read_image(save(tmp_path / "a.png", pixels(2, 50_000)), 64, 3)
    assert image.shape == (3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_modes(tmp_path, mode):
    path = save(tmp_path / "a.png", pixels(16, 16), mode)
    for channels, target in ((1, "L"), (3, "RGB")):
        expected = np.array(Image.open(path).convert(target)).reshape(16, 16, channels)
        assert np.array_equal(read_image(path, 16, channels)[0].permute(1, 2, 0), expected)


def test_batches(tmp_path):
    folder = ImageFolder.open(folder_of(tmp_path, "a.png", "b.png", "c.jpg", "d.bmp", "e.png"))
    read = list(folder.batches(16, 3, 2))
    assert [(x.shape, x.dtype) for x, _ in read] == [((n, 3, 16, 16), torch.uint8) for n in (2, 2, 1)]
    assert [labels for _, labels in read] == [None] * 3
    assert (folder.skipped, folder.enlarged) == ({}, 0)


def test_names_and_skips_what_is_no_image(tmp_path):
    folder_of(tmp_path, "a.png", "b.jpg", "z.png", size=64)
    (tmp_path / "notes.txt").write_text("not pixels")
    (tmp_path / ".hidden").write_text("not pixels")
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:-200])
    save(tmp_path / "deep.png", np.full((16, 16), 40_000, np.uint16))
    folder = ImageFolder.open(tmp_path)
    assert folder.skipped == {"notes.txt": "not an image", "empty.png": "not an image"}
    images = torch.cat([x for x, _ in folder.batches(16, 3, 8)])
    assert len(images) == 2
    assert set(folder.skipped) == {"notes.txt", "empty.png", "b.jpg", "deep.png"}
    assert "truncated" in folder.skipped["b.jpg"] and "not 8-bit" in folder.skipped["deep.png"]


def test_sample_is_spread_and_disjoint(tmp_path):
    folder = ImageFolder.open(folder_of(tmp_path, *(f"{i}.png" for i in range(10))))
    chosen, rest = folder.sample(4)
    assert [path.name for path in chosen.paths] == ["0.png", "2.png", "5.png", "7.png"]
    assert sorted(chosen.paths + rest.paths) == folder.paths
    assert [len(part) for part in folder.sample(99)] == [10, 0]


LABELS = {"a.png": 3, "b.png": 0}
ENTRIES = [{"file": name, "label": label, "more": 1} for name, label in LABELS.items()]
FORMS = {
    "labels.json": [LABELS, ENTRIES, {"photos": ENTRIES, "others": []}],
    "labels.csv": ["a.png,3\nb.png,0\n", "file,label\r\na.png, 3\r\nb.png,0\r\n\r\n", "\ufeffa.png,3\nb.png,0"],
}


@pytest.mark.parametrize("name, form", [(name, form) for name, forms in FORMS.items() for form in forms])
def test_label_files(tmp_path, name, form):
    root = folder_of(tmp_path / "photos", "a.png", "b.png")
    path = root / name  # beside the images: it is not a file that is skipped
    path.write_text(form if isinstance(form, str) else json.dumps(form), encoding="utf-8")
    assert read_labels(path, "photos") == LABELS
    folder = ImageFolder.open(root, path, num_classes=4)
    assert (folder.labels, folder.skipped) == ([3, 0], {})
    assert [labels.tolist() for _, labels in folder.batches(16, 3, 8)] == [[3, 0]]


@pytest.mark.parametrize("name, text, message", [
    ("l.json", "{", "is not JSON"),
    ("l.json", "[1, 2]", "has another form; expected"),
    ("l.json", "{}", "holds no label"),
    ("l.json", '{"a.png": "cat"}', "'a.png' has label 'cat'; expected a file name and a class index"),
    ("l.json", '{"a.png": true}', "'a.png' has label True"),
    ("l.json", '{"val": [{"file": "a.png", "label": 1}]}', "has labels for 'val', but not for folder 'photos'"),
    ("l.csv", "a.png,1\na.png,2", "a.png has two labels, 1 and 2"),
    ("l.csv", "a.png,1\nb.png", "line 2: 'b.png' is not file,class"),
    ("l.csv", "a.png,-1", "line 1: 'a.png,-1' is not file,class"),
    ("l.csv", "other.png,1", "no label for 2 images of .*, the first is a.png; it names files like other.png"),
    ("l.csv", "a.png,1", "no label for 1 images of .*, the first is b.png$"),
    ("l.csv", "a.png,1\nb.png,4", "b.png has label 4, but the model has 4 classes, 0 to 3"),
])  # fmt: skip
def test_labels_that_do_not_fit(tmp_path, name, text, message):
    root = folder_of(tmp_path / "photos", "a.png", "b.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        ImageFolder.open(root, tmp_path / name, num_classes=4)


def test_class_folders(tmp_path):
    folder = ImageFolder.open(folder_of(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png", "eel/x/1.png"), num_classes=3)
    assert [path.relative_to(tmp_path).as_posix() for path in folder.paths] == [
        "cat/1.png", "cat/2.png", "dog/1.png", "eel/x/1.png",
    ]
    assert folder.labels == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="has 3 class folders but the model has 10 classes"):
        ImageFolder.open(tmp_path, num_classes=10)


def test_numbered_class_folders(tmp_path):
    folder = ImageFolder.open(folder_of(tmp_path, "10/a.png", "2/a.png"), num_classes=11)
    assert sorted(folder.labels) == [2, 10]
    with pytest.raises(ValueError, match="has label 10, but the model has 5 classes"):
        ImageFolder.open(tmp_path, num_classes=5)


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="is not a folder of images"):
        ImageFolder.open(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no image$"):
        ImageFolder.open(tmp_path)
    (tmp_path / "notes.txt").write_text("not pixels")
    with pytest.raises(ValueError, match=r"holds no image; 1 other files, like notes\.txt"):
        ImageFolder.open(tmp_path)


def test_nothing_to_read(tmp_path):
    save(tmp_path / "deep.png", np.full((16, 16), 40_000, np.uint16))
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first is deep\.png: its pixels are not 8"):
        list(ImageFolder.open(tmp_path).batches(16, 3, 8))
    with pytest.raises(ValueError, match=r"takes 4 channels; image files give 1 \(grey\) or 3"):
        list(ImageFolder.open(tmp_path).batches(16, 4, 8))

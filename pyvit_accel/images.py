"""Folders of image files as uint8 batches.

A folder holds images; their labels come from a file (read_labels), or from class folders: when the folder itself holds
no image, every subfolder is a class, its index the name when all names are numbers, else its place in sorted order.

Geometry: the central square, scaled to image_size (bicubic). That is "resize the short side, then crop the centre",
except that an image whose short side is 1 to 1.15 times image_size is only cropped: it was prepared for this size.
EXIF orientation is ignored, as the pipelines that train these models do.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyvit_accel.output import require

CROP_ONLY = 1.15
LABEL_FORMS = "{file: class}, [{file, label}, ...], {folder: [{file, label}, ...]}, or CSV lines file,class"


@dataclass
class ImageFolder:
    """Image files, their labels when they have any, and what reading them said.

    skipped   why each file that is not a readable image was left out, by name; open fills it, and batches
    enlarged  how many images read so far were smaller than the model's
    """

    root: Path
    paths: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)
    labels: list[int] | None = None
    enlarged: int = 0

    @classmethod
    def open(cls, root: str | Path, labels: str | Path | None = None, num_classes: int | None = None) -> ImageFolder:
        """List a folder; nothing is decoded yet. Without labels and class folders the images are unlabelled.

        Raises ValueError for a folder that is missing or empty, an image without a label, or a label that is no class.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder of images")
        if labels is not None:
            folder = _labelled_by_file(root, Path(labels))
        else:
            folder = cls(root, *_images(root, root))
            if not folder.paths:
                folder = _labelled_by_folders(folder, num_classes)
        if not folder.paths:
            others = f"; {len(folder.skipped)} other files, like {next(iter(folder.skipped))}" if folder.skipped else ""
            raise ValueError(f"{root} holds no image{others}")
        for path, label in zip(folder.paths, folder.labels or [], strict=False):
            if num_classes and not 0 <= label < num_classes:
                raise ValueError(
                    f"{path.name} has label {label}, but the model has {num_classes} classes, 0 to {num_classes - 1}; "
                    "labels are class indices"
                )
        return folder

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Iterable[int]) -> ImageFolder:
        index = list(index)
        labels = None if self.labels is None else [self.labels[i] for i in index]
        return ImageFolder(self.root, [self.paths[i] for i in index], labels=labels)

    def sample(self, count: int) -> tuple[ImageFolder, ImageFolder]:
        """`count` images evenly spaced over the folder, and the others."""
        chosen = {i * len(self) // count for i in range(count)} if count < len(self) else set(range(len(self)))
        return self.subset(sorted(chosen)), self.subset(i for i in range(len(self)) if i not in chosen)

    def batches(self, image_size: int, channels: int, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(pixels (B, channels, image_size, image_size) uint8, labels (B,) int64 or None); skips what cannot be read.

        Raises ValueError when channels is not what image files can give, or not one file is readable.
        """
        if channels not in (1, 3):
            raise ValueError(f"the model takes {channels} channels; image files give 1 (grey) or 3 (RGB)")
        pixels, labels, found = [], [], False
        for i, path in enumerate(self.paths):
            try:
                image, enlarged = read_image(path, image_size, channels)
            except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
                self.skipped[_name(path, self.root)] = " ".join(str(error).split()) or type(error).__name__
                continue
            found = True
            self.enlarged += enlarged
            pixels.append(image)
            labels.append(-1 if self.labels is None else self.labels[i])
            if len(pixels) == size:
                yield self._batch(pixels, labels)
                pixels, labels = [], []
        if pixels:
            yield self._batch(pixels, labels)
        if not found:
            name, reason = next(iter(self.skipped.items()))
            raise ValueError(f"{self.root}: none of {len(self)} images can be read; the first is {name}: {reason}")

    def _batch(self, pixels: list[Tensor], labels: list[int]) -> tuple[Tensor, Tensor | None]:
        return torch.stack(pixels), None if self.labels is None else torch.tensor(labels)


def read_image(path: str | Path, image_size: int, channels: int) -> tuple[Tensor, bool]:
    """(pixels (channels, image_size, image_size) uint8, whether the image had to be enlarged)."""
    Image = require("PIL.Image")
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # Pillow would clip these to 255, silently
            raise ValueError(f"its pixels are not 8-bit (mode {image.mode}); convert it first")
        image = image.convert("L" if channels == 1 else "RGB")
    short = min(image.size)
    side = image_size if image_size <= short <= CROP_ONLY * image_size else short
    left, top = (round((length - side) / 2) for length in image.size)
    box = (left, top, left + side, top + side)
    if side == image_size:
        image = image.crop(box)
    else:
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(image)).reshape(image_size, image_size, channels)
    return pixels.permute(2, 0, 1).contiguous(), short < image_size


def read_labels(path: str | Path, folder: str) -> dict[str, int]:
    """Class index by file name, from any of LABEL_FORMS; folder picks the list where a file has one per folder."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file of labels")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; expected {LABEL_FORMS}") from None
    pairs = _json_pairs(path, text, folder) if path.suffix == ".json" else _csv_pairs(path, text)
    labels: dict[str, int] = {}
    for name, label in pairs:
        if not isinstance(name, str) or not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"{path}: {name!r} has label {label!r}; expected a file name and a class index")
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{path}: {name} has two labels, {labels[name]} and {label}")
    if not labels:
        raise ValueError(f"{path} holds no label; expected {LABEL_FORMS}")
    return labels


def _json_pairs(path: Path, text: str, folder: str) -> list[tuple]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if folder not in value:
            raise ValueError(f"{path} has labels for {', '.join(map(repr, value))}, but not for folder {folder!r}")
        value = value[folder]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(entry, dict) and {"file", "label"} <= set(entry) for entry in value):
        return [(entry["file"], entry["label"]) for entry in value]
    raise ValueError(f"{path} has another form; expected {LABEL_FORMS}")


def _csv_pairs(path: Path, text: str) -> list[tuple]:
    pairs = []
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        row = [cell.strip() for cell in row]
        if not any(row) or (number == 1 and row[1:2] in (["label"], ["class"])):
            continue
        if len(row) != 2 or not row[1].isdecimal():
            raise ValueError(f"{path}, line {number}: {','.join(row)!r} is not file,class; expected {LABEL_FORMS}")
        pairs.append((row[0], int(row[1])))
    return pairs


def _labelled_by_file(root: Path, labels: Path) -> ImageFolder:
    by_name = read_labels(labels, root.resolve().name)
    paths, skipped = _images(root, root, recursive=True)
    if labels.resolve().is_relative_to(root.resolve()):
        skipped.pop(_name(labels.resolve(), root.resolve()), None)
    names = [_name(path, root) for path in paths]
    found = [by_name.get(name, by_name.get(path.name)) for name, path in zip(names, paths, strict=True)]
    missing = [name for name, label in zip(names, found, strict=True) if label is None]
    if missing:
        known = f"; it names files like {next(iter(by_name))}" if len(missing) == len(names) else ""
        raise ValueError(f"{labels} has no label for {len(missing)} images of {root}, the first is {missing[0]}{known}")
    return ImageFolder(root, paths, skipped, found)


def _labelled_by_folders(folder: ImageFolder, num_classes: int | None) -> ImageFolder:
    root, skipped = folder.root, dict(folder.skipped)
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    numbered = all(path.name.isdecimal() for path in classes)
    if classes and not numbered and num_classes and len(classes) != num_classes:
        raise ValueError(
            f"{root} has {len(classes)} class folders but the model has {num_classes} classes, so which is which is "
            "unknown; name the folders by class index (0, 1, ...), or pass a file of labels"
        )
    paths, labels = [], []
    for place, path in enumerate(classes):
        found, others = _images(path, root, recursive=True)
        paths += found
        labels += [int(path.name) if numbered else place] * len(found)
        skipped |= others
    return ImageFolder(root, paths, skipped, labels)


def _images(folder: Path, root: Path, recursive: bool = False) -> tuple[list[Path], dict[str, str]]:
    """The files Pillow knows the format of (only their first bytes are read), and the others, without hidden ones."""
    Image = require("PIL.Image")
    paths, skipped = [], {}
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            Image.open(path).close()
        except Exception as error:  # as in batches
            unknown = type(error).__name__ == "UnidentifiedImageError"
            skipped[_name(path, root)] = "not an image" if unknown else " ".join(str(error).split())
        else:
            paths.append(path)
    return paths, skipped


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()

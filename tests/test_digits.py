"""The digits model that ships with the package."""

from __future__ import annotations

import sys

import pytest
import torch

from pyvit_accel.models.digits import DIGITS_CONFIG, digits_data, digits_model


def test_recognises_the_held_out_third():
    pytest.importorskip("sklearn")
    images, labels = digits_data("test")
    model = digits_model()
    with torch.inference_mode():
        logits = model(images)
    assert (logits.shape, logits.dtype) == ((599, 10), torch.float32)
    assert (logits.argmax(1) == labels).double().mean() > 0.97


def test_data():
    pytest.importorskip("sklearn")
    parts = {split: digits_data(split) for split in ("train", "test")}
    for (images, labels), n in zip(parts.values(), (1198, 599), strict=True):
        assert (images.shape, images.dtype) == ((n, 1, 32, 32), torch.uint8)
        assert (labels.shape, labels.dtype) == ((n,), torch.int64)
        assert (int(images.min()), int(images.max()), int(labels.min()), int(labels.max())) == (0, 255, 0, 9)
        assert torch.equal(images[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), images)
    train, test = ({image.numpy().tobytes() for image in parts[split][0]} for split in ("train", "test"))
    assert not train & test
    assert torch.equal(digits_data("test")[0], parts["test"][0])


def test_model_is_what_was_trained():
    model = digits_model()
    assert model.config == DIGITS_CONFIG
    assert not model.training
    assert all(torch.equal(x, x.half().float()) for x in model.state_dict().values())


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="split='val'; use 'train' or 'test'"):
        digits_data("val")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'run pip install "pyvit_accel\[cli\]"'):
        digits_data()

"""save and load: the same bits again, and a message of its own for everything that is not such a file."""

from __future__ import annotations

import copy
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _vits import VARIANTS, pixels, spread, vit
from safetensors.torch import save_file
from torch import nn

from pyvit_accel import Recipe, accelerate, files, load, recipes, save, serialize
from pyvit_accel.models import save_weights

STATIC = recipes.integer(8, 8, granularity="tensor")
RECIPES = {**recipes.RECIPES, "static": STATIC}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def saved(path, recipe=recipes.W8A8_DYNAMIC, **options):
    images = pixels(channels=options.get("in_channels", 3))
    model, _ = accelerate(vit(**options), recipe, [images])
    save(model, path)
    return model, images


def rewrite_header(path, change):
    """Change the JSON that save wrote, in place."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["pyvit_accel"])
    change(ours)
    header["__metadata__"]["pyvit_accel"] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@torch.inference_mode()
@every_recipe
@pytest.mark.parametrize("variant", VARIANTS)
def test_our_vit_round_trip(variant, recipe, path):
    model, images = saved(path, recipe, **VARIANTS[variant])
    loaded = load(path)
    assert torch.equal(loaded(images), model(images))
    assert not any(module.training for module in loaded.modules())
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    assert loaded.config == model.config and str(loaded) == str(model)
    again = path.with_name("again")
    save(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    path.unlink()  # the loaded model does not live on the file
    assert torch.equal(loaded(images), model(images))


@torch.inference_mode()
def test_bfloat16_round_trip(path):
    model, _ = accelerate(vit().bfloat16(), recipes.W8A8, [pixels()])
    save(model, path)
    y = load(path)(pixels())
    assert y.dtype == torch.bfloat16 and torch.equal(y, model(pixels()))


def test_size(path):
    model, _ = saved(path, recipes.W8A8_DYNAMIC, dim=256, num_heads=4)
    weights = sum(p.numel() for p in model.state_dict().values() if p.dtype == torch.uint8)
    assert weights < path.stat().st_size < 1.2 * weights


def test_two_calls_of_accelerate(path):
    head = Recipe("W8A16 head", (replace(recipes.W8A16.rules[0], match="head"),))
    model, _ = accelerate(vit(), head)
    model, _ = accelerate(model, recipes.W8A8_DYNAMIC)
    save(model, path)
    loaded = load(path)
    assert torch.equal(loaded(pixels()), model(pixels()))
    assert loaded.pyvit_accel["recipe"] == "W8A16 head + W8A8_DYNAMIC"


class Foreign(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.first = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.bias = self.first.bias
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.tied(self.first(self.attention(x, x, x, need_weights=False)[0])))


def foreign(path):
    model, x = spread(Foreign()), torch.randn(2, 5, 32)
    new, _ = accelerate(model, recipes.W8A8, [x])
    save(new, path)
    return model, new, x


@torch.inference_mode()
def test_foreign_round_trip(path):
    _, new, x = foreign(path)
    with pytest.raises(ValueError, match=r"holds a .*Foreign; pass the float model, load\(path, model=\.\.\.\)"):
        load(path)
    loaded = load(path, model=spread(Foreign()))
    assert torch.equal(loaded(x), new(x)) and str(loaded) == str(new)
    with pytest.raises(ValueError, match="attention, but a MultiheadSelfAttention cannot be replaced; pass the float"):
        load(path, model=loaded)
    with pytest.raises(ValueError, match=r"the tensors of .* do not fit Foreign"):
        load(path, model=Foreign(width=64))
    with pytest.raises(ValueError, match="replaces attention, which Sequential does not have"):
        load(path, model=nn.Sequential(nn.Linear(8, 8)))


@torch.inference_mode()
def test_a_layer_that_was_the_model(path):
    linear = spread(nn.Linear(16, 8))
    model, _ = accelerate(linear, recipes.W8A8_DYNAMIC)
    save(model, path)
    assert torch.equal(load(path, model=nn.Linear(16, 8))(torch.ones(2, 16)), model(torch.ones(2, 16)))


def test_tied_and_strided_tensors(path):
    model, new, x = foreign(path)
    model.first.weight.data = model.first.weight.data.T
    model.tied.weight = model.first.weight
    attention_only = replace(recipes.W8A8, rules=recipes.W8A8.rules[:2])
    new, _ = accelerate(model, attention_only, [x])
    save(new, path)
    loaded = load(path, model=copy.deepcopy(model))
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in new.state_dict().items())


def refusal(path, **arguments):
    with pytest.raises(ValueError) as error:
        load(path, **arguments)
    text = str(error.value)
    assert text.startswith(f"load: {path} ") and "\n" not in text
    return text.removeprefix(f"load: {path} ")


def test_refuses_other_files(path, tmp_path):
    assert refusal(path) == "does not exist"
    path.touch()
    assert refusal(path) == "is empty (0 bytes); save the model again"
    path.write_text("not a model at all, but long enough to be one")
    assert "is truncated or not a safetensors file" in refusal(path)
    save_file({"weight": torch.zeros(3)}, path)
    assert "is a safetensors file, but not one save wrote; for float weights use load_weights" in refusal(path)
    save_weights(vit(), path)
    assert "is a safetensors file, but not one save wrote" in refusal(path)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_pickles_unopened(path, tmp_path, zipped):
    trapped = {"weight": torch.zeros(3), "trap": Trap(tmp_path / "sprung")}
    torch.save(trapped, path, _use_new_zipfile_serialization=zipped)
    assert refusal(path).startswith("is a pickle (torch.save), which can run code when opened and is never read here")
    torch.save(vit().state_dict(), path, _use_new_zipfile_serialization=zipped, pickle_protocol=4)
    assert refusal(path).startswith("is a pickle")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("length", [int.from_bytes(start, "little") for start in (b"PK", b"\x80\x02", b"\x80\x05")])
def test_a_header_whose_length_looks_like_a_pickle(path, length):
    saved(path, dim=32, depth=1)
    data = path.read_bytes()
    (old,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + old])
    if length < old:  # drop the tensors, keep the start
        header = {"__metadata__": {"other": "x"}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length) + text.ljust(length) + (b"" if length < old else data[8 + old :]))
    if length < old:
        assert "not one save wrote" in refusal(path)
    else:
        assert torch.isfinite(load(path)(pixels())).all()


@pytest.mark.parametrize("part", [0.999, 0.5, 0.01])
def test_refuses_a_truncated_file(path, part):
    saved(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert "is truncated or not a safetensors file" in refusal(path)


def test_refuses_what_a_later_release_wrote(path):
    saved(path)
    rewrite_header(path, lambda header: header.update(version=3))
    assert refusal(path) == (
        "has format version 3, this release reads 2; upgrade pyvit_accel, or save the model again with this release"
    )
    saved(path)
    rewrite_header(path, lambda header: header["modules"][1].update({"class": "QuantTurboBlock"}))
    assert refusal(path) == "needs a module QuantTurboBlock, which this release does not have; upgrade pyvit_accel"


def test_load_runs_no_pickle(path, monkeypatch):
    model, images = saved(path)

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    for module, name in (("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    assert torch.equal(load(path)(images), model(images))
    for source in (Path(module.__file__).read_text() for module in (serialize, files)):
        assert "import pickle" not in source and "torch.load" not in source and "torch.save(" not in source


def test_save_refuses(tmp_path, path):
    with pytest.raises(ValueError, match=r"save: VisionTransformer was not accelerated; pass what accelerate"):
        save(vit(), path)
    model, _ = accelerate(vit(), recipes.W8A8_DYNAMIC)
    with pytest.raises(ValueError, match="is a directory; name a file in it"):
        save(model, tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist; create it first"):
        save(model, tmp_path / "nowhere" / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_save_refuses_what_it_may_not_write(tmp_path, path):
    model, _ = accelerate(vit(), recipes.W8A8_DYNAMIC)
    path.touch(0o444)
    with pytest.raises(ValueError, match="is not writable; choose another place"):
        save(model, path)
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match="is not writable; choose another place"):
        save(model, tmp_path / "other")
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("step", ["save_file", "replace"])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_what_was_there(path, monkeypatch, step, error):
    model, _ = saved(path)
    before = path.read_bytes()

    def fail(tensors, target, *rest):
        if step == "save_file":
            Path(target).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(files if step == "save_file" else os, step, fail)
    with pytest.raises(type(error)):
        save(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    save(model, path)
    assert load(path).state_dict().keys() == model.state_dict().keys()
    assert path.stat().st_mode & 0o777 == 0o644

"""VisionTransformer against timm, on real weights, and what it says about bad images, configurations and files."""

from __future__ import annotations

import json
import os
import struct
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from _torchvision_stub import import_timm
from safetensors.torch import load_file, save_file

from pyvit_accel.models.vit import ARCHITECTURES, ViTConfig, create_vit
from pyvit_accel.models.weights import infer_config, load_weights, read_config, read_weights, save_weights

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 64, "depth": 2, "num_heads": 2}
DINOV2 = {"dim": 128, "depth": 2, "num_heads": 2, "image_size": 70, "num_classes": 7}

# our architecture, our overrides, timm's architecture, timm's overrides
TIMM_PAIRS = {
    "vit_tiny": ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224", {}),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {}, "deit_tiny_distilled_patch16_224", {}),
    "dinov2_reg4": (
        "vit_small_patch14_reg4_dinov2", {"image_size": 98, "num_classes": 10},
        "vit_small_patch14_reg4_dinov2", {"img_size": 98, "num_classes": 10},
    ),
    "qk_norm, layer scale, average": (
        "vit_tiny_patch16_224", {"image_size": 64, "qk_norm": True, "layer_scale": True, "pool": "avg"},
        "vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True, "init_values": 0.1, "global_pool": "avg"},
    ),
    "gray, no qkv bias, no embedded class": (
        "vit_tiny_patch16_224",
        {"in_channels": 1, "mean": (0.5,), "std": (0.5,), "qkv_bias": False, "no_embed_class": True},
        "vit_tiny_patch16_224", {"in_chans": 1, "qkv_bias": False, "no_embed_class": True},
    ),
}


def small_vit(**overrides):
    torch.manual_seed(0)
    return create_vit("vit_tiny_patch16_224", **(SMALL | overrides)).eval()


def randomize(model):
    """Every parameter random, so that no bias, gamma or norm weight hides behind its 0 or 1."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def save_torch(path, value):
    torch.save(value, path)
    return path


@pytest.mark.parametrize("pair", TIMM_PAIRS)
def test_equals_timm(pair):
    ours, overrides, theirs, timm_overrides = TIMM_PAIRS[pair]
    truth = randomize(import_timm().create_model(theirs, pretrained=False, **timm_overrides))
    model = create_vit(ours, **overrides).eval()
    model.load_state_dict(truth.state_dict())
    config = model.config
    images = torch.randn(2, config.in_channels, config.image_size, config.image_size)
    with torch.inference_mode():
        # The same operations in the same order: nothing to tolerate.
        assert torch.equal(model.forward_features(images), truth.forward_features(images))
        assert torch.equal(model(images), truth(images))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_timm_names_and_pixels(name):
    timm = import_timm()
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in create_vit(name).state_dict().items()}
        truth = timm.create_model(name, pretrained=False, num_classes=ARCHITECTURES[name].num_classes)
    assert shapes == {key: x.shape for key, x in truth.state_dict().items()}
    pixels = timm.get_pretrained_cfg(name)
    assert (ARCHITECTURES[name].mean, ARCHITECTURES[name].std) == (pixels.mean, pixels.std)
    assert truth.blocks[0].attn.num_heads == ARCHITECTURES[name].num_heads


@pytest.mark.parametrize("name, prediction", [("vit_tiny", "pred_vit"), ("deit_tiny", "pred_deit")])
def test_real_weights_give_the_recorded_predictions(name, prediction):
    if "PYVIT_ACCEL_DATA" not in os.environ:
        pytest.skip("PYVIT_ACCEL_DATA is not set: no real weights and images")
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    data = Path(os.environ["PYVIT_ACCEL_DATA"])
    records = json.loads((data / "labels.json").read_text())["imagenet_val_227"][:32]
    crops = [image.open(data / "imagenet_val_227" / record["file"]).convert("RGB").crop((2, 2, 226, 226))
             for record in records]
    pixels = torch.stack([torch.from_numpy(numpy.array(crop)).permute(2, 0, 1) for crop in crops])
    model = load_weights(f"{name}_patch16_224", data / "weights" / f"{name}_patch16_224.fp16.safetensors").eval()
    with torch.inference_mode():
        assert model(pixels).argmax(1).tolist() == [record[prediction] for record in records]


@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_pixels_equal_normalised_floats(in_channels):
    mean, std = (0.1, 0.5, 0.4, 0.2)[:in_channels], (0.2, 0.3, 0.25, 1.5)[:in_channels]
    model = randomize(small_vit(in_channels=in_channels, mean=mean, std=std))
    pixels = torch.randint(256, (3, in_channels, 32, 32), dtype=torch.uint8)
    floats = (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.equal(model(pixels), model(floats))
    assert model.double()(pixels).dtype == torch.float64


def test_empty_batch_and_strided_images():
    model = small_vit()
    assert model(torch.empty(0, 3, 32, 32)).shape == (0, 5)
    images = torch.randn(2, 32, 32, 3).permute(0, 3, 1, 2)
    bound = 64 * torch.finfo(torch.float32).eps  # convolutions sum in another order; logits of this model are below 1
    assert (model(images) - model(images.contiguous())).abs().max() <= bound


def test_replaced_patch_embed_sees_the_pixels():
    class Recorder(torch.nn.Module):
        def forward(self, images):
            self.dtype = images.dtype
            return torch.zeros(images.shape[0], 16, 64)

    model = small_vit()
    model.patch_embed = Recorder()
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 5)
    assert model.patch_embed.dtype == torch.uint8


def test_compiles_without_graph_breaks():
    model, images = small_vit(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("shape, message", [
    ((3, 32, 32), r"\(3, 32, 32\), expected \(B, 3, 32, 32\); add the batch dimension with images\[None\]"),
    ((32, 32), "pass a batch of images"),
    ((2, 1, 32, 32), "1 channels instead of 3; convert the images, or build the model with in_channels=1"),
    ((2, 32, 32, 3), r"use images.permute\(0, 3, 1, 2\)"),
    ((2, 3, 32, 40), r"\(2, 3, 32, 40\), expected \(B, 3, 32, 32\); resize or crop the images to 32 x 32"),
])
def test_rejects_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        small_vit()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_rejects_dtypes(dtype):
    with pytest.raises(TypeError, match=f"images are {dtype}, expected torch.uint8 pixels or normalised torch.float32"):
        small_vit()(torch.zeros(2, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize("overrides, message", [
    ({"image_size": 227}, "image_size=227 is not a multiple of patch_size=16; use image_size=224 or 240"),
    ({"dim": 100}, "dim=100 is not a multiple of num_heads=3"),
    ({"depth": 0}, "depth=0; expected a positive integer"),
    ({"pool": "max"}, "pool='max'; use 'token' or 'avg'"),
    ({"activation": "relu"}, "activation='relu'; use one of"),
    ({"distilled": True, "pool": "avg"}, "a distilled model has no registers and pool='token'"),
    ({"in_channels": 1}, "mean has 3 values and std 3 but in_channels=1; pass one mean and one std per channel"),
    ({"heads": 3}, "unknown key 'heads'; the known keys are image_size"),
])
def test_rejects_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_vit("vit_tiny_patch16_224", **overrides)


def test_config_round_trip_and_unknown_names():
    for config in ARCHITECTURES.values():
        assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown key 'heads'"):
        ViTConfig.from_dict({"heads": 3})
    with pytest.raises(ValueError, match="did you mean 'vit_tiny_patch16_224'"):
        create_vit("vit_tiny_patch16_225")


@pytest.mark.parametrize("overrides", [
    {}, {"image_size": 64, "qkv_bias": False}, {"qk_norm": True, "pool": "avg", "num_heads": 4}, {"distilled": True},
    {"num_registers": 4, "layer_scale": True, "no_embed_class": True}, {"num_classes": 0, "mlp_ratio": 3.0},
    {"in_channels": 1, "mean": (0.5,), "std": (0.5,)},
])
def test_infers_config(overrides):
    model = small_vit(**overrides)
    heads = {} if model.config.qk_norm else {"num_heads": model.config.num_heads}
    assert infer_config(model.state_dict(), **heads) == model.config


def test_infer_config_assumes_heads_of_64_and_names_what_is_missing():
    state_dict = small_vit(dim=128).state_dict()
    assert infer_config(state_dict).num_heads == 2
    with pytest.raises(ValueError, match="dim=96 is not a multiple of head size 64; pass num_heads"):
        infer_config(small_vit(dim=96).state_dict())
    with pytest.raises(ValueError, match="pos_embed has 19 entries, which is no square grid"):
        infer_config(state_dict | {"pos_embed": torch.zeros(1, 19, 128)})
    del state_dict["cls_token"]
    with pytest.raises(ValueError, match="cls_token is missing"):
        infer_config(state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_round_trip(tmp_path, dtype):
    model, path = randomize(small_vit(num_registers=1)), tmp_path / "vit.safetensors"
    save_weights(model, path, dtype)
    assert read_config(path) == model.config
    loaded = load_weights(small_vit(num_registers=1), path)
    for name, x in loaded.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, model.state_dict()[name].to(dtype).float())
    assert all(x.dtype == dtype for x in load_file(path).values())


def test_saves_whole_or_not_at_all(tmp_path, monkeypatch):
    model, path = small_vit(), tmp_path / "vit.safetensors"
    save_weights(model, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            save_weights(randomize(model), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="is a directory; name a file in it"):
        save_weights(model, tmp_path)
    with pytest.raises(ValueError, match=r"dtype=torch\.int8; expected one of torch\.float16"):
        save_weights(model, path, torch.int8)


def test_reads_what_safetensors_writes(tmp_path):
    model = randomize(small_vit())
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    state_dict = read_weights(tmp_path / "vit.safetensors")
    assert all(torch.equal(x, state_dict[name]) for name, x in model.state_dict().items())
    assert read_config(tmp_path / "vit.safetensors") is None


@pytest.mark.parametrize("wrap", [
    lambda sd: sd, lambda sd: {"model": sd, "args": Namespace(lr=0.1)}, lambda sd: {"state_dict": sd, "epoch": 3},
    lambda sd: {f"module.{name}": x for name, x in sd.items()},
    lambda sd: {"model": {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): x
                          for name, x in sd.items()}},
], ids=["plain", "DeiT", "state_dict", "DataParallel", "DeiT III"])
def test_reads_torch_checkpoints(tmp_path, wrap):
    model = randomize(small_vit(layer_scale=True))
    loaded = load_weights(small_vit(layer_scale=True), save_torch(tmp_path / "vit.pth", wrap(model.state_dict())))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_reads_original_dinov2_checkpoints(tmp_path):
    timm = import_timm()
    from timm.models.vision_transformer import checkpoint_filter_fn

    overrides = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 70, "num_classes": 7}
    truth = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, **overrides).eval()
    original = dict(randomize(truth).state_dict())
    original["register_tokens"] = original.pop("reg_token")
    original["pos_embed"] = torch.randn(1, 26, 128)
    original["mask_token"] = torch.zeros(1, 128)
    model = create_vit("vit_small_patch14_reg4_dinov2", **DINOV2)
    load_weights(model, save_torch(tmp_path / "dinov2.pth", original))
    truth.load_state_dict(checkpoint_filter_fn(original, truth))
    images = torch.randn(2, 3, 70, 70)
    assert torch.equal(model(images), truth(images))


def delete_key(sd):
    del sd["norm.weight"]


def add_key(sd):
    sd["norm_pre.weight"] = torch.zeros(64)


def transpose(sd):
    sd["blocks.1.mlp.fc1.weight"] = sd["blocks.1.mlp.fc1.weight"].T.contiguous()


def make_nan(sd):
    sd["blocks.1.attn.proj.bias"][3] = float("nan")


def make_infinite(sd):
    sd["head.weight"] = sd["head.weight"].double() + 1e300


def make_int8(sd):
    sd["head.weight"] = sd["head.weight"].to(torch.int8)


@pytest.mark.parametrize("damage, message", [
    (delete_key, r"1 missing \(norm.weight\)"),
    (add_key, r"1 unexpected \(norm_pre.weight\)"),
    (transpose, r"blocks.1.mlp.fc1.weight has shape \(64, 256\), expected \(256, 64\) \(transposed: use .T\)$"),
    (make_nan, r"NaN or infinite weights in .*: blocks.1.attn.proj.bias \(1 of 64\)"),
    (make_infinite, r"NaN or infinite weights in .*: head.weight \(320 of 320\)"),
    (make_int8, "head.weight is torch.int8; expected floating point weights"),
])
def test_rejects_state_dicts_and_leaves_the_model(tmp_path, damage, message):
    model = small_vit()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state_dict = {name: x.clone() for name, x in randomize(small_vit()).state_dict().items()}
    damage(state_dict)
    with pytest.raises(ValueError, match=message):
        load_weights(model, save_torch(tmp_path / "vit.pth", state_dict))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("overrides, message", [
    ({"num_classes": 10}, r"head.weight has shape \(10, 64\), expected \(5, 64\).*built with num_classes=10$"),
    ({"image_size": 64}, "the file fits a model built with image_size=64$"),
    ({"depth": 3}, r"12 unexpected \(blocks.2.attn.proj.bias, .* and 8 more\); .* built with depth=3$"),
    ({"num_registers": 2, "layer_scale": True}, "built with layer_scale=True, num_registers=2$"),
])
def test_says_which_model_a_file_fits(tmp_path, overrides, message):
    save_weights(small_vit(**overrides), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(small_vit(), tmp_path / "vit.safetensors")


def good_bytes(tmp_path):
    save_weights(small_vit(), tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def with_header(header, data=b"\0" * 64):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("content, message", [
    (lambda good: b"", r"is empty \(0 bytes\)"),
    (lambda good: good[:-1], r"is truncated or damaged \(.*not fully covered\); copy or download it again"),
    (lambda good: good[:100], r"is truncated or damaged \(.*invalid header length\); copy"),
    (lambda good: good[:5], "is not a safetensors file"),
    (lambda good: b"version https://git-lfs.github.com/spec/v1", "is not a safetensors file"),
    (lambda good: b"PK\3\4" + bytes(60), "looks like a torch checkpoint; rename it to .pth"),
    (lambda good: good[:8] + b"{" * (len(good) - 8), r"is truncated or damaged \(.*invalid JSON"),
    (lambda good: with_header({}, b""), "holds no tensors"),
    (lambda good: with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9]}}), "damaged.*invalid shape"),
    (lambda good: with_header({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}}), "damaged .*`-4`"),
    (lambda good: with_header({"a": {"dtype": "F32"}}), "damaged .*missing field `shape`"),
    (lambda good: with_header({"a": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}), "truncated or"),
    (lambda good: with_header({"a": {"dtype": "I3", "shape": [4], "data_offsets": [0, 4]}}), "unknown variant `I3`"),
    # A header of 19280 bytes: the file begins as a zip file does, but it is none.
    (lambda good: b"PK" + bytes(6) + b"{" * 19280, "is truncated or damaged"),
])
def test_rejects_safetensors_files(tmp_path, content, message):
    path = tmp_path / "vit.safetensors"
    path.write_bytes(content(good_bytes(tmp_path)))
    with pytest.raises(ValueError, match=message):
        load_weights(small_vit(), path)


def test_rejects_torch_files(tmp_path):
    model, path = small_vit(), save_torch(tmp_path / "vit.pth", small_vit().state_dict())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read by torch\.load"):
            load_weights(model, path)
    with pytest.raises(ValueError, match=r"save model\.state_dict\(\) alone"):
        load_weights(model, save_torch(path, model))
    for value in ([1, 2], {}, {"epoch": 3}):
        with pytest.raises(ValueError, match="holds no state dict"):
            load_weights(model, save_torch(path, value))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_weights(model, tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"ends in '\.npz'; expected \.safetensors"):
        load_weights(model, path.rename(tmp_path / "vit.npz"))
    with pytest.raises(ValueError, match="unknown architecture 'vit'"):
        load_weights("vit", path)

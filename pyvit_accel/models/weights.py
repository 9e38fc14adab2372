"""Reading weights into a VisionTransformer: everything is verified before the model is touched.

Reads .safetensors, and .pth/.pt/.bin through torch.load(weights_only=True). Knows the names of timm, of the original
DeiT and DeiT III checkpoints and of the original DINOv2 ones.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from pyvit_accel.files import check_writable, read_metadata, read_tensors, write_safetensors
from pyvit_accel.models.vit import VisionTransformer, ViTConfig, architecture

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDISPENSABLE = (
    "patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight",
)
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
UNREADABLE = {
    "empty": "load_weights: {path} is empty (0 bytes); copy or download it again",
    "pickle": "load_weights: {path} is not a safetensors file but looks like a torch checkpoint; rename it to .pth",
    "foreign": "load_weights: {path} is not a safetensors file ({error})",
    "damaged": "load_weights: {path} is truncated or damaged ({error}); copy or download it again",
}


def load_weights(model_or_name: VisionTransformer | str, path: str | Path) -> VisionTransformer:
    """Put the weights of a file into a model, or into a new model of a named architecture; returns the model.

    Raises ValueError, and leaves the model as it was, on missing or unexpected keys, a wrong shape, a dtype that is not
    a float, NaN or infinite weights, or a file that cannot be read.
    """
    config = architecture(model_or_name) if isinstance(model_or_name, str) else None
    state_dict = read_weights(path)
    model = model_or_name if config is None else VisionTransformer(config)
    _verify(model, state_dict, path)
    model.load_state_dict(state_dict)
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, with timm's names and float32 weights."""
    path = _existing(path)
    if path.suffix == ".safetensors":
        state_dict = read_tensors(path, UNREADABLE)
    elif path.suffix in TORCH_SUFFIXES:
        state_dict = _read_torch(path)
    else:
        raise ValueError(
            f"load_weights: {path} ends in {path.suffix!r}; expected .safetensors or one of {', '.join(TORCH_SUFFIXES)}"
        )
    if not state_dict:
        raise ValueError(f"load_weights: {path} holds no tensors")
    return _timm_names({name: x.float() if x.dtype in FLOATS else x for name, x in state_dict.items()})


def read_config(path: str | Path) -> ViTConfig | None:
    """The ViTConfig that save_weights wrote beside the weights, or None when the file has none."""
    path = _existing(path)
    if path.suffix != ".safetensors":
        return None
    metadata = read_metadata(path, UNREADABLE)
    return ViTConfig.from_dict(json.loads(metadata["config"])) if "config" in metadata else None


def save_weights(model: VisionTransformer, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a .safetensors file with the weights in dtype and the ViTConfig as metadata, whole or not at all.

    Raises ValueError for a dtype load_weights does not read, or a path that cannot be written.
    """
    if dtype not in FLOATS:
        raise ValueError(f"save_weights: dtype={dtype}; expected one of {', '.join(map(str, FLOATS))}")
    path = check_writable(path)
    tensors = {name: x.to("cpu", dtype) for name, x in model.state_dict().items()}
    write_safetensors(path, tensors, {"config": json.dumps(model.config.to_dict())})


def infer_config(state_dict: dict[str, Tensor], **overrides) -> ViTConfig:
    """The ViTConfig of a state dict with timm's names, read off its shapes; overrides win.

    Shapes do not show num_heads (dim // 64 is assumed unless q_norm shows the head size; ViT-H has 16 heads of 80),
    activation, mean and std: pass those as overrides where the defaults of ViTConfig are wrong.
    """
    for name in INDISPENSABLE:
        if name not in state_dict:
            raise ValueError(f"infer_config: {name} is missing; this is not a plain ViT with a class token and an MLP")
    for name, ndim in (("patch_embed.proj.weight", 4), ("pos_embed", 3)):
        if state_dict[name].ndim != ndim:
            shape = tuple(state_dict[name].shape)
            raise ValueError(f"infer_config: {name} has shape {shape}, expected {ndim} dimensions")
    dim, in_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    q_norm = state_dict.get("blocks.0.attn.q_norm.weight")
    head_dim = 64 if q_norm is None else len(q_norm)
    num_heads = overrides.get("num_heads") or dim // head_dim
    if num_heads * head_dim != dim and "num_heads" not in overrides:
        raise ValueError(f"infer_config: dim={dim} is not a multiple of head size {head_dim}; pass num_heads")
    num_registers = state_dict["reg_token"].shape[1] if "reg_token" in state_dict else 0
    distilled = "dist_token" in state_dict
    inferred = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_classes": state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        "dim": dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state_dict if re.match(r"blocks\.\d+\.", name)),
        "num_heads": num_heads,
        "mlp_ratio": state_dict["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "layer_scale": "blocks.0.ls1.gamma" in state_dict,
        "num_registers": num_registers,
        "distilled": distilled,
        "qk_norm": q_norm is not None,
        "pool": "avg" if "fc_norm.weight" in state_dict else "token",
    }
    if in_channels != 3:
        inferred |= {"mean": (0.5,) * in_channels, "std": (0.5,) * in_channels}
    embedded, prefix = state_dict["pos_embed"].shape[1], 1 + num_registers + distilled
    inferred |= _infer_grid(embedded, prefix, patch_size, overrides.get("no_embed_class"))
    return replace(ViTConfig(**inferred), **overrides)


def _infer_grid(embedded: int, prefix: int, patch_size: int, no_embed_class: bool | None) -> dict:
    """image_size and no_embed_class from the length of pos_embed, on a square grid."""
    for skipped in (False, True) if no_embed_class is None else (no_embed_class,):
        patches = embedded - (0 if skipped else prefix)
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return {"image_size": math.isqrt(patches) * patch_size, "no_embed_class": skipped}
    raise ValueError(
        f"infer_config: pos_embed has {embedded} entries, which is no square grid of patches, "
        f"with or without {prefix} prefix tokens"
    )


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: {path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(UNREADABLE["empty"].format(path=path))
    return path


def _timm_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name.removeprefix("module.")) for name in state_dict}
    renamed = {names[name]: x for name, x in state_dict.items()}
    renamed.pop("mask_token", None)  # DINOv2: only used in training
    if "register_tokens" in renamed and renamed.keys() >= {"cls_token", "pos_embed"}:
        # DINOv2 embeds the position of the class token but not of the registers; timm adds it into the class token.
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _verify(model: VisionTransformer, state_dict: dict[str, Tensor], path: str | Path) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    if missing or unexpected:
        found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in
                 (("missing", missing), ("unexpected", unexpected)) if names]
        raise ValueError(f"load_weights: keys in {path}: {', '.join(found)}{_advice(model, state_dict)}")
    wrong = []
    for name, x in state_dict.items():
        came, want = tuple(x.shape), tuple(expected[name].shape)
        if came != want:
            transposed = " (transposed: use .T)" if x.ndim == 2 and came == want[::-1] else ""
            wrong.append(f"{name} has shape {came}, expected {want}{transposed}")
    if wrong:
        raise ValueError(f"load_weights: shapes in {path}: {_some(wrong)}{_advice(model, state_dict)}")
    integers = [f"{name} is {x.dtype}" for name, x in state_dict.items() if x.dtype != torch.float32]
    if integers:
        raise ValueError(f"load_weights: {path}: {_some(integers)}; expected floating point weights")
    broken = [f"{name} ({int((~x.isfinite()).sum())} of {x.numel()})" for name, x in state_dict.items()
              if not x.isfinite().all()]
    if broken:
        raise ValueError(f"load_weights: NaN or infinite weights in {path}: {_some(broken)}; use another checkpoint")


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _advice(model: VisionTransformer, state_dict: dict[str, Tensor]) -> str:
    """How to build the model that this file fits exactly; empty when a plain ViT of other sizes is not the reason."""
    if not isinstance(model, VisionTransformer):
        return ""
    try:
        inferred = infer_config(state_dict, **({} if "blocks.0.attn.q_norm.weight" in state_dict else {"num_heads": 1}))
        with torch.device("meta"):
            fitting = VisionTransformer(inferred).state_dict()
    except ValueError:
        return ""
    if {name: x.shape for name, x in fitting.items()} != {name: x.shape for name, x in state_dict.items()}:
        return ""
    unseen = ("num_heads", "activation", "norm_eps", "mean", "std")
    values = {field.name: getattr(inferred, field.name) for field in fields(ViTConfig) if field.name not in unseen}
    differs = [f"{name}={value!r}" for name, value in values.items() if value != getattr(model.config, name)]
    return f"; the file fits a model built with {', '.join(differs)}" if differs else ""


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's own training script saves its arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        raise ValueError(
            f"load_weights: {path} cannot be read by torch.load(weights_only=True): it is truncated, not a torch "
            f"checkpoint, or holds other objects than tensors; save model.state_dict() alone. "
            f"({(str(error).splitlines() or [''])[0]})"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
            break
    named_tensors = isinstance(checkpoint, dict) and all(isinstance(x, Tensor) for x in checkpoint.values())
    if not named_tensors or not checkpoint:
        raise ValueError(
            f"load_weights: {path} holds no state dict; expected tensors by name, or such a dict under 'model' "
            "or 'state_dict'"
        )
    return dict(checkpoint)

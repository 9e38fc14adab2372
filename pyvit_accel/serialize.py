"""save and load: an accelerated model in one safetensors file, no pickle anywhere.

The tensors are the model's state dict. The metadata has "pyvit_accel", a JSON object:

    version       1
    recipe        its name
    architecture  {"vit": the fields of ViTConfig} for our VisionTransformer, else {"class": dotted class name}
    modules       how each replaced module is rebuilt: name, path, class, config, adapter table
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pyvit_accel import adapters, modules
from pyvit_accel.models.vit import VisionTransformer, ViTConfig

FORMAT_VERSION = 1
CLASSES = {
    name: getattr(modules, name)
    for name in ("QuantAttention", "QuantBlock", "QuantLinear", "QuantMlp", "QuantPatchEmbed", "WeightOnlyLinear")
}
TABLES = {name: getattr(adapters, name) for name in ("ATTENTIONS", "BLOCKS", "MLPS", "PATCH_EMBEDS")}


def check_writable(path: str | Path) -> Path:
    """Raise ValueError unless a file can be written at path: before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} does not exist; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} is not writable; choose another place or change its permissions")
    return path


def save(model: nn.Module, path: str | Path) -> None:
    """Write an accelerated model; the file appears whole or not at all.

    Raises ValueError when the model did not come from accelerate or load, or path cannot be written.
    """
    made = getattr(model, "pyvit_accel", None)
    if made is None:
        raise ValueError(f"save: {type(model).__name__} was not accelerated; pass what accelerate(model, recipe) returned")
    path = check_writable(path)
    if isinstance(model, VisionTransformer):
        architecture = {"vit": model.config.to_dict()}
    else:
        architecture = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    header = {"version": FORMAT_VERSION, "architecture": architecture, **made}
    tensors, seen = {}, set()
    for name, t in model.state_dict().items():
        t = t.detach().contiguous()
        shared = t.numel() and t.data_ptr() in seen  # safetensors refuses two names for one storage
        seen.add(t.data_ptr())
        tensors[name] = t.clone() if shared else t
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, {"pyvit_accel": json.dumps(header)})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_header(path: str | Path) -> dict:
    """The metadata of a saved file. Raises ValueError, each with its reason, for anything load cannot read."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load: {path} does not exist")
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise ValueError(f"load: {path} is empty (0 bytes); save the model again")
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError(
            f"load: {path} is a pickle (torch.save), which can run code when opened and is never read here; "
            "load float weights with load_weights, then accelerate and save"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"load: {path} is truncated or not a safetensors file ({error}); copy or save it again") from None
    if "pyvit_accel" not in metadata:
        raise ValueError(
            f"load: {path} is a safetensors file, but not one save wrote; for float weights use load_weights, then accelerate"
        )
    header = json.loads(metadata["pyvit_accel"])
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"load: {path} has format version {header.get('version')}, this release reads {FORMAT_VERSION}; "
            "upgrade pyvit_accel, or save the model again with this release"
        )
    return header


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The accelerated model in a file that save wrote, in eval mode.

    model  the float model it was made from, for models that are not ours (timm, transformers, ...): its modules are
           replaced and its tensors overwritten in place. Ours is built from the file alone.

    Raises ValueError for a file that cannot be read, or a model that does not fit it.
    """
    header = read_header(path)
    architecture = header["architecture"]
    if model is None:
        if "vit" not in architecture:
            raise ValueError(f"load: {path} holds a {architecture['class']}; pass the float model, load(path, model=...)")
        with torch.device("meta"):
            model = VisionTransformer(ViTConfig.from_dict(architecture["vit"]))
    for spec in header["modules"]:
        model = _rebuild(model, spec, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - aligned, and free of the file
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"load: the tensors of {path} do not fit {type(model).__name__}: {error}") from None
    model.pyvit_accel = {"recipe": header["recipe"], "modules": header["modules"]}
    return model.requires_grad_(False).eval()


def _rebuild(model: nn.Module, spec: dict, path: str | Path) -> nn.Module:
    """Put the module that a record describes, its buffers still blank, where it stood."""
    target = ".".join(part for part in (spec["name"], spec["path"]) if part)
    cls = CLASSES.get(spec["class"])
    if cls is None:
        raise ValueError(f"load: {path} needs a module {spec['class']}, which this release does not have; upgrade pyvit_accel")
    new = cls.from_config(spec["config"]) if hasattr(cls, "from_config") else cls(**spec["config"])
    try:
        original, matched = model.get_submodule(target), model.get_submodule(spec["name"])
    except AttributeError:
        raise ValueError(f"load: {path} replaces {target}, which {type(model).__name__} does not have") from None
    if spec["adapter"]:
        adapter = adapters.find(TABLES[spec["adapter"]], matched)
        if adapter is None:
            raise ValueError(
                f"load: {path} replaces {target}, but a {type(matched).__name__} cannot be replaced; "
                "pass the float model, not an accelerated one"
            )
        new = adapter.wrap(new, original)
    if not target:
        return new
    model.set_submodule(target, new)
    return model

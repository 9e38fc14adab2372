"""save and load: an accelerated model in one safetensors file, no pickle anywhere.

The tensors are the model's state dict. The metadata has "pyvit_accel", a JSON object:

    version       2
    recipe        its name
    architecture  {"vit": the fields of ViTConfig} for our VisionTransformer, else {"class": dotted class name}
    modules       how each replaced module is rebuilt: name, path, class, config, adapter table
    tokens        where there is one, the schedule: fields of token_reduction.Reduction
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from pyvit_accel import adapters, modules
from pyvit_accel.files import check_writable, read_metadata, read_tensors, write_safetensors
from pyvit_accel.models.vit import VisionTransformer, ViTConfig
from pyvit_accel.modules.token_block import TokenBlock
from pyvit_accel.token_reduction import from_dict
from pyvit_accel.tokens.window_merge import MergedMlp

FORMAT_VERSION = 2
UNREADABLE = {
    "empty": "load: {path} is empty (0 bytes); save the model again",
    "pickle": "load: {path} is a pickle (torch.save), which can run code when opened and is never read here; "
    "load float weights with load_weights, then accelerate and save",
    "foreign": "load: {path} is truncated or not a safetensors file ({error}); copy or save it again",
    "damaged": "load: {path} is truncated or not a safetensors file ({error}); copy or save it again",
}
CLASSES = {name: getattr(modules, name) for name in modules.__all__}
REPLACED_INSIDE = {TokenBlock: ("qkv", "proj", "fc1", "fc2"), MergedMlp: ("mlp",)}
TABLES = {name: getattr(adapters, name) for name in ("ATTENTIONS", "BLOCKS", "MLPS", "PATCH_EMBEDS")}


def save(model: nn.Module, path: str | Path) -> None:
    """Write an accelerated model; the file appears whole or not at all.

    Raises ValueError when the model did not come from accelerate or load, or path cannot be written.
    """
    made = getattr(model, "pyvit_accel", None)
    if made is None:
        name = type(model).__name__
        raise ValueError(f"save: {name} was not accelerated; pass what accelerate(model, recipe) returned")
    _check_whole(model)
    path = check_writable(path)
    if isinstance(model, VisionTransformer):
        architecture = {"vit": model.config.to_dict()}
    else:
        architecture = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    header = {"version": FORMAT_VERSION, "architecture": architecture, **made}
    write_safetensors(path, model.state_dict(), {"pyvit_accel": json.dumps(header)})


def _check_whole(model: nn.Module) -> None:
    """Raise ValueError for what the header of this model does not say: load would leave it out."""
    learning = next((name for name, m in model.named_modules() if isinstance(m, modules.Sparse24Training)), None)
    if learning is not None:
        raise ValueError(
            f"save: {learning} is a Sparse24Training, which learns and is not saved; accelerate the trained model with "
            'SPARSE24, alone (SPARSE24(mask="magnitude") reads no data) or in front of the other recipe'
        )
    inner = next((n for n, m in model.named_modules() if n and "tokens" in getattr(m, "pyvit_accel", {})), None)
    if inner is not None:
        name = type(model).__name__
        raise ValueError(f"save: the tokens of {inner} are reduced, which {name} does not know; save {inner} itself")
    inside = [spec["name"] for spec in model.pyvit_accel["modules"] if _inside_token_block(model, spec["name"])]
    if inside:
        raise ValueError(
            f"save: {inside[0]} was replaced after the tokens of its block were reduced, which load could not repeat; "
            "accelerate with both in one call, recipe + TOME(...), or first with the recipe"
        )


def _inside_token_block(model: nn.Module, name: str) -> bool:
    """Whether a module was part of a TokenBlock, or of a MergedMlp, when it was replaced."""
    module = model
    for part in name.split("."):
        if part in REPLACED_INSIDE.get(type(module), ()):
            return True
        module = getattr(module, part, None)
    return False


def read_header(path: str | Path) -> dict:
    """The metadata of a saved file. Raises ValueError, each with its reason, for anything load cannot read."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load: {path} does not exist")
    metadata = read_metadata(path, UNREADABLE)
    if "pyvit_accel" not in metadata:
        raise ValueError(
            f"load: {path} is a safetensors file, but not one save wrote; "
            "for float weights use load_weights, then accelerate"
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
            name = architecture["class"]
            raise ValueError(f"load: {path} holds a {name}; pass the float model, load(path, model=...)")
        with torch.device("meta"):
            model = VisionTransformer(ViTConfig.from_dict(architecture["vit"]))
    model.eval()
    tokens = from_dict(header["tokens"]).read(model) if "tokens" in header else None
    before = dict(model.named_modules())
    for spec in header["modules"]:
        model = _rebuild(model, spec, path)
    if tokens is not None:
        after = dict(model.named_modules())
        tokens.apply(model, {old: after[name] for name, old in before.items() if after.get(name, old) is not old})
    tensors = read_tensors(path, UNREADABLE)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"load: the tensors of {path} do not fit {type(model).__name__}: {error}") from None
    model.pyvit_accel = {name: header[name] for name in ("recipe", "modules", "tokens") if name in header}
    return model.requires_grad_(False).eval()


def _rebuild(model: nn.Module, spec: dict, path: str | Path) -> nn.Module:
    """Put the module that a record describes, its buffers still blank, where it stood."""
    target = ".".join(part for part in (spec["name"], spec["path"]) if part)
    cls = CLASSES.get(spec["class"])
    if cls is None:
        raise ValueError(
            f"load: {path} needs a module {spec['class']}, which this release does not have; upgrade pyvit_accel"
        )
    with torch.device("meta"):  # no memory: the tensors of the file take these places
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

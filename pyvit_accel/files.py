"""Files written whole or not at all, and safetensors opened with the reason when they cannot be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save, a zip file since torch 1.6


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


def write_whole(path: str | Path, write: Callable[[str], None]) -> None:
    """write(temporary name), then move the file to path; nothing is left behind when write raises."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The file appears whole or not at all."""
    separate, seen = {}, set()
    for name, t in tensors.items():
        t = t.detach().contiguous()
        shared = t.numel() and t.data_ptr() in seen  # safetensors refuses two names for one storage
        seen.add(t.data_ptr())
        separate[name] = t.clone() if shared else t
    write_whole(path, lambda temporary: save_file(separate, temporary, metadata))


def read_metadata(path: str | Path, reasons: dict[str, str]) -> dict[str, str]:
    """Raises ValueError as read_tensors does."""
    return _read(path, reasons, lambda file: file.metadata() or {})


def read_tensors(path: str | Path, reasons: dict[str, str]) -> dict[str, Tensor]:
    """The tensors by name, aligned and free of the file.

    Raises ValueError for a file that cannot be read, with reasons["empty" | "pickle" | "foreign" | "damaged"], in
    which {path} and {error} are filled in. A truncated file is a damaged one.
    """
    names = _read(path, reasons, lambda file: list(file.keys()))
    tensors: dict[str, Tensor] = {}
    # The file is mapped anew every few tensors: what is read of a mapping stays in memory while it is open.
    for i in range(0, len(names), 16):
        part = names[i : i + 16]
        tensors |= _read(path, reasons, lambda file, part=part: {name: file.get_tensor(name).clone() for name in part})
    return tensors


def _read(path: str | Path, reasons: dict[str, str], read: Callable[[Any], Any]) -> Any:
    with Path(path).open("rb") as file:
        start = file.read(9)
    has_header = start[8:] == b"{"  # after its length, a uint64, which may look like the start of a pickle
    if not start:
        raise ValueError(reasons["empty"].format(path=path))
    if not has_header and start.startswith(PICKLE_STARTS):
        raise ValueError(reasons["pickle"].format(path=path))
    try:
        with safe_open(path, "pt") as file:
            return read(file)
    except SafetensorError as error:
        raise ValueError(reasons["damaged" if has_header else "foreign"].format(path=path, error=error)) from None

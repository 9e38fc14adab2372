"""What modules with a 2:4 weight have in common: the packed weight, and its dense form where that is multiplied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyvit_accel.formats import sparse24
from pyvit_accel.ops.sparse24_linear import dense_form, multiplies_dense


def _moved(t: Tensor, to: Tensor) -> Tensor:
    """`to`, or t itself on its device where the dtype has changed."""
    return to if to.dtype == t.dtype else t.to(to.device)


def _unpack_after_load(module: Sparse24Weight, keys: object) -> None:
    module.unpack()
    if getattr(module, module.dense) is None and not module.w_values.is_meta:  # else unpacking has read the metadata
        sparse24.check_meta(module.w_meta, module.w_values.dtype)  # kernels take every nibble for a legal one


class Sparse24Weight(nn.Module):
    """w_values and w_meta, formats/sparse24.py, of (out_features, in_features).

    The tensor named `dense` holds the unpacked weight where nothing multiplies sparse operands, on CPUs for one; it is
    made anew, never saved. Every tensor keeps its dtype when the model's changes.
    """

    dense = "w_dense"
    in_features: int
    out_features: int
    x_zero_point: int

    def register_packed(self, dtype: torch.dtype) -> None:
        """The saved buffers, blank, and no dense form."""
        shapes = sparse24.packed_shapes(self.out_features, self.in_features, dtype)
        self.register_buffer("w_values", torch.zeros(shapes[0], dtype=dtype))
        # Not "meta": a module that torch.export (2.13) makes has an attribute of that name.
        self.register_buffer("w_meta", torch.full(shapes[1], 0x44444444, dtype=torch.int32))
        self._non_persistent_buffers_set.add(self.dense)
        self._set_dense(None)
        self.register_load_state_dict_post_hook(_unpack_after_load)

    def _set_dense(self, dense: Tensor | None) -> None:
        """The first buffer, or none: torch.export (2.13) counts those that are None, and lacks an input behind two."""
        self.__dict__.pop(self.dense, None)
        rest = {name: t for name, t in self._buffers.items() if name != self.dense}
        self._buffers.clear()
        if dense is None:
            self.__dict__[self.dense] = None
        else:
            self._buffers[self.dense] = dense
        self._buffers.update(rest)

    def unpack(self) -> None:
        """Make the dense form where this device needs it."""
        dense = None
        if not self.w_values.is_meta and multiplies_dense(self.w_values):
            dense = dense_form(self.w_values, self.w_meta, self.out_features, self.in_features)
        self._set_dense(dense)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sparse24Weight:
        blank = self.w_values.is_meta  # what comes of it has no values yet
        self._set_dense(None)
        super()._apply(lambda t: _moved(t, fn(t)), recurse)
        if not blank:
            self.unpack()
        return self

    def codes(self) -> Tensor:
        """The weight (N, K) in its own dtype."""
        return sparse24.unpack(self.w_values, self.w_meta, self.out_features, self.in_features)

    def get_extra_state(self) -> Tensor:
        """Of the tensors, whose padding hides N and K."""
        return torch.tensor([sparse24.VERSION, self.out_features, self.in_features, self.x_zero_point])

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError for the state of another layer or packing."""
        *came, x_zero_point = state.tolist()
        expected = [sparse24.VERSION, self.out_features, self.in_features]
        if came != expected:
            raise ValueError(
                f"{type(self).__name__}: the state is of packing version {came[0]}, out_features={came[1]}, "
                f"in_features={came[2]}; expected {expected[0]}, {expected[1]} and {expected[2]}"
            )
        self.x_zero_point = x_zero_point

    def weight_bytes(self) -> int:
        """Of the packed weight with its scales and sums."""
        parts = {"w_values", "w_meta", "w_scale", "w_sum"}
        return sum(t.nbytes for name, t in self.named_buffers(recurse=False) if name in parts)

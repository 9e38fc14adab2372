"""OPT-m, after MPTQ-ViT: the two steps of a twin quantizer of GELU outputs, their ratio a power of two found from data.

    x > 0: steps of small * 2^m           x < 0: steps of small           2^(b-1) codes each

A ratio 2^m keeps both kinds of codes multiples of one step, so one fp16 product is exact. MPTQ-ViT (Tai et al.,
arXiv:2401.14895) has no public code and does not say what is searched: this is our re-implementation, (m, small) by the
squared error of the layer's output, and does not claim the paper's numbers.
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.calibrate.observers import Activation
from pyvit_accel.calibrate.twin import GELU_MINIMUM, fake_twin, output_error

RATIOS = range(16)
PARTS = tuple(0.5 + i / 20 for i in range(21))  # of the step that just reaches the minimum of GELU


def optm_gelu(x: Activation | Tensor, weight: Tensor, bits: int) -> tuple[float, int]:
    """(small, m) for GELU outputs x in front of weight (N, K)."""
    x = x.sample if isinstance(x, Activation) else x.reshape(-1, x.shape[-1]).float()
    w = weight.detach().float()
    full = -GELU_MINIMUM / 2 ** (bits - 1)

    def error(candidate: tuple[float, int]) -> float:
        small, m = candidate
        return output_error(fake_twin(x, small * 2**m, small, bits) - x, w)

    return min(((full * part, m) for part in PARTS for m in RATIOS), key=error)

"""Models calibrated with a paper's own code, as records of integers and formats.

    w_bits, a_bits, _ = importers.bits_of_file("deit_tiny_w4_a4_s4_calibsize_32.pth")
    record = importers.adalog(state_dict, w_bits, a_bits)
    fast, report = accelerate(float_model, imported(record))        pyvit_accel/imported.py, in three forms
    record.linears["blocks.0.mlp.fc1"].plan()           its codes, scales and bias, packed by QuantLinear.from_plan
    record.block("blocks.0").limits()                   what of its attention no kernel of this release runs
    record.notes                                        what is stored otherwise than published

Each raises Unsupported for an incomplete model, with the full name of the tensor that is missing. Codes of weights are
the published ones; those of activations can differ by one where x / scale lies within a float32 rounding of a tie, for
here it is x * (1 / scale).
"""

from .adalog import adalog, bits_of_file
from .ptq4vit import ptq4vit, tinysam
from .records import ImportedBlock, ImportedLinear, ImportedMatmul, ImportedModel, Uniform
from .repq import is_vit, repq_vit

__all__ = [
    "ImportedBlock",
    "ImportedLinear",
    "ImportedMatmul",
    "ImportedModel",
    "Uniform",
    "adalog",
    "bits_of_file",
    "is_vit",
    "ptq4vit",
    "repq_vit",
    "tinysam",
]

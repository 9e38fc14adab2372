"""Drop-in torch.nn modules over the ops."""

from .codebook_linear import CodebookLinear
from .coded_attention import CodedAttention
from .exp_free_attention import ExpFreeAttention, ExpFreeSelfAttention
from .quant_attention import QuantAttention
from .quant_block import QuantBlock
from .quant_linear import QuantLinear
from .quant_mlp import QuantMlp
from .quant_patch_embed import QuantPatchEmbed
from .sparse24_linear import Sparse24Linear
from .sparse24_quant_linear import Sparse24QuantLinear
from .sparse24_training import Sparse24Training, train_sparse24
from .weight_only_linear import WeightOnlyLinear

__all__ = [
    "CodebookLinear",
    "CodedAttention",
    "ExpFreeAttention",
    "ExpFreeSelfAttention",
    "QuantAttention",
    "QuantBlock",
    "QuantLinear",
    "QuantMlp",
    "QuantPatchEmbed",
    "Sparse24Linear",
    "Sparse24QuantLinear",
    "Sparse24Training",
    "WeightOnlyLinear",
    "train_sparse24",
]

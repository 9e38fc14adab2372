"""Fast vision transformers from trained ones: low-bit matmul and attention as drop-in torch.nn modules.

    model, report = accelerate(model, recipes.W8A8, calibration=[images])
"""

from pyvit_accel import recipes
from pyvit_accel.convert import Recipe, Report, Rule, accelerate
from pyvit_accel.errors import Unsupported
from pyvit_accel.mixed_precision import search
from pyvit_accel.modules.exp_free_attention import ExpFreeAttention, exp_free_attention
from pyvit_accel.schedule_search import find_schedule
from pyvit_accel.serialize import load, save
from pyvit_accel.token_reduction import reduce_tokens, token_state
from pyvit_accel.tokens import TokenSchedule

__version__ = "0.1.0"
__all__ = [
    "ExpFreeAttention",
    "Recipe",
    "Report",
    "Rule",
    "TokenSchedule",
    "Unsupported",
    "accelerate",
    "exp_free_attention",
    "find_schedule",
    "load",
    "recipes",
    "reduce_tokens",
    "save",
    "search",
    "token_state",
]

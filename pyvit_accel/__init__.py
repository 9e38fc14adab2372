"""Fast vision transformers from trained ones: low-bit matmul, exp-free attention, 2:4 sparsity, token reduction."""

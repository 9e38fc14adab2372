"""What the bits mean: quantize, dequantize, pack, unpack, error_bound for each number format.

    affine      integers with scale and zero point; per tensor, channel, head, token, group
    packed      weights of 2, 3, 4, 5, 6, 8 bits as bytes, the same on every device
    codebook    Codebook, the one record of every format below: thresholds, levels, zero, operand type
    operands    which levels int8, e4m3, e5m2, fp16 and bf16 hold exactly
    log         log2 (FQ-ViT, with its integer softmax), log_sqrt2 (RepQ-ViT), adalog, sulq (I&S-ViT)
    twin        gelu, softmax (PTQ4ViT, TinySAM), uniform
    tan         tan, in the style of TanQ (DopQ-ViT)
    subset      subset, select (DFSQ): points per channel out of a universal set
    multiquant  weight, activation (MultiQuant): 2 bits without a zero
    pow2        q_weight, ps_weight (ShiftAddViT): powers of two
    fp8         fp8: the bytes of e4m3 and e5m2
    sparse24    P24 v1: 2:4 sparse weights as sparse tensor cores read them; to and from torch's layout
    softmax     probabilities from the logarithm: linear_mantissa, log2, of_codebook; what quant_attention takes
"""

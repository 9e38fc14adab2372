"""What the bits mean: quantize, dequantize, pack, unpack, error_bound for each number format."""

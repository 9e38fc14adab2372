"""Small floating formats as numpy arrays: e4m3, e5m2, bf16, tf32. Encoders round to nearest, ties to even, once.

e4m3 has no infinity: 0x7F and 0xFF are NaN, 448 is its largest number. e5m2 is the upper byte of a float16.
Source: PTX ISA, cvt and "Alternate floating-point data formats"; Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

import numpy as np


def _code_of_magnitude(magnitude: np.ndarray, mantissa_bits: int, lowest_exponent: int) -> np.ndarray:
    """Finite magnitudes (float64) to exponent and mantissa bits as one integer, maybe beyond the format's end."""
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, lowest_exponent), lowest_exponent)
    units = np.rint(np.ldexp(magnitude, mantissa_bits - exponent)).astype(np.int64)
    return ((exponent - lowest_exponent).astype(np.int64) << mantissa_bits) + units


def _encode8(x: np.ndarray, mantissa_bits: int, lowest_exponent: int, largest: int, overflow: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = np.asarray(x).astype(np.float64)
    magnitude = np.abs(x)
    finite = np.isfinite(magnitude)
    code = _code_of_magnitude(np.where(finite, magnitude, 0.0), mantissa_bits, lowest_exponent)
    code = np.where(finite & (code <= largest), code, overflow) | (np.signbit(x).astype(np.int64) << 7)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def encode_e4m3(x: np.ndarray, satfinite: bool = True) -> np.ndarray:
    """float to uint8 of the same shape. Too large, infinity too: 448 of its sign, else NaN. NaN: 0x7F."""
    return _encode8(x, 3, -6, 0x7E, 0x7E if satfinite else 0x7F)


def encode_e5m2(x: np.ndarray, satfinite: bool = True) -> np.ndarray:
    """float to uint8 of the same shape. Too large, infinity too: 57344 of its sign, else infinity. NaN: 0x7F."""
    return _encode8(x, 2, -14, 0x7B, 0x7B if satfinite else 0x7C)


def _decode_table(mantissa_bits: int, bias: int) -> np.ndarray:
    byte = np.arange(128)
    exponent, mantissa = byte >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
    units = mantissa + ((exponent > 0) << mantissa_bits)
    value = np.ldexp(units.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    if mantissa_bits == 2:
        value[0x7C:] = [np.inf, np.nan, np.nan, np.nan]
    else:
        value[0x7F] = np.nan
    return np.concatenate([value, -value]).astype(np.float32)


_E4M3, _E5M2 = _decode_table(3, 7), _decode_table(2, 15)


def decode_e4m3(code: np.ndarray) -> np.ndarray:
    """uint8 to float32, exactly."""
    return _E4M3[code]


def decode_e5m2(code: np.ndarray) -> np.ndarray:
    """uint8 to float32, exactly."""
    return _E5M2[code]


def encode_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to uint16. NaN: 0x7FFF, as cvt.rn.bf16.f32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def decode_bf16(code: np.ndarray) -> np.ndarray:
    """uint16 to float32, exactly."""
    return (np.asarray(code).astype(np.uint32) << 16).view(np.float32)


def encode_tf32(x: np.ndarray, ties_away: bool = True) -> np.ndarray:
    """float32 to uint32 with 13 low zeros: cvt.rna.tf32.f32, or cvt.rn.tf32.f32 without ties_away. NaN: 0x7FFFFFFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    half = 0x1000 if ties_away else 0xFFF + ((bits >> 13) & 1)
    rounded = np.where(np.isinf(x), bits, (bits + half) & 0xFFFFE000)
    return np.where(np.isnan(x), 0x7FFFFFFF, rounded).astype(np.uint32)


def decode_tf32(bits: np.ndarray) -> np.ndarray:
    """uint32 to float32 as a tensor core reads it: the low 13 bits are ignored."""
    return (np.asarray(bits, np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

// The scalar functions of the epilogues: the float32 operations of pyvit_accel/reference/scalar.py, in its order.
//
// Every operation rounds as written, so it must be compiled with -fmad=false (-ffp-contract=off on the host); the only
// fused multiply-adds are those of divide(), which asks for them by name.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pyvit_accel {

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: the sum with |t| <= 2^22 holds rint(t), half to even, in its low bits
constexpr int32_t MAGIC_BITS = 0x4B400000;

HOST_DEVICE int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }
HOST_DEVICE float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }

// a / b to the nearest float32, half to even, for 2^-20 <= a <= 2^20 and 2^-100 <= b <= 2^101. r: 1 / b within an ulp, and
// the nearest where the mantissa of b is all ones. The fast path of div.rn.f32, operation by operation, so its results; the
// other, a call, is for what over- or underflows, and here nothing does.
HOST_DEVICE float divide(float a, float b, float r) {
  r = fmaf(fmaf(-b, r, 1.0f), r, r);
  const float q = a * r;
  return fmaf(fmaf(-b, q, a), r, q);
}

#ifdef __CUDACC__
__device__ __forceinline__ float reciprocal(float b) {  // as divide() needs it; one instruction
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return r;
}
#else
float reciprocal(float b);  // the test's, which errs as much as the instruction may
#endif

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#define DEVICE inline
#endif

DEVICE float divide(float a, float b) { return divide(a, b, reciprocal(b)); }

// 2^t for |t| <= 100.
DEVICE float exp2(float t) {
  const float shifted = t + MAGIC;
  const float f = t - (shifted - MAGIC);
  float p = f * 0.00132647261f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return float_of(bits_of(p) + static_cast<int32_t>(static_cast<uint32_t>(bits_of(shifted) - MAGIC_BITS) << 23));
}

// 1 / (1 + 2^-t).
DEVICE float sigmoid2(float t) { return divide(1.0f, 1.0f + exp2(fminf(fmaxf(-t, -100.0f), 100.0f))); }

// x Phi(x), Phi - 1/2 as an odd rational function of x clipped to +-5.5.
DEVICE float gelu(float x) {
  const float t = fminf(fmaxf(x, -5.5f), 5.5f);
  const float z = t * t;
  float p = z * 2.27495214e-08f + 6.35206834e-06f;
  p = p * z + 0.000168822022f;
  p = p * z + 0.00467723841f;
  p = p * z + 0.0338523164f;
  p = p * z + 0.398942232f;
  float q = z * 1.19750473e-06f + 7.36461952e-05f;
  q = q * z + 0.00188442448f;
  q = q * z + 0.0286456775f;
  q = q * z + 0.251521081f;
  q = q * z + 1.0f;
  return x * (0.5f + t * divide(p, q));
}

DEVICE float gelu_tanh(float x) { return x * sigmoid2((x + x * x * x * 0.044715f) * 2.30220819f); }

DEVICE float quick_gelu(float x) { return x * sigmoid2(x * 2.45546696f); }

// The codes of `bits` bits: lowest and highest value before the zero point is added. Clipping to integers first
// commutes with rint.
HOST_DEVICE float lowest_code(int32_t bits, int32_t zero_point) { return static_cast<float>(-(1 << (bits - 1)) - zero_point); }
HOST_DEVICE float highest_code(int32_t bits, int32_t zero_point) { return static_cast<float>((1 << (bits - 1)) - 1 - zero_point); }

// clip(rint(y * inv_scale) + zero_point), with the ends above.
HOST_DEVICE int32_t to_code(float y, float inv_scale, int32_t zero_point, float lowest, float highest) {
  return bits_of(fminf(fmaxf(y * inv_scale, lowest), highest) + MAGIC) - MAGIC_BITS + zero_point;
}

}  // namespace pyvit_accel

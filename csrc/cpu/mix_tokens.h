// mix_tokens: one row of y at a time, from a list of rows of x. Up to kStreams rows are read side by side, in full length,
// so that memory sees few streams and each of them in order; lists that are longer keep their sums in L1 in between.
constexpr int kStreams = 4;

template <class T> INLINE float row_norm(const T* x, int64_t C) {
  vf squares = {};
  for (int64_t c = 0; c < C; c += 16) {
    const vf v = load_floats(x + c, C - c);
    squares = squares + v * v;
  }
  return __builtin_sqrtf(lane_sum(squares));
}

// sums + w[0] rows[0] + ..., in this order; null: none before, `divisor` 0: not divided.
template <int kRows, class T, class Out>
INLINE void add_rows(const T* const* rows, const float* w, int64_t C, const float* sums, float divisor, const T* base, Out* out) {
  for (int64_t c = 0; c < C; c += 16) {
    vf y = sums ? load<vf>(sums + c) : vf{};
    _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r) y = y + load_floats(rows[r] + c, C - c) * w[r];
    if (divisor != 0) y = y / divisor;
    if (base) y = load_floats(base + c, C - c) + y;
    store_floats(out + c, y, C - c);
  }
}
template <class T, class Out>
INLINE void add_rows(int count, const T* const* rows, const float* w, int64_t C, const float* sums, float divisor, const T* base, Out* out) {
  switch (count) {
    case 1: return add_rows<1>(rows, w, C, sums, divisor, base, out);
    case 2: return add_rows<2>(rows, w, C, sums, divisor, base, out);
    case 3: return add_rows<3>(rows, w, C, sums, divisor, base, out);
    default: return add_rows<kStreams>(rows, w, C, sums, divisor, base, out);
  }
}

template <class T> INLINE void mix_rows(const Mix& p, int64_t begin, int64_t end) {
  const int64_t C = p.C;
  const size_t sums_bytes = round_up(C, 16) * sizeof(float);
  float* const sums = (float*)scratch(sums_bytes, 0);
  const T** const rows = (const T**)scratch(p.L * (sizeof(T*) + sizeof(float)), 1);
  float* const w = (float*)(rows + p.L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.M, m = item % p.M;
    const int32_t* ptr = p.ptr ? p.ptr + b * (p.M + 1) + m : nullptr;
    const int64_t first = ptr ? ptr[0] : m * p.width, last = ptr ? ptr[1] : first + p.width;
    const T *x = (const T*)p.x + b * p.x_stride[0], *base = (const T*)p.base;
    if (base) base += b * p.base_stride[0] + m * p.base_stride[1];
    T* const y = (T*)p.y + item * C;
    int64_t n = 0;
    float total = 0;
    for (int64_t t = b * p.L + first; t < b * p.L + last; ++t)
      if (p.col[t] >= 0) {
        w[n] = p.weight ? p.weight[t] : 1.f;
        total += w[n];
        rows[n++] = x + p.col[t] * p.x_stride[1];
      }
    const bool copies = n == 1 && !base && (w[0] == 1 || p.reduce != Reduce::sum);
    if (copies || (n == 0 && base)) {
      __builtin_memcpy(y, copies ? rows[0] : base, C * sizeof(T));
      continue;
    }
    if (n == 0 || (p.reduce != Reduce::sum && total == 0)) {
      __builtin_memset(y, 0, C * sizeof(T));
      continue;
    }
    const float divisor = p.reduce == Reduce::sum ? 0.f : total;
    int64_t i = 0;
    for (; n - i > kStreams; i += kStreams)
      add_rows<kStreams>(rows + i, w + i, C, i ? sums : nullptr, 0.f, (const T*)nullptr, sums);
    const float* before = i ? sums : nullptr;
    if (p.reduce != Reduce::mlerp) {
      add_rows((int)(n - i), rows + i, w + i, C, before, divisor, base, y);
      continue;
    }
    add_rows((int)(n - i), rows + i, w + i, C, before, divisor, base, sums);
    float longest = 0;
    for (int64_t r = 0; r < n; ++r) {
      const float norm = row_norm(rows[r], C);
      longest = longest < norm ? norm : longest;
    }
    const float norm = row_norm(sums, C), factor = longest / (norm < 1e-12f ? 1e-12f : norm);
    for (int64_t c = 0; c < C; c += 16) store_floats(y + c, load<vf>(sums + c) * factor, C - c);
  }
}

void mix_tokens(const Mix& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Float::float32: return mix_rows<float>(p, begin, end);
    case Float::float16: return mix_rows<Half>(p, begin, end);
    case Float::bfloat16: return mix_rows<BFloat>(p, begin, end);
  }
}

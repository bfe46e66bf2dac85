// A tile of decode's cache, of numbers or of codes; its sizes are decode.cu's.
//
// Of codes, `ldmatrix` hands a lane four adjacent bytes of a row where of numbers it hands two. Of a key these are columns
// 4 q to 4 q + 3 (q: the lane of its quad): the first two of them are taken for columns 2 q, 2 q + 1 of a product's 16, the others
// for 8 + 2 q, 8 + 2 q + 1, and the query is laid out accordingly. Of values, transposed in pairs of bytes, they are two columns
// of two slots: the even column is of one product, the odd one of the next.
#pragma once

struct Scales {
  float keys, values;
};

template <int FORMAT>
struct Cached {
  typedef signed char Element;
  static __forceinline__ void multiply_keys(float (&scores)[PARTS][2][4], const uint32_t (&query)[STEPS][4], uint32_t keys,
                                            int lane);
  static __forceinline__ void multiply_values(Softmax& softmax, const uint32_t (&shares)[PARTS][4], uint32_t values, Seen seen,
                                              int lane);
};

#if CODES == 0
template <>
struct Cached<0> {
  typedef uint16_t Element;
  static __forceinline__ void multiply_keys(float (&scores)[1][2][4], const uint32_t (&query)[STEPS][4], uint32_t keys,
                                            int lane) {
    ::multiply_keys(scores[0], query, keys, HALF_BYTES, lane);
  }
  static __forceinline__ void multiply_values(Softmax& softmax, const uint32_t (&shares)[1][4], uint32_t values, Seen seen,
                                              int lane) {
    ::multiply_values(softmax, shares[0], values, HALF_BYTES, seen, lane);
  }
};
#else

// Two codes, in bytes 0 and 1 (`high`: 2 and 3), as a pair of elements: exactly.
template <bool HIGH>
__forceinline__ uint32_t pair_of_codes(uint32_t codes) {
#if CODES == 2 && !ELEMENT_IS_BFLOAT16
  uint32_t pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
      : "=r"(pair)
      : "r"(HIGH ? codes >> 16 : codes));
  return pair;
#elif CODES == 2
  // sign, exponent and fraction where bfloat16 has them: 2^-120 of the number, subnormals too
  uint32_t wide = __byte_perm(codes, 0, HIGH ? 0x3424 : 0x1404), pair;
  wide = (wide & 0x80008000u) | (wide >> 4 & 0x07F007F0u);
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(wide), "r"(0x7B807B80u));
  return pair;
#elif !ELEMENT_IS_BFLOAT16
  // 0x64 before a byte u is 1024 + u; u is the code + 128
  uint32_t wide = __byte_perm(codes ^ 0x80808080u, 0x64646464u, HIGH ? 0x4342 : 0x4140), pair;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(wide), "r"(0x64806480u));
  return pair;
#else
  // 0x43 before 7 bits is 128 + them; the code's sign bit makes 128 of it 256
  uint32_t wide = __byte_perm(codes, 0, HIGH ? 0x4342 : 0x4140), pair;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(wide & 0x007F007Fu | 0x43004300u), "r"(wide & 0x00800080u | 0x43004300u));
  return pair;
#endif
}

// Four elements as codes: divided by the scale, to the nearest, ties to even, saturated.
__forceinline__ uint32_t to_codes(const uint32_t (&words)[2], float scale) {
  float x[4] = {low_float(words[0]) / scale, high_float(words[0]) / scale, low_float(words[1]) / scale,
                high_float(words[1]) / scale};
#if CODES == 2
  uint32_t codes;
  asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
      "mov.b32 %0, {low, high}; }"
      : "=r"(codes)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
  return codes;
#else
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) codes |= (__float2int_rn(fminf(fmaxf(x[i], -127.0f), 127.0f)) & 0xFF) << 8 * i;
  return codes;
#endif
}
__forceinline__ void from_codes(uint32_t (&words)[2], uint32_t codes) {
  words[0] = pair_of_codes<false>(codes), words[1] = pair_of_codes<true>(codes);
}

template <int FORMAT>
__forceinline__ void Cached<FORMAT>::multiply_keys(float (&scores)[PARTS][2][4], const uint32_t (&query)[STEPS][4],
                                                   uint32_t keys, int lane) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      for (int e = 0; e < 4; e++) scores[part][i][e] = 0;
#pragma unroll
    for (int k = 0; k < STEPS; k += 2) {  // 32 columns: two steps of 16
      uint32_t b[4];
      load_matrices(b, chunk_address(keys, part * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2, HALF_BYTES));
      multiply(scores[part][0], query[k], pair_of_codes<false>(b[0]), pair_of_codes<true>(b[0]));
      multiply(scores[part][1], query[k], pair_of_codes<false>(b[2]), pair_of_codes<true>(b[2]));
      if (k + 1 < STEPS) {
        multiply(scores[part][0], query[k + 1], pair_of_codes<false>(b[1]), pair_of_codes<true>(b[1]));
        multiply(scores[part][1], query[k + 1], pair_of_codes<false>(b[3]), pair_of_codes<true>(b[3]));
      }
    }
  }
}

// What is not seen may be anything: it is zero here.
template <int FORMAT>
__forceinline__ void Cached<FORMAT>::multiply_values(Softmax& softmax, const uint32_t (&shares)[PARTS][4], uint32_t values,
                                                     Seen seen, int lane) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    uint32_t kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int slot = part * 16 + 8 * i + lane % 4 * 2;
      kept[i] = (seen(slot) ? 0xFFFFu : 0) | (seen(slot + 1) ? 0xFFFF0000u : 0);
    }
#pragma unroll
    for (int k = 0; k < STEPS; k += 2) {  // 32 columns; matrices: slots 0 to 7 and 8 to 15 of 16, then the next 16 columns
      uint32_t b[4];
      load_transposed(b, chunk_address(values, part * 16 + lane % 16, k + lane / 16, HALF_BYTES));
#pragma unroll
      for (int step = 0; step < 2; step++) {
        if (k + step >= STEPS) continue;
        uint32_t first = __byte_perm(b[2 * step] & kept[0], 0, 0x3120), second = __byte_perm(b[2 * step + 1] & kept[1], 0, 0x3120);
        float(&even)[4] = softmax.mix[2 * (k + step)], (&odd)[4] = softmax.mix[2 * (k + step) + 1];
        multiply(even, shares[part], pair_of_codes<false>(first), pair_of_codes<false>(second));
        multiply(odd, shares[part], pair_of_codes<true>(first), pair_of_codes<true>(second));
      }
    }
  }
}
#endif

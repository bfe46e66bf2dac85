// Codes as the left operand of warpgroup products: 32 columns of a warpgroup's 64 rows at a time, converted in registers.
//
// A thread gets from `ldmatrix` 4 bytes of each 16 of its row and of the one 8 rows below: of lane l, c = l % 4, bytes 4c to 4c + 3.
// Products take of it, for each 16 columns, those at 2c, 2c + 1, 2c + 8 and 2c + 9. So tokens come in another order, in which the
// columns that a thread holds are where it has to deliver them (grouped_codes.py says it in Python):
//
// int8, in each 16 columns: bytes 0 to 3 are 2c, 2c + 1, 2c + 8, 2c + 9; column 4c + 2p + i stands at 8p + 2c + i.
// Two codes to a byte, in each 32 columns: a mask takes codes i and i + 4 of the 8 in a word as a pair; column 8c + 4p + i stands
// at 8i + 2c + p.
//
// Macros: CODES, one of Format; BLOCK, columns that have a scale in common, 0: all of a row.
#pragma once

#include "warp.cuh"

enum Format { INT8, INT4, INT4_ASYMMETRIC, E2M1 };
constexpr Format FORMAT = CODES;
constexpr bool TWO_IN_A_BYTE = FORMAT != INT8;
constexpr int SEGMENT = 64;                    // columns
constexpr int PARTS = TWO_IN_A_BYTE ? 4 : 2;   // segments in 128 bytes of a row
constexpr bool SCALED = FORMAT == E2M1 || (FORMAT != INT8 && BLOCK > 0);  // code by code; else sums are
constexpr float LEFT_OVER = FORMAT == E2M1 ? 128 : 1;                      // to be multiplied to sums

// Exact, or rounded once, as the body rounds: pairs of elements.
__forceinline__ uint32_t difference(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("sub.rn." ELEMENT "x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
__forceinline__ uint32_t product(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.rn." ELEMENT "x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
__forceinline__ uint32_t both(uint32_t element) { return __byte_perm(element, 0, 0x1010); }

// 32 bytes of a row and of the one 8 rows below, both rows' first halves and then both rows' second ones: a segment of 4-bit codes,
// half of one of int8. `stage` is where the warpgroup's rows lie, 128 swizzled bytes each, of which these are the `index`-th.
__forceinline__ void load_codes(uint32_t (&words)[4], uint32_t stage, int index, int warp, int lane) {
  int row = lane % 8, matrix = lane / 8;
  load_matrices(words, (stage + (warp * 16 + matrix % 2 * 8 + row) * 128 + (matrix / 2 ^ row) * 16) ^ index * 32);
}

// int8: 0x64 before a byte u is 1024 + u in float16. bfloat16 has a bit less: 0x43 before the lower 7 is 128 + these, and the
// uppermost bit says whether 128 more are to be taken away.
template <int SPREAD>
__forceinline__ uint32_t int8_pair(uint32_t bytes) {
#if ELEMENT_IS_BFLOAT16
  uint32_t wide = __byte_perm(bytes, 0, SPREAD);
  return difference((wide & 0x007F007F) | 0x43004300, (wide & 0x00800080) | 0x43004300);
#else
  return difference(__byte_perm(bytes ^ 0x80808080, 0x64646464, SPREAD), 0x64806480);  // 1024 + 128
#endif
}

// Of a word of eight codes, i and i + 4. What comes out of int4 is 1024 + 8 (bfloat16: 128 + 8) and the code; of E2M1 it is the
// number times 2^-14 (2^-126): sign, exponent and fraction where an element has them.
#if ELEMENT_IS_BFLOAT16
constexpr uint32_t EIGHT = 0x4308;
constexpr int FRACTION = 6;
#else
constexpr uint32_t EIGHT = 0x6408;
constexpr int FRACTION = 9;
#endif
__forceinline__ uint32_t int4_pair(uint32_t word, int i) { return (word >> 4 * i & 0x000F000F) ^ EIGHT * 0x10001; }
__forceinline__ uint32_t e2m1_pair(uint32_t word, int i) {
  uint32_t sign = word << (12 - 4 * i), size = 4 * i < FRACTION ? word << (FRACTION - 4 * i) : word >> (4 * i - FRACTION);
  return (sign & 0x80008000) | (size & 0x00070007 << FRACTION);
}

// As memory has them, for a segment of two rows.
struct RawScales {
  uint32_t words[2];  // E2M1: four scales of a row
  uint16_t scales[2];
  signed char zeros[2];
};

// Pairs of equal elements: of a row.
struct Factors {
  uint32_t scale[2], zero[2];
};

// Of a segment's half. `quad`: the thread's place in its quad.
__forceinline__ Factors factors_of(const RawScales& raw, int half, int quad) {
  Factors factors;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    if constexpr (FORMAT == E2M1) {
      // E4M3's exponent and fraction where an element has them, as a scale has no sign: times 2^-8 (2^-120). With 2^7 (2^119)
      // times the scale, products with codes as they come are 2^-7 of the number, and exact.
      uint32_t scale = __byte_perm(raw.words[row], 0, 0x4040 + 0x0101 * (2 * half + quad / 2));
#if ELEMENT_IS_BFLOAT16
      factors.scale[row] = product(product(scale << 4, 0x7B807B80), 0x7B007B00);
#else
      factors.scale[row] = product(scale << 7, 0x78007800);
#endif
    } else {
      if (SCALED) factors.scale[row] = both(raw.scales[row]);
      factors.zero[row] = FORMAT == INT4_ASYMMETRIC ? both(EIGHT + raw.zeros[row]) : EIGHT * 0x10001;
    }
  }
  return factors;
}

// The fragments of two products of 16 columns, a segment's `half`, which has two of the words of 4-bit codes, and all of int8's.
__forceinline__ void convert(uint32_t (&fragments)[2][4], const uint32_t (&words)[4], int half, const Factors& factors) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    if constexpr (FORMAT == INT8) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        fragments[k][row] = int8_pair<0x4140>(words[2 * k + row]);
        fragments[k][row + 2] = int8_pair<0x4342>(words[2 * k + row]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t pair, word = words[2 * half + row];
        if constexpr (FORMAT == E2M1)
          pair = e2m1_pair(word, i);
        else
          pair = difference(int4_pair(word, i), factors.zero[row]);
        fragments[i / 2][row + i % 2 * 2] = SCALED ? product(pair, factors.scale[row]) : pair;
      }
    }
  }
}

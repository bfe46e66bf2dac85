// Codes as the left operand of warpgroup products: a segment of 64 columns of a warpgroup's 64 rows, converted in registers.
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
constexpr int WORDS = TWO_IN_A_BYTE ? 4 : 8;   // of a segment that a thread holds
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

// Codes of a segment: of int8, words of the thread's row and then of the one below, one for each 16 columns; else of both rows in
// columns 0 to 31, and then in the others. `stage` is where the warpgroup's rows lie, 128 swizzled bytes each.
__forceinline__ void load_codes(uint32_t (&words)[WORDS], uint32_t stage, int part, int warp, int lane) {
  uint32_t (*fours)[4] = reinterpret_cast<uint32_t(*)[4]>(words);
  int row = lane % 8, matrix = lane / 8;
  if constexpr (TWO_IN_A_BYTE) {
    uint32_t first = stage + (warp * 16 + matrix % 2 * 8 + row) * 128 + (matrix / 2 ^ row) * 16;
    load_matrices(fours[0], first ^ part * 32);
  } else {
    uint32_t first = stage + (warp * 16 + row) * 128 + (matrix ^ row) * 16;
    load_matrices(fours[0], first ^ part * 64);
    load_matrices(fours[WORDS / 4 - 1], (first ^ part * 64) + 8 * 128);
  }
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

// Pairs of equal elements: of a row, for columns 0 to 31 and 32 to 63, which differ for E2M1 alone.
struct Factors {
  uint32_t scale[2][2], zero[2];
};

// `quad`: the thread's place in its quad.
__forceinline__ Factors factors_of(const RawScales& raw, int quad) {
  Factors factors;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    if constexpr (FORMAT == E2M1) {
      // two of E4M3's, without their signs, where an element has exponent and fraction: times 2^-8 (2^-120). With 2^7 (2^119)
      // times the scale, products with codes as they come are 2^-7 of the number, and exact.
      uint32_t two = __byte_perm(raw.words[row], 0, quad / 2 ? 0x4341 : 0x4240);
#if ELEMENT_IS_BFLOAT16
      two = product(product(two << 4, 0x7B807B80), 0x7B007B00);
#else
      two = product(two << 7, 0x78007800);
#endif
      factors.scale[row][0] = both(two), factors.scale[row][1] = __byte_perm(two, 0, 0x3232);
    } else {
      if (SCALED) factors.scale[row][0] = factors.scale[row][1] = both(raw.scales[row]);
      factors.zero[row] = FORMAT == INT4_ASYMMETRIC ? both(EIGHT + raw.zeros[row]) : EIGHT * 0x10001;
    }
  }
  return factors;
}

// A segment's codes as the fragments of four products of 16 columns.
__forceinline__ void convert(uint32_t (&fragments)[4][4], const uint32_t (&words)[WORDS], const Factors& factors) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    if constexpr (FORMAT == INT8) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        fragments[k][row] = int8_pair<0x4140>(words[(4 * row + k) % WORDS]);
        fragments[k][row + 2] = int8_pair<0x4342>(words[(4 * row + k) % WORDS]);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          uint32_t pair, word = words[2 * half + row];
          if constexpr (FORMAT == E2M1)
            pair = e2m1_pair(word, i);
          else
            pair = difference(int4_pair(word, i), factors.zero[row]);
          fragments[2 * half + i / 2][row + i % 2 * 2] = SCALED ? product(pair, factors.scale[row][half]) : pair;
        }
    }
  }
}

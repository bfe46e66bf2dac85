// What a warp does by itself: matrix products of 16 x 8 x 16 and their operands from shared memory (PTX ISA, `mma.m16n8k16`,
// `ldmatrix`), and the steps of a softmax over rows of such a product's sums. Of lane l, sums 0, 1 are row l / 4 and columns
// 2 * (l % 4) + 0, 1; sums 2, 3 are 8 rows below. Four lanes, a quad, share a row.
#pragma once

#include "ptx.cuh"

// Lanes 8 * i to 8 * i + 7 give the addresses of matrix i's rows, each of 8 elements. Of a left operand, matrices 0 to 3 are rows
// 0 to 7, rows 8 to 15, and the same of the next 8 columns; two of them do if there are only 8 rows.
__forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// d += a * b; a is 16 rows of 16, b 16 rows of 8 that are given as its columns' pairs.
__forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__forceinline__ float nothing() { return __int_as_float(0xFF800000); }  // the maximum of no numbers

__forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

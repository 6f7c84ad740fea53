// Products with packed N:M weights, and the weights unpacked.

#include "../memory.h"
#include "../numbers.h"
#include "../lines.h"
#include "../rank.h"
#include "packed.h"

namespace {

#include "few.h"
#include "batch.h"
#include "pack.h"

// to[r, K]: zeros, and each value in its place
template <typename Item>
void unpack(const Packed<Item>& w, Item* out, int threads) {
  const Size depth = w.depth();
  const std::vector<int32_t> groups = w.groups();
  expect_pages(out, w.rows * depth * sizeof(Item));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Size row = 0; row < w.rows; ++row) {
    const Item* values = w.values + row * w.kept;
    const uint8_t* codes = w.codes + row * w.bytes;
    Item* to = out + row * depth;
    std::memset(to, 0, depth * sizeof(Item));
    Size j = 0;
    for (; j + 8 <= w.kept; j += 8, codes += w.bits) {
      const Ints place = places(codes, w.bits, w.m);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) to[groups[j + i] + place[i]] = values[j + i];
    }
    uint8_t bits[8] = {};
    std::memcpy(bits, codes, w.codes + (row + 1) * w.bytes - codes);
    const Ints place = places(bits, w.bits, w.m);
    for (int i = 0; j < w.kept; ++i, ++j) to[groups[j] + place[i]] = values[j];
  }
}

}  // namespace

#define PRODUCTS(VALUE, NAME)                                                                      \
  EXPORT void sparsefx_nm_##NAME(const VALUE* x, Size batch, const VALUE* values,                  \
                                 const uint8_t* codes, Size rows, Size kept, Size bytes, int n,    \
                                 int m, int bits, const VALUE* bias, VALUE* out, int few,          \
                                 int threads) {                                                    \
    const Packed<VALUE> w{values, codes, rows, kept, bytes, n, m, bits};                           \
    few ? few_rows(w, x, batch, bias, out, threads) : batch_rows(w, x, batch, bias, out, threads); \
  }

PRODUCTS(float, f32)
PRODUCTS(Bfloat16, bf16)

#define UNPACK(BITS)                                                                               \
  EXPORT void sparsefx_nm_unpack_##BITS(const uint##BITS##_t* values, const uint8_t* codes,        \
                                        Size rows, Size kept, Size bytes, int n, int m, int bits,  \
                                        uint##BITS##_t* out, int threads) {                        \
    unpack(Packed<uint##BITS##_t>{values, codes, rows, kept, bytes, n, m, bits}, out, threads);    \
  }

#define PACK(BITS)                                                                                 \
  EXPORT void sparsefx_nm_pack_##BITS(const uint##BITS##_t* w, Size rows, Size depth, int n, int m, \
                                      int bits, uint##BITS##_t* values, Size bytes,                \
                                      uint8_t* codes, int threads) {                               \
    pack(w, rows, depth, n, m, bits, values, bytes, codes, threads);                               \
  }

PACK(16)
PACK(32)

UNPACK(16)
UNPACK(32)
UNPACK(64)

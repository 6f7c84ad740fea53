// Columns picked out of rows, and put back among the others, a row at a time while it is in cache.
// Elements are moved, never read as numbers, so one function serves all types of a size.

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "../memory.h"

namespace {

constexpr uintptr_t LINE = 64;  // bytes

bool outside(const int64_t* columns, int64_t k, int64_t size) {
  for (int64_t j = 0; j < k; ++j)
    if (columns[j] < 0 || columns[j] >= size) return true;
  return false;
}

// out[i, j] = x[i, columns[j]]; ldx in elements
template <typename Item>
void take(const Item* x, int64_t rows, int64_t ldx, const int64_t* columns, int64_t k, Item* out,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const Item* from = x + i * ldx;
    Item* to = out + i * k;
    for (int64_t j = 0; j < k; ++j) to[j] = from[columns[j]];
  }
}

// Write past the caches: a line that is overwritten whole need not be read first. Both are aligned.
void stream(char* out, const char* in, int64_t bytes) {
#if defined(__AVX512F__)
  for (int64_t b = 0; b < bytes; b += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + b), _mm512_load_si512(in + b));
#elif defined(__SSE2__)
  for (int64_t b = 0; b < bytes; b += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + b),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(in + b)));
#else
  std::memcpy(out, in, bytes);
#endif
}

// out[i, :] = rest[i] or 0, then out[i, columns[j]] = values[i, j]; ldv in elements
template <typename Item>
void put(const Item* values, int64_t rows, int64_t ldv, const int64_t* columns, int64_t k,
         const Item* rest, Item* out, int64_t size, int threads) {
  const int64_t bytes = size * sizeof(Item);
  const bool streams = rows * bytes >= LARGE && bytes % LINE == 0 &&
                       reinterpret_cast<uintptr_t>(out) % LINE == 0;
#pragma omp parallel num_threads(threads)
  {
    // every row has the same columns: what is between them in `line` stays zero
    std::vector<Item> memory(streams ? size + LINE / sizeof(Item) : 0);
    Item* line = reinterpret_cast<Item*>(
        (reinterpret_cast<uintptr_t>(memory.data()) + LINE - 1) & ~(LINE - 1));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const Item* from = values + i * ldv;
      Item* to = streams ? line : out + i * size;
      if (rest != nullptr) {
        for (int64_t j = 0; j < size; ++j) to[j] = rest[i];
      } else if (!streams) {
        std::memset(to, 0, bytes);
      }
      for (int64_t j = 0; j < k; ++j) to[columns[j]] = from[j];
      if (streams)
        stream(reinterpret_cast<char*>(out + i * size), reinterpret_cast<const char*>(line), bytes);
    }
#ifdef __SSE2__
    if (streams) _mm_sfence();
#endif
  }
}

// total[j] += the sum over ROWS rows of x[i, j], or of its square: one load and store of total each.
// In vectors by hand: what Inductor passes to the compiler forbids it to find them.
template <int ROWS, bool SQUARED, typename Real>
void add_rows(const Real* x, int64_t ldx, int64_t size, Real* total) {
  int64_t j = 0;
#ifdef __GNUC__
  typedef Real Vector __attribute__((vector_size(LINE)));
  constexpr int64_t LANES = LINE / sizeof(Real);
  for (; j + LANES <= size; j += LANES) {
    Vector sum, row;
    std::memcpy(&sum, total + j, LINE);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      std::memcpy(&row, x + i * ldx + j, LINE);
      sum += SQUARED ? row * row : row;
    }
    std::memcpy(total + j, &sum, LINE);
  }
#endif
  for (; j < size; ++j)
    for (int i = 0; i < ROWS; ++i) {
      const Real row = x[i * ldx + j];
      total[j] += SQUARED ? row * row : row;
    }
}

// out[j] = sum over i; few enough rows at a time that the prefetcher follows all, and errors stay small
template <bool SQUARED, typename Real>
void sum_rows(const Real* x, int64_t rows, int64_t ldx, int64_t size, Real* out, int threads) {
  constexpr int FEW = 16;
  std::vector<Real> totals(threads * size);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    Real* total = totals.data() + t * size;
    int64_t i = rows * t / threads;
    const int64_t last = rows * (t + 1) / threads;
    for (; i + FEW <= last; i += FEW) add_rows<FEW, SQUARED>(x + i * ldx, ldx, size, total);
    for (; i < last; ++i) add_rows<1, SQUARED>(x + i * ldx, ldx, size, total);
  }
  std::memset(out, 0, size * sizeof(Real));
  for (int t = 0; t < threads; ++t)
    for (int64_t j = 0; j < size; ++j) out[j] += totals[t * size + j];
}

}  // namespace

#define SUMS(REAL, BITS)                                                                          \
  EXPORT void sparsefx_sum_rows_f##BITS(const REAL* x, int64_t rows, int64_t ldx, int64_t size,   \
                                        REAL* out, int squared, int threads) {                    \
    squared ? sum_rows<true>(x, rows, ldx, size, out, threads)                                    \
            : sum_rows<false>(x, rows, ldx, size, out, threads);                                  \
  }

SUMS(float, 32)
SUMS(double, 64)

// Both return 0, or 1 when a column is outside the matrix and nothing was done.
#define MOVES(BITS)                                                                               \
  EXPORT int sparsefx_take_##BITS(const uint##BITS##_t* x, int64_t rows, int64_t size,            \
                                  int64_t ldx, const int64_t* columns, int64_t k,                 \
                                  uint##BITS##_t* out, int threads) {                             \
    if (outside(columns, k, size)) return 1;                                                      \
    expect_pages(out, rows * k * sizeof *out);                                                    \
    take(x, rows, ldx, columns, k, out, threads);                                                 \
    return 0;                                                                                     \
  }                                                                                               \
  EXPORT int sparsefx_put_##BITS(const uint##BITS##_t* values, int64_t rows, int64_t ldv,         \
                                 const int64_t* columns, int64_t k, const uint##BITS##_t* rest,   \
                                 uint##BITS##_t* out, int64_t size, int threads) {                \
    if (outside(columns, k, size)) return 1;                                                      \
    expect_pages(out, rows * size * sizeof *out);                                                 \
    put(values, rows, ldv, columns, k, rest, out, size, threads);                                 \
    return 0;                                                                                     \
  }

MOVES(8)
MOVES(16)
MOVES(32)
MOVES(64)

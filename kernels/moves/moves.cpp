// Columns picked out of rows, and put back among the others, a row at a time while it is in cache.
// Elements are moved, never read as numbers, so one function serves all types of a size.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../memory.h"
#include "../dispatch.h"

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

// out[i, :] = rest[i] or 0, then out[i, columns[j]] = values[i, j]; ldv and ldr in elements
template <typename Item>
void put(const Item* values, int64_t rows, int64_t ldv, const int64_t* columns, int64_t k,
         const Item* rest, int64_t ldr, Item* out, int64_t size, int threads) {
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
        for (int64_t j = 0; j < size; ++j) to[j] = rest[i * ldr];
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

// --- in the dispatcher

constexpr int64_t LANES = 16;  // float32 in the widest vector

// Whether rows lie in memory one element after the other.
bool by_rows(const Tensor& x) {
  return x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1);
}

bool are_columns(const Tensor& indices) {
  return indices.dim() == 1 && type_of(indices) == aoti_torch_dtype_int64() &&
         indices.is_contiguous();
}

// Elements of a size that is known; complex ones may stand for their conjugates.
bool movable(const Tensor& x) {
  return item_size(x) <= 8 && type_of(x) != aoti_torch_dtype_complex32() &&
         type_of(x) != aoti_torch_dtype_complex64();
}

const int64_t* columns_within(const Tensor& indices, int64_t size) {
  const auto* columns = static_cast<const int64_t*>(indices.data_ptr());
  const int64_t k = indices.size(0);
  if (outside(columns, k, size)) {
    const auto ends = std::minmax_element(columns, columns + k);
    TORCH_CHECK_INDEX(false, "columns ", *ends.first, " .. ", *ends.second, " of a matrix of ",
                      size, " columns");
  }
  return columns;
}

// Work(Item{}) with the unsigned integer of x's size.
template <typename Work>
void by_size(const Tensor& x, const Work& work) {
  switch (item_size(x)) {
    case 1: return work(uint8_t{});
    case 2: return work(uint16_t{});
    case 4: return work(uint32_t{});
    default: return work(uint64_t{});
  }
}

Tensor take_columns(const Tensor& x, const Tensor& indices) {
  if (!by_rows(x) || !are_columns(indices) || !movable(x))
    return reference("sparsefx_reference::take_columns", x, indices);
  const int64_t rows = x.size(0), k = indices.size(0);
  const int64_t* columns = columns_within(indices, x.size(1));
  const Tensor out = fresh(x, rows, k, k);
  by_size(x, [&](auto item) {
    using Item = decltype(item);
    auto* to = static_cast<Item*>(out.data_ptr());
    expect_pages(to, rows * k * sizeof(Item));
    take(static_cast<const Item*>(x.data_ptr()), rows, x.stride(0), columns, k, to,
         threads_for(rows * k));
  });
  return out;
}

bool multiplied(const Tensor& a, const Tensor& b, const Tensor& indices,
                const std::optional<Tensor>& rest) {
  const int32_t type = type_of(a);
  const bool known = type == aoti_torch_dtype_float32() || type == aoti_torch_dtype_float64() ||
                     type == aoti_torch_dtype_float16() || type == aoti_torch_dtype_bfloat16();
  const bool fits = a.dim() == 2 && b.dim() == 2 && type_of(b) == type &&
                    a.size(1) == b.size(0) && are_columns(indices) &&
                    indices.size(0) == b.size(1);
  return known && fits &&
         (!rest || (rest->dim() == 2 && type_of(*rest) == type &&
                    rest->size(0) == a.size(0) && rest->size(1) == 1));
}

// rows that start on a vector: an odd distance costs up to half as long again. The library writes
// 16-bit results through a copy.
Tensor product(const Tensor& a, const Tensor& b) {
  const int64_t k = b.size(1);
  const int64_t width = item_size(a) < 4 ? k : (k + LANES - 1) / LANES * LANES;
  const Tensor values = fresh(a, a.size(0), k, std::max<int64_t>(width, 1));
  TORCH_CHECK(!aoti_torch_cpu_mm_out(values.get(), a.get(), b.get()), "torch.mm failed");
  return values;
}

Tensor scattered_mm(const Tensor& a, const Tensor& b, const Tensor& indices, int64_t size,
                    const std::optional<Tensor>& rest) {
  if (!multiplied(a, b, indices, rest))
    return reference("sparsefx_reference::scattered_mm", a, b, indices, size, rest);
  const int64_t rows = a.size(0), k = b.size(1);
  const int64_t* columns = columns_within(indices, size);
  const Tensor values = product(a, b), out = fresh(a, rows, size, size);
  by_size(a, [&](auto item) {
    using Item = decltype(item);
    auto* to = static_cast<Item*>(out.data_ptr());
    expect_pages(to, rows * size * sizeof(Item));
    put(static_cast<const Item*>(values.data_ptr()), rows, values.stride(0), columns, k,
        rest ? static_cast<const Item*>(rest->data_ptr()) : nullptr, rest ? rest->stride(0) : 0,
        to, size, threads_for(rows * size));
  });
  return out;
}

template <typename Real>
void sum_into(const Tensor& x, bool squared, const Tensor& out) {
  const auto sums = squared ? sum_rows<true, Real> : sum_rows<false, Real>;
  sums(static_cast<const Real*>(x.data_ptr()), x.size(0), x.stride(0), x.size(1),
       static_cast<Real*>(out.data_ptr()), threads_for(x.numel()));
}

Tensor sums(const Tensor& x, bool squared) {
  const int32_t type = type_of(x);
  const bool single = type == aoti_torch_dtype_float32();
  if (!by_rows(x) || (!single && type != aoti_torch_dtype_float64()))
    return reference("sparsefx_reference::sum_rows", x, squared);
  const Tensor out = fresh(x, x.size(1));
  single ? sum_into<float>(x, squared, out) : sum_into<double>(x, squared, out);
  return out;
}

constexpr Kernel KERNELS[] = {
    {"take_columns", TORCH_BOX(&take_columns)},
    {"scattered_mm", TORCH_BOX(&scattered_mm)},
    {"sum_rows", TORCH_BOX(&sums)},
};

}  // namespace

EXPORT int sparsefx_enter(const char* op) { return enter(KERNELS, op); }

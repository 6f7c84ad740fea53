// Products with packed N:M weights, and the weights unpacked.

#include <optional>
#include <utility>

#include "../memory.h"
#include "../dispatch.h"
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

// --- in the dispatcher: few rows, where the host's time counts; cpu.py takes the rest

namespace {

int code_bits(int64_t m) { return m <= 2 ? 1 : m <= 4 ? 2 : m <= 16 ? 4 : 8; }

int64_t few_of(int64_t n, int64_t m) {  // rows of x up to which the weight is streamed: README.md
  const int64_t span = m / n;
  const bool shuffled = span * n == m && (span == 2 || span == 4 || span == 8) && 16 % n == 0 &&
                        (m <= 16 || span == 2);
  return shuffled ? 64 / span : 4;
}

bool lies_whole(const Tensor& x) { return x.dim() == 2 && x.is_contiguous() && x.numel() > 0; }

// Whether values and codes belong to a weight [rows, depth]: what follows reads what they promise.
bool are_packed(const Tensor& values, const Tensor& codes, int64_t n, int64_t m, int64_t depth) {
  const int64_t kept = values.size(1), groups = kept / n;
  return groups * n == kept && groups * m == depth && type_of(codes) == aoti_torch_dtype_uint8() &&
         codes.size(0) == values.size(0) && codes.size(1) == (kept * code_bits(m) + 7) / 8;
}

bool streams(const Tensor& x, const Tensor& values, const Tensor& codes,
             const std::optional<Tensor>& bias, int64_t n, int64_t m) {
  const int32_t type = type_of(x);
  const bool known = type == aoti_torch_dtype_float32() || type == aoti_torch_dtype_bfloat16();
  const bool sized = 1 <= n && n <= m && m <= 256;
  if (!known || !sized || !lies_whole(x) || !lies_whole(values) || !lies_whole(codes)) return false;
  const bool added = !bias || (bias->dim() == 1 && type_of(*bias) == type &&
                               bias->size(0) == values.size(0) && bias->is_contiguous());
  return added && type_of(values) == type && x.size(0) <= few_of(n, m) &&
         are_packed(values, codes, n, m, x.size(1));
}

template <typename Value>
void stream_into(const Tensor& out, const Tensor& x, const Tensor& values, const Tensor& codes,
                 const std::optional<Tensor>& bias, int64_t n, int64_t m) {
  const Packed<Value> w{static_cast<const Value*>(values.data_ptr()),
                        static_cast<const uint8_t*>(codes.data_ptr()),
                        values.size(0), values.size(1), codes.size(1), int(n), int(m),
                        code_bits(m)};
  few_rows(w, static_cast<const Value*>(x.data_ptr()), x.size(0),
           bias ? static_cast<const Value*>(bias->data_ptr()) : nullptr,
           static_cast<Value*>(out.data_ptr()), threads_for(values.numel()));
}

Tensor packed_mm(const Tensor& x, const Tensor& values, const Tensor& codes,
                 const std::optional<Tensor>& bias, int64_t n, int64_t m) {
  if (!streams(x, values, codes, bias, n, m))
    return reference("sparsefx_reference::nm_packed_mm", x, values, codes, bias, n, m);
  const Tensor out = fresh(x, x.size(0), values.size(0), values.size(0));
  const auto stream = type_of(x) == aoti_torch_dtype_float32() ? stream_into<float>
                                                               : stream_into<Bfloat16>;
  stream(out, x, values, codes, bias, n, m);
  return out;
}

constexpr Kernel KERNELS[] = {{"nm_packed_mm", TORCH_BOX(&packed_mm)}};

}  // namespace

EXPORT int sparsefx_enter(const char* op) { return enter(KERNELS, op); }

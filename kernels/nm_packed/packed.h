// A packed weight [R, K] as sparsefx/ops/packed.py lays it out, numbers, and 8 values or places at once.
// A code of m or above, which nm_pack never writes, is read as one below m: nothing outside is read.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

// Vectors as the machine has them; tests ask for fewer lanes.
#ifndef SPARSEFX_LANES
#define SPARSEFX_LANES 16
#endif
#if defined(__AVX2__) && defined(__FMA__) && SPARSEFX_LANES >= 8
#include <immintrin.h>
#define AVX2
#if defined(__AVX512F__) && defined(__AVX512BW__) && SPARSEFX_LANES >= 16
#define AVX512
#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define AVX512_BF16
#endif
#endif
#endif

namespace {

using Size = int64_t;
using Bfloat16 = uint16_t;  // the upper half of a float

constexpr int ROWS = 4;      // rows of the weight that share what is loaded of x
constexpr int AHEAD = 4096;  // bytes that are asked for before they are needed

template <typename Value>
struct Packed {
  const Value* values;
  const uint8_t* codes;
  Size rows, kept, bytes;  // bytes: of a row's codes
  int n, m, bits;

  // first columns of the groups of 8 values more than there are, so that no tail is special
  std::vector<int32_t> groups() const {
    std::vector<int32_t> first(kept + 8);
    for (Size j = 0; j < kept + 8; ++j) first[j] = j / n * m;
    return first;
  }
  Size depth() const { return kept / n * m; }
  Size padded() const { return depth() + 33 * m + 64; }  // columns that vectors of x may touch
};

// --- numbers

float wide(float value) { return value; }
float wide(Bfloat16 value) {
  const uint32_t bits = uint32_t{value} << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

void narrow(float value, float* to) { *to = value; }
void narrow(float value, Bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *to = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint64_t Words __attribute__((vector_size(64)));

uint64_t word(const uint8_t* codes, int bits) {  // that holds 8 codes
  uint64_t found = 0;
  switch (bits) {
    case 1: return codes[0];
    case 2: std::memcpy(&found, codes, 2); return found;
    case 4: std::memcpy(&found, codes, 4); return found;
    default: std::memcpy(&found, codes, 8); return found;
  }
}

Ints places(const uint8_t* codes, int bits, int m) {  // of 8 values
  const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const Words found = ((word(codes, bits) + Words{}) >> lanes * bits) & ((1u << bits) - 1);
  const Ints place = __builtin_convertvector(found, Ints), last = m - 1 + Ints{};
  return place > last ? last : place;
}

// sum + a * b: what Inductor passes to the compiler forbids it to fuse them
Eight fused(const Eight& a, const Eight& b, const Eight& sum) {
#ifdef AVX2
  return (Eight)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

Eight load(const float* values) {
  Eight found;
  std::memcpy(&found, values, sizeof found);
  return found;
}
Eight load(const Bfloat16* values) {
  typedef Bfloat16 Halves __attribute__((vector_size(16)));
  Halves halves;
  std::memcpy(&halves, values, sizeof halves);
  const Ints bits = __builtin_convertvector(halves, Ints) << 16;
  return (Eight)bits;
}

}  // namespace

// Numbers of C++ kernels, 8 of them at once, and what vectors the machine has.

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

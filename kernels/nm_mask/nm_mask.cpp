// Which n of every m consecutive magnitudes along an axis are the largest: README.md.

#include "../memory.h"
#include "../numbers.h"
#include "../rank.h"

namespace {

// One run of groups: element i of group g at [i * si + g * sg], of w and of out.
template <typename Bits>
void mark(Ranked& ranked, const Bits* w, Size si, Size sg, int count, int n, int m, uint8_t* out) {
  ranked.rank(w, si, sg, count, m);
  for (int i = 0; i < m; ++i)
    for (int g = 0; g < count; ++g) out[i * si + g * sg] = ranked.kept(i, g, n);
}

// w[outer, blocks, m, inner]: groups lie along memory where inner is 1, else side by side
template <typename Bits>
void mark_all(const Bits* w, Size outer, Size inner, int n, int m, uint8_t* out, int threads) {
  const bool along = inner == 1;
  const Size runs = along ? (outer + GROUPS - 1) / GROUPS : outer;
#pragma omp parallel num_threads(threads)
  {
    Ranked ranked;
#pragma omp for schedule(static)
    for (Size run = 0; run < runs; ++run) {
      if (along) {
        const Size first = run * GROUPS, count = std::min<Size>(GROUPS, outer - first);
        mark(ranked, w + first * m, 1, m, count, n, m, out + first * m);
        continue;
      }
      for (Size first = 0; first < inner; first += GROUPS) {
        const Size at = run * m * inner + first, count = std::min<Size>(GROUPS, inner - first);
        mark(ranked, w + at, inner, 1, count, n, m, out + at);
      }
    }
  }
}

}  // namespace

#define MARK(BITS)                                                                                 \
  EXPORT void sparsefx_nm_mask_##BITS(const uint##BITS##_t* w, Size outer, Size inner, int n,      \
                                      int m, uint8_t* out, int threads) {                          \
    mark_all(w, outer, inner, n, m, out, threads);                                                 \
  }

MARK(16)
MARK(32)

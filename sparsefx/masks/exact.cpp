// The best transposable masks of many tiles, one tile at a time: what flow.py computes, mask for
// mask. All numbers are integers below 2**53 held in doubles, so no sum is ever rounded and
// neither the order of additions nor the compiler's flags change a result.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

namespace {

constexpr int LARGEST = 64;
constexpr int BITS = 46;  // as in levels.py: a path's length stays below 2**53
constexpr double FAR = std::numeric_limits<double>::max();  // plus a level: still FAR

double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Bits of |value|: they order as the numbers do, and show NaN and infinity whatever the flags.
uint64_t magnitude_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7FFFFFFFFFFFFFFFull;
}

constexpr uint64_t INFINITE = 0x7FF0000000000000ull;

// |w| in units that make the largest finite one 2**(BITS - reserved); levels.py says why.
template <typename Real>
void integer_levels(const Real* w, int entries, double* level) {
  uint64_t top = 0;
  bool infinity = false, nan = false;
  for (int e = 0; e < entries; ++e) {
    const uint64_t bits = magnitude_bits(static_cast<double>(w[e]));
    nan |= bits > INFINITE;
    infinity |= bits == INFINITE;
    if (bits < INFINITE && bits > top) top = bits;
  }
  int room = 0;  // 2**room > entries
  while ((entries >> room) != 0) ++room;
  const int exponent = static_cast<int>(top >> 52) - 1022;  // 2**exponent > every finite |w|
  const int finite = BITS - (nan ? 2 * room : infinity ? room : 0);
  const int shift = finite - exponent, half = shift / 2;
  const double first = power_of_two(half), second = power_of_two(shift - half);
  for (int e = 0; e < entries; ++e)
    level[e] = std::nearbyint(std::fabs(static_cast<double>(w[e])) * first * second);
  if (!nan && !infinity) return;
  for (int e = 0; e < entries; ++e) {
    const uint64_t bits = magnitude_bits(static_cast<double>(w[e]));
    if (bits >= INFINITE) level[e] = power_of_two(finite + (bits > INFINITE ? 2 * room : room));
  }
}

// SIDE: the side of a full tile, known to the compiler; 0 stands for any tile up to 64 x 64.
template <int SIDE>
class Tile {
  static constexpr int WIDE = SIDE ? SIDE : LARGEST;
  int rows, cols;
  // give[j][i]: what row i loses when it gives up column j; FAR where it doesn't keep it.
  // take[i][j]: minus what row i gains when it takes column j; FAR where it keeps it already.
  double give[WIDE][WIDE], take[WIDE][WIDE];
  double to_row[WIDE], to_col[WIDE];      // lengths of the shortest paths known
  double from_col[WIDE], from_row[WIDE];  // the node before, on those paths
  int count[WIDE];

  // Keep the `limit` largest of each row; of equals, the earlier.
  void start(const double* level, int limit) {
    for (int j = 0; j < cols; ++j) count[j] = 0;
    for (int i = 0; i < rows; ++i) {
      const double* row = level + i * cols;
      int beaten[WIDE] = {};
      for (int j = 0; j < cols; ++j)
        for (int k = 0; k < cols; ++k)
          beaten[k] += (row[j] > row[k]) | ((row[j] == row[k]) & (j < k));
      for (int j = 0; j < cols; ++j) {
        const bool kept = beaten[j] < limit;
        give[j][i] = kept ? row[j] : FAR;
        take[i][j] = kept ? FAR : -row[j];
        count[j] += kept;
      }
    }
  }

  // Bellman-Ford from all columns over the limit at once; true when there is one.
  bool shortest_paths(int limit) {
    bool news[WIDE], any = false;
    for (int j = 0; j < cols; ++j) {
      news[j] = count[j] > limit;
      any |= news[j];
      to_col[j] = news[j] ? 0.0 : FAR;
      from_row[j] = -1;
    }
    if (!any) return false;
    for (int i = 0; i < rows; ++i) to_row[i] = FAR;
    while (any) {
      double before[WIDE];
      for (int i = 0; i < rows; ++i) before[i] = to_row[i];
      for (int j = 0; j < cols; ++j) {
        if (!news[j]) continue;
        const double length = to_col[j];
        for (int i = 0; i < rows; ++i) {
          const double way = length + give[j][i];
          from_col[i] = way < to_row[i] ? j : from_col[i];
          to_row[i] = way < to_row[i] ? way : to_row[i];
        }
      }
      double known[WIDE];
      for (int j = 0; j < cols; ++j) known[j] = to_col[j];
      for (int i = 0; i < rows; ++i) {
        if (to_row[i] == before[i]) continue;
        const double length = to_row[i];
        for (int j = 0; j < cols; ++j) {
          const double way = length + take[i][j];
          from_row[j] = way < to_col[j] ? i : from_row[j];
          to_col[j] = way < to_col[j] ? way : to_col[j];
        }
      }
      any = false;
      for (int j = 0; j < cols; ++j) any |= news[j] = to_col[j] < known[j];
    }
    return true;
  }

  // Shift one entry along the shortest path to a column below the limit.
  void shift(const double* level, int limit) {
    int end = -1;
    for (int j = 0; j < cols; ++j)
      if (count[j] < limit && (end < 0 || to_col[j] < to_col[end])) end = j;
    ++count[end];
    while (from_row[end] >= 0) {
      const int i = static_cast<int>(from_row[end]), j = static_cast<int>(from_col[i]);
      take[i][end] = FAR, give[end][i] = level[i * cols + end];
      take[i][j] = -level[i * cols + j], give[j][i] = FAR;
      end = j;
    }
    --count[end];
  }

 public:
  Tile(int a, int b) : rows(SIDE ? SIDE : a), cols(SIDE ? SIDE : b) {}

  void solve(const double* level, int row_limit, int col_limit) {
    start(level, row_limit);
    while (shortest_paths(col_limit)) shift(level, col_limit);
  }

  bool kept(int i, int j) const { return take[i][j] == FAR; }
};

template <int SIDE>
void solve_tile(const double* level, int a, int b, int n, uint8_t* mask) {
  const int row_limit = n < b ? n : b, col_limit = n < a ? n : a;
  if (a * row_limit <= b * col_limit) {  // every row can be filled
    Tile<SIDE> tile(a, b);
    tile.solve(level, row_limit, col_limit);
    for (int i = 0; i < a; ++i)
      for (int j = 0; j < b; ++j) mask[i * b + j] = tile.kept(i, j);
    return;
  }
  double turned[LARGEST * LARGEST];
  for (int i = 0; i < a; ++i)
    for (int j = 0; j < b; ++j) turned[j * a + i] = level[i * b + j];
  Tile<SIDE> tile(b, a);
  tile.solve(turned, col_limit, row_limit);
  for (int i = 0; i < a; ++i)
    for (int j = 0; j < b; ++j) mask[i * b + j] = tile.kept(j, i);
}

template <typename Real>
void solve_tiles(const Real* w, int64_t tiles, int a, int b, int n, uint8_t* mask, int threads) {
  const int64_t size = static_cast<int64_t>(a) * b;
  const int side = a == b ? a : 0;
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
  for (int64_t t = 0; t < tiles; ++t) {
    double level[LARGEST * LARGEST];
    integer_levels(w + t * size, static_cast<int>(size), level);
    uint8_t* kept = mask + t * size;
    if (side == 8) {
      solve_tile<8>(level, a, b, n, kept);
    } else if (side == 16) {
      solve_tile<16>(level, a, b, n, kept);
    } else {
      solve_tile<0>(level, a, b, n, kept);
    }
  }
}

}  // namespace

EXPORT void sparsefx_exact_f32(const float* w, int64_t tiles, int a, int b, int n, uint8_t* mask,
                               int threads) {
  solve_tiles(w, tiles, a, b, n, mask, threads);
}

EXPORT void sparsefx_exact_f64(const double* w, int64_t tiles, int a, int b, int n, uint8_t* mask,
                               int threads) {
  solve_tiles(w, tiles, a, b, n, mask, threads);
}

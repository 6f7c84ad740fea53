// Batches: x is laid out [K, WIDTH] for WIDTH rows at a time, so that a kept value meets a contiguous
// line of x, and sums stay in registers over a panel of columns that a core's caches hold.

namespace {

constexpr int WIDTH = 64;         // rows of x
constexpr int LINE = 16;          // float in 64 bytes
constexpr int PANEL_KEPT = 64;    // values of a row between two times that its sums go to memory
constexpr Size CHUNK = 1 << 16;   // values of rows that use a panel in turns
constexpr Size LEAST_ROWS = 16, MOST_ROWS = 256;  // of the weight

#ifdef AVX512
typedef float Vector __attribute__((vector_size(64)));
Vector fused(const Vector& a, const Vector& b, const Vector& sum) {
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
Vector everywhere(float value) { return (Vector)_mm512_set1_ps(value); }
#elif defined(AVX2)
using Vector = Eight;
Vector everywhere(float value) { return (Vector)_mm256_set1_ps(value); }
#else
using Vector = Eight;
Vector everywhere(float value) { return value + Vector{}; }
#endif
constexpr int LANES = sizeof(Vector) / sizeof(float);

// sums[0 .. LINES * LINE) += values[j] * panel[columns[j], :]
template <int LINES>
void add_lines(const float* panel, const uint16_t* columns, const float* values, int count,
               float* sums) {
  constexpr int VECTORS = LINES * LINE / LANES;
  Vector sum[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) std::memcpy(&sum[v], sums + v * LANES, sizeof(Vector));
#pragma GCC unroll 2
  for (int j = 0; j < count; ++j) {
    const float* from = panel + columns[j] * WIDTH;
    const Vector value = everywhere(values[j]);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      Vector x;
      std::memcpy(&x, from + v * LANES, sizeof x);
      sum[v] = fused(value, x, sum[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) std::memcpy(sums + v * LANES, &sum[v], sizeof(Vector));
}

float* on_a_line(float* memory) {
  const uintptr_t bytes = LINE * sizeof(float), at = reinterpret_cast<uintptr_t>(memory);
  return reinterpret_cast<float*>((at + bytes - 1) / bytes * bytes);
}

// tile[k, i] = x[i, k] for `count` rows of x and columns from .. to, zeros for the other rows
template <typename Value>
void lay_out(const Value* x, Size ldx, Size count, Size from, Size to, float* tile) {
  for (Size first = from; first < to; first += LINE) {
    const Size last = std::min(first + LINE, to);
    for (Size i = 0; i < WIDTH; ++i)
      for (Size k = first; k < last; ++k)
        tile[k * WIDTH + i] = i < count ? wide(x[i * ldx + k]) : 0;
  }
}

// out[i, r] = sums[r, i] + bias[r]
template <typename Value>
void lay_back(const float* sums, Size count, Size rows, const Value* bias, Value* out, Size ldo) {
  for (Size first = 0; first < rows; first += LINE) {
    const Size last = std::min(first + LINE, rows);
    for (Size i = 0; i < count; ++i)
      for (Size r = first; r < last; ++r)
        narrow(sums[r * WIDTH + i] + (bias ? wide(bias[r]) : 0), out + i * ldo + r);
  }
}

constexpr Size tiles(Size batch) { return (batch + WIDTH - 1) / WIDTH; }
constexpr Size height(Size batch, Size tile) { return std::min<Size>(WIDTH, batch - tile * WIDTH); }

// All of x[batch, depth] as tiles [depth, WIDTH], one behind the other; by all threads around.
template <typename Value>
void lay_out_all(const Value* x, Size batch, Size depth, float* laid) {
  const Size slice = 256, slices = (depth + slice - 1) / slice;
#pragma omp for schedule(static)
  for (Size at = 0; at < tiles(batch) * slices; ++at) {
    const Size t = at / slices, from = at % slices * slice;
    lay_out(x + t * WIDTH * depth, depth, height(batch, t), from, std::min(from + slice, depth),
            laid + t * depth * WIDTH);
  }
}

// how so many rows of x are added
decltype(&add_lines<1>) adding(Size count) {
  constexpr decltype(&add_lines<1>) ways[] = {add_lines<1>, add_lines<2>, add_lines<3>,
                                              add_lines<4>};
  return ways[(count - 1) / LINE];
}

}  // namespace

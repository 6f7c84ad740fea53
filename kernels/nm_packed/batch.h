// Batches: x is laid out [K, WIDTH] for WIDTH rows at a time, so that a kept value meets a contiguous
// line of x, and sums stay in registers over a panel of columns that a core's caches hold.

constexpr int WIDTH = 64;        // rows of x
constexpr Size PANEL_KEPT = 32;  // values of a row between two times that its sums go to memory
constexpr Size CHUNK = 256;      // rows of the weight that use a panel in turns

constexpr int LINE = 16;           // float in 64 bytes

#ifdef AVX512
typedef float Vector __attribute__((vector_size(64)));
Vector fused(const Vector& a, const Vector& b, const Vector& sum) {
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
#else
using Vector = Eight;
#endif
constexpr int LANES = sizeof(Vector) / sizeof(float);

// sums[0 .. LINES * LINE) += values[j] * panel[starts[j] ..]
template <int LINES>
void add_lines(const float* panel, const int32_t* starts, const float* values, int count, float* sums) {
  constexpr int VECTORS = LINES * LINE / LANES;
  Vector sum[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) std::memcpy(&sum[v], sums + v * LANES, sizeof(Vector));
  for (int j = 0; j < count; ++j) {
    const float* from = panel + starts[j];
    const Vector value = values[j] + Vector{};
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

// Where the values from .. to of a row find their x's in a panel, and what they are, in float.
template <typename Value>
void read(const Packed<Value>& w, const int32_t* groups, Size row, Size from, Size to,
          int32_t* starts, float* values) {
  const Value* value = w.values + row * w.kept;
  const uint8_t* codes = w.codes + row * w.bytes + from / 8 * w.bits;
  const Size first = groups[from];
  Size j = from;
  for (; j < to; j += 8, codes += w.bits) {
    Value rest[8] = {};
    uint8_t bits[8] = {};
    const bool whole = j + 8 <= to;
    if (!whole) {
      std::memcpy(rest, value + j, (to - j) * sizeof(Value));
      std::memcpy(bits, codes, w.codes + (row + 1) * w.bytes - codes);
    }
    Ints group;
    std::memcpy(&group, groups + j, sizeof group);
    const Ints start = (group - static_cast<int>(first) + places(whole ? codes : bits, w.bits, w.m)) * WIDTH;
    const Eight found = load(whole ? value + j : rest);
    std::memcpy(starts + j - from, &start, sizeof start);
    std::memcpy(values + j - from, &found, sizeof found);
  }
}

// Kept values of a panel: whole groups, and whole bytes of codes.
template <typename Value>
Size panel_of(const Packed<Value>& w) {
  Size kept = w.n;
  while (kept % 8) kept += w.n;
  return kept * std::max<Size>(1, PANEL_KEPT / kept);
}

template <typename Value>
void batch_rows(const Packed<Value>& w, const Value* x, Size batch, const Value* bias, Value* out,
                int threads) {
  const Size depth = w.depth(), panel = panel_of(w), tiles = (batch + WIDTH - 1) / WIDTH;
  const Size chunks = (w.rows + CHUNK - 1) / CHUNK;
  const std::vector<int32_t> groups = w.groups();
  const std::unique_ptr<float[]> memory(new float[tiles * depth * WIDTH + LINE]);
  float* const laid = on_a_line(memory.get());
#pragma omp parallel num_threads(threads)
  {
    const Size slice = 256, slices = (depth + slice - 1) / slice;
#pragma omp for schedule(static)
    for (Size at = 0; at < tiles * slices; ++at) {
      const Size tile = at / slices, from = at % slices * slice;
      lay_out(x + tile * WIDTH * depth, depth, std::min<Size>(WIDTH, batch - tile * WIDTH), from,
              std::min(from + slice, depth), laid + tile * depth * WIDTH);
    }
    std::vector<float> room(CHUNK * WIDTH + LINE), values(panel + 8);
    float* const sums = on_a_line(room.data());
    std::vector<int32_t> starts(panel + 8);
#pragma omp for schedule(dynamic)
    for (Size at = 0; at < tiles * chunks; ++at) {
      const Size tile = at % tiles, first = at / tiles * CHUNK;
      const Size last = std::min(first + CHUNK, w.rows), count = std::min<Size>(WIDTH, batch - tile * WIDTH);
      const int lines = (count + LINE - 1) / LINE;
      std::memset(sums, 0, CHUNK * WIDTH * sizeof(float));
      for (Size from = 0; from < w.kept; from += panel) {
        const Size to = std::min(from + panel, w.kept);
        const float* columns = laid + (tile * depth + groups[from]) * WIDTH;
        for (Size row = first; row < last; ++row) {
          float* sum = sums + (row - first) * WIDTH;
          __builtin_prefetch(w.values + std::min(row + 8, w.rows - 1) * w.kept + from);
          read(w, groups.data(), row, from, to, starts.data(), values.data());
          switch (lines) {
            case 1: add_lines<1>(columns, starts.data(), values.data(), to - from, sum); break;
            case 2: add_lines<2>(columns, starts.data(), values.data(), to - from, sum); break;
            case 3: add_lines<3>(columns, starts.data(), values.data(), to - from, sum); break;
            default: add_lines<4>(columns, starts.data(), values.data(), to - from, sum);
          }
        }
      }
      lay_back(sums, count, last - first, bias ? bias + first : bias,
               out + tile * WIDTH * w.rows + first, w.rows);
    }
  }
}

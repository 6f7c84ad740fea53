// Batches: x is laid out [K, WIDTH] for WIDTH rows at a time, so that a kept value meets a contiguous
// line of x, and sums stay in registers over a panel of columns that a core's caches hold.

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

// The columns that the values of a row meet, counted from where their panel starts.
template <typename Value>
void read(const Packed<Value>& w, Size row, const std::vector<int32_t>& groups, Size panel,
          uint16_t* columns) {
  typedef uint16_t Columns __attribute__((vector_size(16)));
  const uint8_t* codes = w.codes + row * w.bytes;
  for (Size from = 0; from < w.kept; from += panel)
    for (Size j = from; j < std::min(from + panel, w.kept); j += 8, codes += w.bits) {
      uint8_t rest[8] = {};
      const Size left = w.codes + (row + 1) * w.bytes - codes;
      if (left < w.bits) std::memcpy(rest, codes, left);
      Ints group;
      std::memcpy(&group, groups.data() + j, sizeof group);
      const Ints found = group - groups[from] + places(left < w.bits ? rest : codes, w.bits, w.m);
      const Columns found16 = __builtin_convertvector(found, Columns);
      std::memcpy(columns + j, &found16, sizeof found16);
    }
}

const float* in_float(const float* values, Size, float*) { return values; }
const float* in_float(const Bfloat16* values, Size count, float* room) {
  for (Size j = 0; j < count; ++j) room[j] = wide(values[j]);
  return room;
}

// Kept values of a panel: whole groups, and whole bytes of codes.
template <typename Value>
Size panel_of(const Packed<Value>& w) {
  Size kept = w.n;
  while (kept % 8) kept += w.n;
  return kept * std::max<Size>(1, PANEL_KEPT / kept);
}

template <typename Value>
struct Batch {
  const Packed<Value>& w;
  const Value *x, *bias;
  Value* out;
  Size batch;
  const Size panel = panel_of(w), depth = w.depth();
  const Size chunk = std::clamp(CHUNK / w.kept, LEAST_ROWS, MOST_ROWS);
  const Size ldc = w.kept + 8;  // columns
  const std::vector<int32_t> groups = w.groups();

  // sums[r, i] for the rows of a chunk and one tile of x
  void multiply(Size rows, const float* laid, const uint16_t* columns, const float* values,
                Size count, float* sums) const {
    std::memset(sums, 0, rows * WIDTH * sizeof(float));
    constexpr decltype(&add_lines<1>) ways[] = {add_lines<1>, add_lines<2>, add_lines<3>,
                                                add_lines<4>};
    const auto add = ways[(count - 1) / LINE];
    for (Size from = 0; from < w.kept; from += panel) {
      const float* lines = laid + groups[from] * WIDTH;
      const int kept = std::min(panel, w.kept - from);
      for (Size r = 0; r < rows; ++r)
        add(lines, columns + r * ldc + from, values + r * w.kept + from, kept, sums + r * WIDTH);
    }
  }

  void run(int threads) const {
    const Size tiles = (batch + WIDTH - 1) / WIDTH;
    const auto height = [&](Size t) { return std::min<Size>(WIDTH, batch - t * WIDTH); };
    const std::unique_ptr<float[]> memory(new float[tiles * depth * WIDTH + LINE]);
    float* const laid = on_a_line(memory.get());
#pragma omp parallel num_threads(threads)
    {
      const Size slice = 256, slices = (depth + slice - 1) / slice;
#pragma omp for schedule(static)
      for (Size at = 0; at < tiles * slices; ++at) {
        const Size t = at / slices, from = at % slices * slice;
        lay_out(x + t * WIDTH * depth, depth, height(t), from, std::min(from + slice, depth),
                laid + t * depth * WIDTH);
      }
      std::vector<float> room(chunk * WIDTH + LINE), floats(sizeof(Value) < 4 ? chunk * w.kept : 0);
      std::vector<uint16_t> columns(chunk * ldc);
      float* const sums = on_a_line(room.data());
#pragma omp for schedule(dynamic)
      for (Size first = 0; first < w.rows; first += chunk) {
        const Size rows = std::min(chunk, w.rows - first);
        for (Size r = 0; r < rows; ++r) read(w, first + r, groups, panel, columns.data() + r * ldc);
        const float* values = in_float(w.values + first * w.kept, rows * w.kept, floats.data());
        for (Size t = 0; t < tiles; ++t) {
          multiply(rows, laid + t * depth * WIDTH, columns.data(), values, height(t), sums);
          lay_back(sums, height(t), rows, bias ? bias + first : bias,
                   out + t * WIDTH * w.rows + first, w.rows);
        }
      }
    }
  }
};

template <typename Value>
void batch_rows(const Packed<Value>& w, const Value* x, Size batch, const Value* bias, Value* out,
                int threads) {
  Batch<Value>{w, x, bias, out, batch}.run(threads);
}

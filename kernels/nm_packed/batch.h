// Batches (../lines.h): 64 kept values of some rows of the weight use a panel of x in turns.

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
    const auto add = adding(count);
    for (Size from = 0; from < w.kept; from += panel) {
      const float* lines = laid + groups[from] * WIDTH;
      const int kept = std::min(panel, w.kept - from);
      for (Size r = 0; r < rows; ++r)
        add(lines, columns + r * ldc + from, values + r * w.kept + from, kept, sums + r * WIDTH);
    }
  }

  void run(int threads) const {
    const std::unique_ptr<float[]> memory(new float[tiles(batch) * depth * WIDTH + LINE]);
    float* const laid = on_a_line(memory.get());
#pragma omp parallel num_threads(threads)
    {
      lay_out_all(x, batch, depth, laid);
      std::vector<float> room(chunk * WIDTH + LINE), floats(sizeof(Value) < 4 ? chunk * w.kept : 0);
      std::vector<uint16_t> columns(chunk * ldc);
      float* const sums = on_a_line(room.data());
#pragma omp for schedule(dynamic)
      for (Size first = 0; first < w.rows; first += chunk) {
        const Size rows = std::min(chunk, w.rows - first);
        for (Size r = 0; r < rows; ++r) read(w, first + r, groups, panel, columns.data() + r * ldc);
        const float* values = in_float(w.values + first * w.kept, rows * w.kept, floats.data());
        for (Size t = 0; t < tiles(batch); ++t) {
          multiply(rows, laid + t * depth * WIDTH, columns.data(), values, height(batch, t), sums);
          lay_back(sums, height(batch, t), rows, bias ? bias + first : bias,
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

// y = x @ where(mask, w, 0) + bias, of which little is kept: README.md.

#include "../memory.h"
#include "../numbers.h"
#include "../lines.h"

namespace {

constexpr Size BLOCK = 64;               // mask bytes that are looked at together
constexpr Size MOST_COLUMNS = 2048;      // of a panel
constexpr Size AHEAD_LINES = 4;          // that are asked for before they are needed
constexpr Size MOST_TAKEN = 1024;        // outputs whose weights are taken from lines at once
constexpr Size SAMPLED = 32;             // lines of the mask, for an estimate of its density

// which of 64 bytes are not zero
uint64_t where_kept(const uint8_t* mask) {
#ifdef AVX512
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(AVX2)
  const __m256i zero = _mm256_setzero_si256();
  const auto half = [&](const uint8_t* from) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)from);
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, zero));
  };
  return half(mask) | uint64_t{half(mask + 32)} << 32;
#else
  uint64_t found = 0;
  for (int i = 0; i < BLOCK; ++i) found |= uint64_t{mask[i] != 0} << i;
  return found;
#endif
}

uint64_t where_kept(const uint8_t* mask, Size count) {
  if (count >= BLOCK) return where_kept(mask);
  uint8_t bytes[BLOCK] = {};
  std::memcpy(bytes, mask, count);
  return where_kept(bytes);
}

struct Weight {  // w and mask as stored, [lines, length]
  const float* w;
  const uint8_t* mask;
  Size ldw, ldm, depth, outputs;
  bool along;  // whether the weights of an output lie one behind the other: lines are outputs

  double density() const {
    const Size lines = along ? outputs : depth, length = along ? depth : outputs;
    const Size step = std::max<Size>(1, lines / SAMPLED);
    Size kept = 0, seen = 0;
    for (Size line = step / 2; line < lines; line += step, seen += length)
      for (Size i = 0; i < length; i += BLOCK)
        kept += __builtin_popcountll(where_kept(mask + line * ldm + i, length - i));
    return seen ? double(kept) / seen : 1;
  }
};

// What is kept of some outputs, a panel of columns after the other: ends[p, r] values of output r
// lie before panel p + 1; columns count from where their panel starts.
struct Kept {
  Size rows, room, panel, panels;
  std::unique_ptr<float[]> values;
  std::unique_ptr<uint16_t[]> columns;
  std::vector<int32_t> starts;  // [panels + 1, rows]

  Kept(Size rows, Size depth, Size panel)
      : rows(rows), room(depth + 48), panel(panel), panels((depth + panel - 1) / panel),
        values(new float[rows * room]), columns(new uint16_t[rows * room]),
        starts((panels + 1) * rows) {}

  // outputs first .. first + count, whose weights are lines
  void take_lines(const Weight& w, Size first, Size count) {
    for (Size r = 0; r < count; ++r) {
      Size at = 0;
      for (Size p = 0; p < panels; ++p) {
        const Size from = p * panel, to = std::min(from + panel, w.depth);
        const float* line = w.w + (first + r) * w.ldw;
        const uint8_t* mask = w.mask + (first + r) * w.ldm;
        for (Size k = from; k < to; k += BLOCK)
          at = take(line + k, where_kept(mask + k, to - k), k - from, to - k, r * room, at);
        starts[(p + 1) * rows + r] = at;
      }
    }
  }

  // those of a block that are kept; returns how many values the output has then
  Size take(const float* line, uint64_t kept, Size column, Size left, Size base, Size at) {
    float* const to = values.get() + base;
    uint16_t* const places = columns.get() + base;
#ifdef AVX512
    if (left >= BLOCK) {
      const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
      for (int i = 0; i < BLOCK; i += 16) {
        const __mmask16 own = kept >> i;
        const __m512i found = _mm512_add_epi32(lanes, _mm512_set1_epi32(column + i));
        _mm512_storeu_ps(to + at, _mm512_maskz_compress_ps(own, _mm512_loadu_ps(line + i)));
        _mm256_storeu_si256((__m256i*)(places + at),
                            _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(own, found)));
        at += __builtin_popcount(own);
      }
      return at;
    }
#else
    (void)left;
#endif
    for (; kept; kept &= kept - 1, ++at) {
      const int i = __builtin_ctzll(kept);
      to[at] = line[i];
      places[at] = column + i;
    }
    return at;
  }

  // Outputs first .. first + count, whose weights are columns of what is stored. Each line lies in
  // pages of its own: those of a panel are used in turns while their addresses are still known.
  void take_across(const Weight& w, Size first, Size count) {
    std::vector<int32_t> at(rows);
    for (Size p = 0; p < panels; ++p) {
      for (Size r = 0; r < count; r += BLOCK)
        take_block(w, first + r, p, std::min(BLOCK, count - r), r, at.data() + r);
      std::memcpy(starts.data() + (p + 1) * rows, at.data(), rows * sizeof(int32_t));
    }
  }

  void take_block(const Weight& w, Size first, Size p, Size count, Size base, int32_t* at) {
    const Size from = p * panel, to = std::min(from + panel, w.depth);
    for (Size k = from; k < to; ++k) {
      const float* line = w.w + k * w.ldw + first;
      const uint8_t* mask = w.mask + k * w.ldm + first;
      if (k + AHEAD_LINES < to) {
        __builtin_prefetch(mask + AHEAD_LINES * w.ldm);
        for (Size r = 0; r < count; r += LINE) __builtin_prefetch(line + AHEAD_LINES * w.ldw + r);
      }
      for (uint64_t kept = where_kept(mask, count); kept; kept &= kept - 1) {
        const Size r = __builtin_ctzll(kept), place = (base + r) * room + at[r]++;
        values[place] = line[r];
        columns[place] = k - from;
      }
    }
  }

  // sums[r, i] of outputs first .. and one tile of x, of which `height` rows count
  void multiply(Size first, Size count, const float* laid, Size height, float* sums) const {
    std::memset(sums, 0, count * WIDTH * sizeof(float));
    const auto add = adding(height);
    for (Size p = 0; p < panels; ++p)
      for (Size i = 0, r = first; i < count; ++i, ++r) {
        const Size from = starts[p * rows + r], to = starts[(p + 1) * rows + r];
        add(laid + p * panel * WIDTH, columns.get() + r * room + from,
            values.get() + r * room + from, to - from, sums + i * WIDTH);
      }
  }
};

Size blocks(double count, Size least, Size most) {  // whole ones
  return std::clamp(Size(count) / BLOCK * BLOCK, least, most);
}

struct Product {
  const Weight& w;
  const float *x, *bias;
  float* out;
  Size batch;

  // outputs first .. first + count, of which Kept holds those from `base` on
  void multiply(const Kept& kept, Size base, Size first, Size count, const float* laid,
                float* sums) const {
    for (Size t = 0; t < tiles(batch); ++t) {
      kept.multiply(first - base, count, laid + t * w.depth * WIDTH, height(batch, t), sums);
      lay_back(sums, height(batch, t), count, bias ? bias + first : bias,
               out + t * WIDTH * w.outputs + first, w.outputs);
    }
  }

  void run(double density, int threads) const {
    const Size panel = blocks(PANEL_KEPT / density, BLOCK, MOST_COLUMNS);
    const Size rows = blocks(CHUNK / (density * w.depth), BLOCK, MOST_ROWS);
    const Size taken = w.along ? rows : blocks(w.outputs / threads, rows, MOST_TAKEN);
    const std::unique_ptr<float[]> memory(new float[tiles(batch) * w.depth * WIDTH + LINE]);
    float* const laid = on_a_line(memory.get());
#pragma omp parallel num_threads(threads)
    {
      lay_out_all(x, batch, w.depth, laid);
      std::vector<float> room(rows * WIDTH + LINE);
      float* const sums = on_a_line(room.data());
      Kept kept(taken, w.depth, panel);
#pragma omp for schedule(dynamic)
      for (Size base = 0; base < w.outputs; base += taken) {
        const Size end = std::min(base + taken, w.outputs);
        w.along ? kept.take_lines(w, base, end - base) : kept.take_across(w, base, end - base);
        for (Size first = base; first < end; first += rows)
          multiply(kept, base, first, std::min(rows, end - first), laid, sums);
      }
    }
  }
};

}  // namespace

// 0, and nothing is written, where more than `most` of the mask seems to be kept
EXPORT int sparsefx_masked_mm(const float* x, Size batch, const float* w, const uint8_t* mask,
                              Size ldw, Size ldm, Size depth, Size outputs, int along, double most,
                              const float* bias, float* out, int threads) {
  const Weight weight{w, mask, ldw, ldm, depth, outputs, along != 0};
  const double density = weight.density();
  if (density > most) return 0;
  Product{weight, x, bias, out, batch}.run(std::max(density, 1.0 / 1024), threads);
  return 1;
}

// Few rows of x: the weight is streamed once, and the x's that some values of a row meet are picked by
// shuffles of vectors that hold all the columns these values may stand in.

// Any pattern: 8 loads, one for each value.
template <typename Given>
struct Gathered {
  using Value = Given;
  using X = float;
  using Sum = Eight;
  static constexpr int LANES = 8;
  struct Picks {
    Ints columns;
    Eight values;
  };
  int m, bits;
  std::vector<int32_t> first;

  explicit Gathered(const Packed<Value>& w) : m(w.m), bits(w.bits), first(w.groups()) {}
  Size start(Size) const { return 0; }
  Picks read(const Value* values, const uint8_t* codes, Size j) const {
    Ints group;
    std::memcpy(&group, first.data() + j, sizeof group);
    return {group + places(codes, bits, m), load(values)};
  }
  void add(Sum& sum, const Picks& picks, const float* x) const {
#ifdef AVX2
    const Eight found = (Eight)_mm256_i32gather_ps(x, (__m256i)picks.columns, 4);
#else
    Eight found;
    for (int i = 0; i < 8; ++i) found[i] = x[picks.columns[i]];
#endif
    sum = fused(picks.values, found, sum);
  }
  static float total(const Sum& sum) {
    float found = 0;
    for (int i = 0; i < 8; ++i) found += sum[i];
    return found;
  }
};

#ifdef AVX512
// n divides 16 and m = n * SPAN: 16 values meet 16 * SPAN columns, which SPAN vectors of x hold.
template <int BITS, int SPAN>
struct Floats {
  using Value = float;
  using X = float;
  using Sum = __m512;
  static constexpr int LANES = 16;
  struct Picks {
    __m512i columns;
    __m512 values;
  };
  __m512i group, shifts, below;

  explicit Floats(const Packed<float>& w) : below(_mm512_set1_epi32(w.m - 1)) {
    alignas(64) int32_t first[16], shift[16];
    for (int i = 0; i < 16; ++i) first[i] = i / w.n * w.m, shift[i] = i * BITS % 32;
    group = _mm512_load_si512(first), shifts = _mm512_load_si512(shift);
  }
  Size start(Size j) const { return j * SPAN; }
  static __m512i spread(const uint8_t* codes) {
    if constexpr (BITS == 8)
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    uint64_t bits = 0;
    std::memcpy(&bits, codes, 2 * BITS > 8 ? 8 : 2 * BITS);
    const __m512i low = _mm512_set1_epi32(static_cast<int>(bits));
    if constexpr (BITS < 4) return low;
    return _mm512_inserti64x4(low, _mm256_set1_epi32(static_cast<int>(bits >> 32)), 1);
  }
  Picks read(const float* values, const uint8_t* codes, Size) const {
    __m512i found = spread(codes);
    if constexpr (BITS < 8) found = _mm512_srlv_epi32(found, shifts);
    // (found & below) | group
    return {_mm512_ternarylogic_epi32(found, below, group, 0xea), _mm512_loadu_ps(values)};
  }
  template <int VECTORS>
  static __m512 pick(const __m512i& columns, const float* x) {
    if constexpr (VECTORS == 2) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(x), columns, _mm512_loadu_ps(x + 16));
    } else {
      const __mmask16 upper = _mm512_test_epi32_mask(columns, _mm512_set1_epi32(8 * VECTORS));
      return _mm512_mask_blend_ps(upper, pick<VECTORS / 2>(columns, x),
                                  pick<VECTORS / 2>(columns, x + 8 * VECTORS));
    }
  }
  void add(Sum& sum, const Picks& picks, const float* x) const {
    sum = _mm512_fmadd_ps(picks.values, pick<SPAN>(picks.columns, x), sum);
  }
  static float total(const Sum& sum) { return _mm512_reduce_add_ps(sum); }
};
#endif

#ifdef AVX512_BF16
// The same for 32 values at once; an instruction sums pairs of products in float.
template <int BITS, int SPAN>
struct Bfloats {
  using Value = Bfloat16;
  using X = Bfloat16;
  using Sum = __m512;
  static constexpr int LANES = 32;
  struct Picks {
    __m512i columns, values;
  };
  __m512i group, shifts, below;

  explicit Bfloats(const Packed<Bfloat16>& w) : below(_mm512_set1_epi16(w.m - 1)) {
    alignas(64) int16_t first[32], shift[32];
    for (int i = 0; i < 32; ++i) first[i] = i / w.n * w.m, shift[i] = i * BITS % 64;
    group = _mm512_load_si512(first), shifts = _mm512_load_si512(shift);
  }
  Size start(Size j) const { return j * SPAN; }
  static __m512i spread(const uint8_t* codes) {
    if constexpr (BITS == 8)
      return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    int64_t bits[2] = {};
    std::memcpy(bits, codes, 4 * BITS > 16 ? 16 : 4 * BITS);
    const __m512i low = _mm512_set1_epi64(bits[0]);
    if constexpr (BITS < 4) return low;
    return _mm512_inserti64x4(low, _mm256_set1_epi64x(bits[1]), 1);
  }
  Picks read(const Bfloat16* values, const uint8_t* codes, Size) const {
    __m512i found = spread(codes);
    if constexpr (BITS < 8) found = _mm512_multishift_epi64_epi8(shifts, found);
    return {_mm512_ternarylogic_epi32(found, below, group, 0xea), _mm512_loadu_si512(values)};
  }
  template <int VECTORS>
  static __m512i pick(const __m512i& columns, const Bfloat16* x) {
    if constexpr (VECTORS == 2) {
      return _mm512_permutex2var_epi16(_mm512_loadu_si512(x), columns, _mm512_loadu_si512(x + 32));
    } else {
      const __mmask32 upper = _mm512_test_epi16_mask(columns, _mm512_set1_epi16(16 * VECTORS));
      return _mm512_mask_blend_epi16(upper, pick<VECTORS / 2>(columns, x),
                                     pick<VECTORS / 2>(columns, x + 16 * VECTORS));
    }
  }
  void add(Sum& sum, const Picks& picks, const Bfloat16* x) const {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)picks.values, (__m512bh)pick<SPAN>(picks.columns, x));
  }
  static float total(const Sum& sum) { return _mm512_reduce_add_ps(sum); }
};
#endif

// sums[r][b] = values[r] . x[b]; x is padded with zeros
template <class Way, int BATCH>
void dots(const Way& way, const Packed<typename Way::Value>& w, Size row, const typename Way::X* x,
          Size ldx, float (*sums)[BATCH]) {
  using Value = typename Way::Value;
  constexpr int LANES = Way::LANES;
  const Value* values[ROWS];
  const uint8_t* codes[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const Size at = std::min(row + r, w.rows - 1);  // the last rows may be computed twice
    values[r] = w.values + at * w.kept, codes[r] = w.codes + at * w.bytes;
  }
  typename Way::Sum sum[ROWS][BATCH] = {};
  const auto step = [&](const Value* const* from, const uint8_t* const* bits, Size v, Size c,
                        Size j) __attribute__((always_inline)) {
    typename Way::Picks picks[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) picks[r] = way.read(from[r] + v, bits[r] + c, j);
#pragma GCC unroll 4
    for (int b = 0; b < BATCH; ++b)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) way.add(sum[r][b], picks[r], x + b * ldx + way.start(j));
  };
  const Size codes_of = LANES / 8 * w.bits;  // bytes
  Size j = 0, c = 0;
  for (; j + LANES <= w.kept; j += LANES, c += codes_of) {
    // beyond the end of a row come the next ROWS rows, not the one below, which is being read
    Size ahead = j + AHEAD / static_cast<Size>(sizeof(Value));
    ahead += ahead < w.kept ? 0 : (ROWS - 1) * w.kept;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      __builtin_prefetch(values[r] + ahead);
      __builtin_prefetch(codes[r] + c + ROWS * w.bytes);
    }
    step(values, codes, j, c, j);
  }
  if (j < w.kept) {
    Value rest[ROWS][LANES] = {};
    uint8_t bits[ROWS][LANES] = {};
    const Value* from[ROWS];
    const uint8_t* at[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      std::memcpy(rest[r], values[r] + j, (w.kept - j) * sizeof(Value));
      std::memcpy(bits[r], codes[r] + c, w.bytes - c);
      from[r] = rest[r], at[r] = bits[r];
    }
    step(from, at, 0, 0, j);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BATCH; ++b) sums[r][b] = Way::total(sum[r][b]);
}

// out[b, r] for BATCH rows of x
template <class Way, int BATCH>
void some(const Way& way, const Packed<typename Way::Value>& w, const typename Way::X* x, Size ldx,
          const typename Way::Value* bias, typename Way::Value* out, Size row) {
  float sums[ROWS][BATCH];
  dots<Way, BATCH>(way, w, row, x, ldx, sums);
  for (int r = 0; r < ROWS && row + r < w.rows; ++r)
    for (int b = 0; b < BATCH; ++b)
      narrow(sums[r][b] + (bias ? wide(bias[row + r]) : 0), out + b * w.rows + row + r);
}

template <class Way>
void few(const Packed<typename Way::Value>& w, const typename Way::Value* x, Size batch,
         const typename Way::Value* bias, typename Way::Value* out, int threads) {
  const Way way(w);
  const Size ldx = w.padded(), depth = w.depth();
  std::vector<typename Way::X> copy(batch * ldx);  // zeros after a row: vectors reach over its end
  for (Size b = 0; b < batch; ++b)
    for (Size k = 0; k < depth; ++k) {
      if constexpr (sizeof(typename Way::X) == sizeof *x) copy[b * ldx + k] = x[b * depth + k];
      else copy[b * ldx + k] = wide(x[b * depth + k]);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Size row = 0; row < w.rows; row += ROWS) {
    Size b = 0;
    const auto at = [&](Size first) { return copy.data() + first * ldx; };
    for (; b + 4 <= batch; b += 4) some<Way, 4>(way, w, at(b), ldx, bias, out + b * w.rows, row);
    for (; b + 2 <= batch; b += 2) some<Way, 2>(way, w, at(b), ldx, bias, out + b * w.rows, row);
    for (; b < batch; ++b) some<Way, 1>(way, w, at(b), ldx, bias, out + b * w.rows, row);
  }
}

#define FEW(WAY, BITS, SPAN) \
  if (w.bits == BITS && w.m == w.n * SPAN && 16 % w.n == 0) \
    return few<WAY<BITS, SPAN>>(w, x, batch, bias, out, threads);
#define FEW_OF(WAY) \
  FEW(WAY, 1, 2) FEW(WAY, 2, 2) FEW(WAY, 2, 4) FEW(WAY, 4, 2) FEW(WAY, 4, 4) FEW(WAY, 4, 8) FEW(WAY, 8, 2)

void few_rows(const Packed<float>& w, const float* x, Size batch, const float* bias, float* out,
              int threads) {
#ifdef AVX512
  FEW_OF(Floats)
#endif
  few<Gathered<float>>(w, x, batch, bias, out, threads);
}

void few_rows(const Packed<Bfloat16>& w, const Bfloat16* x, Size batch, const Bfloat16* bias,
              Bfloat16* out, int threads) {
#ifdef AVX512_BF16
  FEW_OF(Bfloats)
#endif
  few<Gathered<Bfloat16>>(w, x, batch, bias, out, threads);
}

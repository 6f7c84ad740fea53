// Packing: what nm_mask keeps of w[rows, depth], and codes, row by row.

// places below m of `kept` values -> bytes, from the lowest bit on
void write_codes(const uint8_t* places, Size kept, int bits, uint8_t* codes, Size bytes) {
  const Size each = 8 / bits;
  for (Size b = 0; b < bytes; ++b) {
    unsigned byte = 0;
    for (Size e = 0; e < each && b * each + e < kept; ++e) byte |= places[b * each + e] << e * bits;
    codes[b] = byte;
  }
}

template <typename Bits>
void pack(const Bits* w, Size rows, Size depth, int n, int m, int bits, Bits* values, Size bytes,
          uint8_t* codes, int threads) {
  const Size groups = depth / m, kept = groups * n;
#pragma omp parallel num_threads(threads)
  {
    Ranked ranked;
    std::vector<Bits> own(kept + 1);  // one more: what is not kept is written, and overwritten
    std::vector<uint8_t> places(kept + 1);
#pragma omp for schedule(static)
    for (Size row = 0; row < rows; ++row) {
      Size at = 0;
      for (Size first = 0; first < groups; first += GROUPS) {
        const int count = std::min<Size>(GROUPS, groups - first);
        const Bits* from = w + row * depth + first * m;
        ranked.rank(from, 1, m, count, m);
        for (int g = 0; g < count; ++g)
          for (int i = 0; i < m; ++i) {
            own[at] = from[g * m + i];
            places[at] = i;
            at += ranked.kept(i, g, n);
          }
      }
      std::memcpy(values + row * kept, own.data(), kept * sizeof(Bits));
      write_codes(places.data(), kept, bits, codes + row * bytes, bytes);
    }
  }
}

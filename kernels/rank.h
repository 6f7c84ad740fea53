// Of m numbers the n with the largest magnitudes, of equals the earlier, of 16 groups at once.

namespace {

constexpr int GROUPS = 16;
constexpr int MOST_RANKED = 32;  // m
typedef int32_t Lanes __attribute__((vector_size(GROUPS * 4)));

// Magnitudes order as integers do; every NaN is the same one, above infinity.
int32_t key(uint32_t bits) { return std::min<int32_t>(bits & 0x7fffffff, 0x7f800001); }
int32_t key(uint16_t bits) { return std::min<int32_t>(bits & 0x7fff, 0x7f81); }

struct Ranked {
  Lanes keys[MOST_RANKED], beaten[MOST_RANKED];  // [place, group]; beaten: how many are before

  // element i of group g is values[i * si + g * sg]; of `count` groups
  template <typename Bits>
  void rank(const Bits* values, Size si, Size sg, int count, int m) {
    for (int i = 0; i < m; ++i) {
      int32_t own[GROUPS] = {};
      for (int g = 0; g < count; ++g) own[g] = key(values[i * si + g * sg]);
      std::memcpy(&keys[i], own, sizeof own);
      beaten[i] = i + Lanes{};  // by all that are earlier, until compared
    }
    for (int i = 0; i < m; ++i)
      for (int j = i + 1; j < m; ++j) {
        const Lanes later = keys[j] > keys[i];  // -1 where it wins
        beaten[i] -= later;
        beaten[j] += later;
      }
  }

  bool kept(int i, int g, int n) const { return beaten[i][g] < n; }
};

}  // namespace

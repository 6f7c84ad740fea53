// A packed weight [R, K] as sparsefx/ops/packed.py lays it out, and 8 places at once.
// A code of m or above, which nm_pack never writes, is read as one below m: nothing outside is read.

namespace {

constexpr int ROWS = 4;      // rows of the weight that share what is loaded of x
constexpr int AHEAD = 4096;  // bytes that are asked for before they are needed

template <typename Value>
struct Packed {
  const Value* values;
  const uint8_t* codes;
  Size rows, kept, bytes;  // bytes: of a row's codes
  int n, m, bits;

  // first columns of the groups of 8 values more than there are, so that no tail is special
  std::vector<int32_t> groups() const {
    std::vector<int32_t> first(kept + 8);
    for (Size j = 0; j < kept + 8; ++j) first[j] = j / n * m;
    return first;
  }
  Size depth() const { return kept / n * m; }
  Size padded() const { return depth() + 33 * m + 64; }  // columns that vectors of x may touch
};

typedef uint64_t Words __attribute__((vector_size(64)));

uint64_t word(const uint8_t* codes, int bits) {  // that holds 8 codes
  uint64_t found = 0;
  switch (bits) {
    case 1: return codes[0];
    case 2: std::memcpy(&found, codes, 2); return found;
    case 4: std::memcpy(&found, codes, 4); return found;
    default: std::memcpy(&found, codes, 8); return found;
  }
}

Ints places(const uint8_t* codes, int bits, int m) {  // of 8 values
  const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const Words found = ((word(codes, bits) + Words{}) >> lanes * bits) & ((1u << bits) - 1);
  const Ints place = __builtin_convertvector(found, Ints), last = m - 1 + Ints{};
  return place > last ? last : place;
}

}  // namespace

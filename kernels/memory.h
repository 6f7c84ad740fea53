// What C++ kernels share: how a function is exported, and how fresh memory is asked for.

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

namespace {

constexpr int64_t LARGE = int64_t{4} << 20;  // bytes: more than a core's own caches hold

// A fresh 64 MiB costs 16384 page faults, which take longer than filling it; huge pages cost 32.
void expect_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(PAGE - 1);
  if (last >= first + LARGE)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: may fail
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

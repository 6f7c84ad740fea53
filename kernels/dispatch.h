// How C++ stands in torch's dispatcher by itself: a call that passes through Python costs three
// times as much. By torch's stable ABI, which 2.11 and later have; errors are c10's, for their types.

#include <array>
#include <string>

#include <c10/util/Exception.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;

constexpr int64_t PER_THREAD = 1 << 15;  // elements that are worth another thread

int threads_for(int64_t elements) {
  uint32_t most = 1;
  torch_get_num_threads(&most);
  return int(std::min<int64_t>(most, 1 + elements / PER_THREAD));
}

int32_t type_of(const Tensor& x) {  // as aoti_torch_dtype_float32() and the like tell it
  int32_t type = 0;
  TORCH_CHECK(!aoti_torch_get_dtype(x.get(), &type), "a tensor without a type");
  return type;
}

size_t item_size(const Tensor& x) { return aoti_torch_dtype_element_size(type_of(x)); }

// Memory on CPU, of x's type.
template <size_t DIMS>
Tensor fresh(const Tensor& x, const int64_t (&sizes)[DIMS], const int64_t (&strides)[DIMS]) {
  AtenTensorHandle made = nullptr;
  const AOTITorchError failed =
      aoti_torch_empty_strided(DIMS, sizes, strides, type_of(x), aoti_torch_device_type_cpu(), 0,
                               &made);
  TORCH_CHECK(!failed, "no memory for a result that starts with ", sizes[0], " rows");
  return Tensor(made);
}

Tensor fresh(const Tensor& x, int64_t size) { return fresh<1>(x, {size}, {1}); }

// each row starts `distance` elements after the one before
Tensor fresh(const Tensor& x, int64_t rows, int64_t columns, int64_t distance) {
  return fresh<2>(x, {rows, columns}, {distance, 1});
}

// --- what is left to the reference

// What Python raised: an exception that crosses the stable ABI loses its type and what it says.
enum Refusal : int { NONE, INDEX, VALUE, TYPE, NOT_IMPLEMENTED, RUNTIME };
thread_local Refusal refusal = NONE;
thread_local std::string said;

void raise() {
  const Refusal kind = std::exchange(refusal, NONE);
  const std::string text = std::exchange(said, {});
  if (kind == INDEX) C10_THROW_ERROR(IndexError, text);
  if (kind == VALUE) C10_THROW_ERROR(ValueError, text);
  if (kind == TYPE) C10_THROW_ERROR(TypeError, text);
  if (kind == NOT_IMPLEMENTED) C10_THROW_ERROR(NotImplementedError, text);
  if (kind == RUNTIME) C10_THROW_ERROR(Error, text);
}

// The op of that name in sparsefx_reference, which Python defines before a kernel is registered.
template <typename... Arguments>
Tensor reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  const AOTITorchError failed = torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION);
  raise();
  TORCH_CHECK(!failed, op, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Kernel {
  const char* op;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

// 0, or 1 where the dispatcher refuses it; the registration lasts as long as the process
template <size_t COUNT>
int enter(const Kernel (&kernels)[COUNT], const std::string& op) {
  for (const Kernel& kernel : kernels) {
    TorchLibraryHandle library = nullptr;
    if (op == kernel.op)
      return aoti_torch_library_init_impl("sparsefx", "CPU", __FILE__, __LINE__, &library) ||
             torch_library_impl(library, kernel.op, kernel.boxed, TORCH_ABI_VERSION);
  }
  return 1;
}

}  // namespace

EXPORT void sparsefx_refused(int kind, const char* text) {
  refusal = Refusal(kind);
  said = text;
}

// Tensors through torch's stable ABI: the few accessors the ops need. Full checks, with names, are in fastmem/ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace fastmem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// By the direct entry: the stable wrapper of this op looks it up by name on every call, which costs a microsecond.
inline Tensor empty(const Tensor& like, const int64_t* sizes, size_t dims) {
  int32_t dtype, layout, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes, int64_t(dims), &dtype, &layout, &device,
                                                   like.get_device_index(), nullptr, &made));
  return Tensor(made);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, sizes.begin(), sizes.size());
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_zeros(like, sizes);
}

// The gradient of an absent or unwanted argument.
inline Tensor nothing(const Tensor& like) { return empty(like, {0}); }

inline Tensor wanted(bool wants, const Tensor& like, std::initializer_list<int64_t> sizes) {
  return wants ? empty(like, sizes) : nothing(like);
}

// Rows that a kernel can walk: a copy only where the last stride is not 1.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const bool dense = tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

// Whether all entries along the first dimension are one and the same, which is dense.
inline bool is_one_for_all(const Tensor& tensor) {
  if (tensor.dim() == 0 || tensor.stride(0) != 0) return false;
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

template <class T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T> T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }
template <class T> const T* data(const std::optional<Tensor>& tensor) { return tensor ? data<T>(*tensor) : nullptr; }

// From an element on: null where an argument is absent, or a gradient unwanted.
template <class T> const T* at(const std::optional<Tensor>& tensor, int64_t offset) {
  return tensor ? data<T>(*tensor) + offset : nullptr;
}
template <class T> T* at(bool wants, const Tensor& tensor, int64_t offset) {
  return wants ? mutable_data<T>(tensor) + offset : nullptr;
}

// A string argument as an op receives it. Declared as std::string it would leak: torch's conversion (2.10 to 2.13 at
// least) copies a string made by `new` and forgets it, 48 bytes a call between the large blocks of the heap.
using Text = StringHandle;

inline std::string take(Text text) {
  size_t length = 0;
  const char* characters = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(text, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(text, &characters));
  std::string taken(characters, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(text));
  return taken;
}

// What memory safety needs: the shape, dtype and device that the kernel will assume.
inline void require(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes, const char* name) {
  bool fits = tensor.dim() == int64_t(sizes.size()) && tensor.scalar_type() == like.scalar_type() && tensor.is_cpu();
  int64_t dimension = 0;
  if (fits)
    for (int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, name, ": wrong shape, dtype or device for the C++ kernel");
}

inline void require(const std::optional<Tensor>& tensor, const Tensor& like, std::initializer_list<int64_t> sizes,
                    const char* name) {
  if (tensor) require(*tensor, like, sizes, name);
}

inline void require_mask(const std::optional<Tensor>& mask, std::initializer_list<int64_t> sizes, const char* name) {
  if (!mask) return;
  require(*mask, *mask, sizes, name);
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, name, ": wrong dtype for the C++ kernel");
}

// What writing in place needs: dense rows, and dimensions that step over all that the inner ones hold.
inline void require_writable(const Tensor& tensor, const char* name) {
  int64_t inner = 1;
  bool writable = true;
  for (int64_t d = tensor.dim(); d-- > 0;) {
    if (tensor.size(d) <= 1) continue;
    writable = writable && (d + 1 == tensor.dim() ? tensor.stride(d) == 1 : tensor.stride(d) >= inner);
    inner = tensor.stride(d) * tensor.size(d);
  }
  STD_TORCH_CHECK(writable, name, ": writing in place needs dense rows and elements that do not overlap");
}

// No element of `written` may be one of `other`.
inline void require_apart(const Tensor& written, const Tensor& other, const char* name) {
  const auto last = [](const Tensor& tensor) {
    int64_t elements = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
    return static_cast<const char*>(tensor.const_data_ptr()) + elements * int64_t(tensor.element_size());
  };
  const bool either_empty = written.numel() == 0 || other.numel() == 0;
  const bool apart = either_empty || last(written) <= static_cast<const char*>(other.const_data_ptr()) ||
                     last(other) <= static_cast<const char*>(written.const_data_ptr());
  STD_TORCH_CHECK(apart, name, ": shares memory with a tensor that is written in place");
}

// f<float>() or f<double>() by the dtype of `tensor`.
template <class F> void dispatch(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: f.template operator()<float>(); break;
    case ScalarType::Double: f.template operator()<double>(); break;
    default: STD_TORCH_CHECK(false, "the C++ kernels serve float32 and float64 only");
  }
}

} // namespace fastmem

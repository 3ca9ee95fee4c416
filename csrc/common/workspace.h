// Scratch memory of one call, in whole cache lines. A tensor for it would cost a microsecond.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace fastmem {

template <class T> class Workspace {
public:
  explicit Workspace(int64_t count)
      : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Workspace() { ::operator delete(data_, std::align_val_t{64}); }
  Workspace(Workspace&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  T* data() const { return data_; }

private:
  T* data_;
};

} // namespace fastmem

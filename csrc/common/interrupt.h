// Ctrl-C in a call that takes long: the thread that called asks Python about every 50 ms, the others look at what it
// found.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace fastmem {

// Whether a signal is waiting whose handler raises. Set by the module; keeps the exception for who called the op.
using Poll = bool (*)();
void set_poll(Poll poll);
Poll poll();

class Interruption {
public:
  // The form in which kernels ask.
  static bool requested(void* self) { return static_cast<Interruption*>(self)->ask(); }
  bool seen() const { return seen_; }

  // For a thread that has done its part: the one that called goes on asking while others have not.
  void finished(int64_t parts, std::atomic<int64_t>& unfinished) {
    unfinished -= parts;
    while (is_caller() && unfinished > 0) {
      ask();
      std::this_thread::yield();
    }
  }

private:
  bool is_caller() const { return std::this_thread::get_id() == caller_; }

  bool ask() {
    if (is_caller()) {
      const auto now = std::chrono::steady_clock::now();
      if (now >= next_) {
        next_ = now + std::chrono::milliseconds(50);
        if (poll() && poll()()) seen_ = true;
      }
    }
    return seen_;
  }

  std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  std::atomic<bool> seen_{false};
};

} // namespace fastmem

#include "interrupt.h"

namespace fastmem {
namespace {

std::atomic<Poll> current{nullptr};

} // namespace

void set_poll(Poll poll) { current = poll; }
Poll poll() { return current; }

} // namespace fastmem

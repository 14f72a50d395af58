// Threads that share the units of a pass. A unit is the same piece of work whatever their number, and nobody adds up
// what others make, so that 1 thread and 16 give the same bits.
#pragma once

#include <cstdint>

namespace pool {

using Work = void (*)(const void *context, int64_t unit);

// Calls work(context, unit) for every unit, on `threads` threads, of which the caller is one. Where the pool is at work
// for another caller, the caller does everything itself.
void run(int64_t units, int64_t threads, Work work, const void *context);

template <class F> void each(int64_t units, int64_t threads, const F &f) {
    run(units, threads, [](const void *context, int64_t unit) { (*(const F *)context)(unit); }, &f);
}

} // namespace pool

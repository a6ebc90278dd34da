// parallel_for on a small persistent pool of threads, made for jobs of 20 to 200 microseconds.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyengine {

using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body(begin, end) on ranges that together are [0, count), `grain` at a time, and returns when all are
// done. A second caller at the same time, and a call from inside a body, runs its ranges itself. Bodies do
// not throw.
void parallel_for(int64_t count, int64_t grain, RangeBody body, const void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  parallel_for(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &f);
}

int threads();            // the caller's included
void set_threads(int n);  // 0: as many as this process may run on

// 64-byte aligned scratch of the calling thread, for use inside one body. Kept between calls and grown when
// needed, so nothing is allocated in the steady state. Its content is whatever the last user left.
void* workspace(size_t bytes);

}  // namespace pyengine

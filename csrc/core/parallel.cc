#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "core/tensor.h"

namespace pyengine {

namespace {

// Long enough to catch the next op of a loop without going through the kernel of the system, short enough not
// to steal a core from the compiled segment that runs in between.
constexpr std::chrono::microseconds kSpin{50};

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

int available_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int current_cpu() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// The CPUs that this thread was given when it started.
struct Cpus {
#ifdef __linux__
  cpu_set_t set;
  Cpus() {
    if (sched_getaffinity(0, sizeof set, &set) != 0) CPU_ZERO(&set);
  }
  // Keeps the thread off one of them, if others are left.
  void keep_off(int cpu) const {
    cpu_set_t others = set;
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0) sched_setaffinity(0, sizeof others, &others);
  }
#else
  void keep_off(int) const {}
#endif
};

// Workers are never waited for unless they have joined the job: a worker that the system has not woken yet,
// or that a fork() left behind, costs parallelism and nothing else. The pool is never destroyed, so neither
// are its threads.
class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  int threads() {
    int n = threads_.load(std::memory_order_relaxed);
    if (n == 0) {
      n = available_cpus();
      threads_.store(n, std::memory_order_relaxed);
    }
    return n;
  }

  void set_threads(int n) {
    std::lock_guard<std::mutex> lock(submit_);
    threads_.store(n > 0 ? n : available_cpus(), std::memory_order_relaxed);
  }

  void run(int64_t count, int64_t grain, RangeBody body, const void* context) {
    std::unique_lock<std::mutex> lock(submit_, std::defer_lock);
    if (inside_ || count <= grain || threads() == 1 || !lock.try_lock()) {
      body(context, 0, count);
      return;
    }
    start_workers();
    body_ = body;
    context_ = context;
    grain_ = grain;
    divide(count);
    open_.store(true);
    epoch_.fetch_add(1);
    submitter_cpu_.store(current_cpu(), std::memory_order_relaxed);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> sleep(sleep_);
      wake_.notify_all();
    }
    inside_ = true;
    take_ranges(0);
    inside_ = false;
    open_.store(false);
    while (active_.load() > 0) relax();  // those who joined finish the range they hold
  }

 private:
  void start_workers() {
    try {
      for (; started_ + 1 < threads(); ++started_) std::thread(&Pool::work, this, started_ + 1).detach();
    } catch (const std::system_error&) {  // the system grants no more threads: go on with those there are
    }
  }

  // Each thread begins with a share of its own, the same in every job of a loop, so that what it read and
  // wrote is still in its cache; then it helps with the others' shares.
  void divide(int64_t count) {
    const int n = threads();
    if (shares_ < n) {
      share_.reset(new Share[n]);
      shares_ = n;
    }
    const int64_t ranges = (count + grain_ - 1) / grain_;
    for (int i = 0; i < n; ++i) {
      share_[i].next.store(ranges * i / n * grain_, std::memory_order_relaxed);
      share_[i].end = std::min(count, ranges * (i + 1) / n * grain_);
    }
  }

  void take_ranges(int thread) {
    const int n = threads();
    for (int i = 0; i < n; ++i) {
      Share& share = share_[(thread + i) % n];
      for (;;) {
        const int64_t begin = share.next.fetch_add(grain_, std::memory_order_relaxed);
        if (begin >= share.end) break;
        body_(context_, begin, std::min(share.end, begin + grain_));
      }
    }
  }

  void work(int worker) {
    inside_ = true;
    uint64_t seen = 0;
    for (;;) {
      wait_for_job(seen);
      seen = epoch_.load();
      // active_ goes up before open_ is read, open_ goes down before active_ is read: either this worker sees
      // the job closed, or the submitter sees this worker.
      active_.fetch_add(1);
      if (open_.load() && worker < threads()) take_ranges(worker);
      active_.fetch_sub(1);
    }
  }

  void wait_for_job(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (epoch_.load() != seen) return;
        relax();
      }
      std::this_thread::yield();  // a thread of the segment's pool may be waiting for this core
    } while (std::chrono::steady_clock::now() < until);
    // Linux may wake a thread on the CPU of the one that wakes it, where it would wait until that has done
    // all the work alone; on virtual machines it does so even while other CPUs are idle.
    thread_local const Cpus cpus;
    thread_local int off = -1;
    if (const int cpu = submitter_cpu_.load(std::memory_order_relaxed); cpu != off) cpus.keep_off(off = cpu);
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    sleeping_.fetch_sub(1);
  }

  static thread_local bool inside_;

  std::mutex submit_;
  std::atomic<int> threads_{0};
  int started_ = 0;

  RangeBody body_ = nullptr;
  const void* context_ = nullptr;
  int64_t grain_ = 1;
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::unique_ptr<Share[]> share_;
  int shares_ = 0;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> active_{0};
  std::atomic<int> submitter_cpu_{-1};

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

thread_local bool Pool::inside_ = false;

struct AlignedFree {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, RangeBody body, const void* context) {
  if (count > 0) Pool::get().run(count, std::max<int64_t>(grain, 1), body, context);
}

int threads() {
  return Pool::get().threads();
}

void set_threads(int n) {
  check(n >= 0 && n <= 1024, "[set_threads] expected 0 (all) to 1024 threads but got ", n);
  Pool::get().set_threads(n);
}

void* workspace(size_t bytes) {
  thread_local std::unique_ptr<void, AlignedFree> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(bytes, std::align_val_t{64}));
    size = bytes;
  }
  return memory.get();
}

}  // namespace pyengine

#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/device_info.h"
#include "machine.h"

namespace pyengine::cuda {

namespace emulator {

Machine machine;

void mark(const void* to) {
  const int64_t unit = (static_cast<const char*>(to) - machine.shared) / 16;
  machine.unpublished[unit] = 1;
  machine.fibers[machine.current].written.push_back(unit);
}

void leave() {  // back to the scheduler, until it comes round again
  if (!_setjmp(machine.fibers[machine.current].resume)) _longjmp(machine.scheduler, 1);
}

void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  for (;;) leave();
}

namespace {

constexpr size_t kStack = 256 << 10;
void land(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    mark(copy.to);
    if (copy.valid)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
}

void body() {
  (*machine.thread)();
  Fiber& fiber = machine.fibers[machine.current];
  fiber.finished = true;
  --machine.alive;
  _longjmp(machine.scheduler, 1);
}

// Runs one fiber until it waits for others or ends.
void step(int index) {
  machine.current = index;
  Fiber& fiber = machine.fibers[index];
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void run_block(int threads, std::mt19937& random, const std::string& order) {
  machine.fibers.assign(threads, {});
  machine.warps.assign((threads + kLanes - 1) / kLanes, {});
  machine.unpublished.assign(machine.shared_bytes / 16 + 1, 0);
  machine.alive = threads;
  std::memset(machine.shared, 0xff, machine.shared_bytes);
  for (int i = 0; i < threads; ++i) {
    ucontext_t& context = machine.fibers[i].start;
    getcontext(&context);
    context.uc_stack.ss_sp = machine.stacks.data() + kStack * i;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
  }
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; ++i) turn[i] = order == "backward" ? threads - 1 - i : i;
  const auto progress = [](int first, int last) {
    long sum = 0;
    for (int i = first; i < last; ++i) {
      const Fiber& fiber = machine.fibers[i];
      sum += fiber.barriers + fiber.group_barriers + fiber.meetings + fiber.finished;
    }
    return sum;
  };
  int idle = 0;
  while (machine.alive && machine.error.empty()) {
    if (order == "shuffled") std::shuffle(turn.begin(), turn.end(), random);
    const long before = progress(0, threads);
    for (int at = 0; at < threads; at += kLanes) {
      const int end = std::min(at + kLanes, threads);
      long since;
      do {  // "alone": a warp goes on for as long as it need not wait for another
        since = progress(at, end);
        for (int i = at; i < end; ++i)
          if (!machine.fibers[turn[i]].finished && machine.error.empty()) step(turn[i]);
      } while (order == "alone" && progress(at, end) != since && machine.error.empty());
    }
    idle = progress(0, threads) == before ? idle + 1 : 0;
    if (idle > 2 && machine.error.empty()) machine.error = "threads wait for each other for ever";
  }
}

}  // namespace

void run(const std::function<void()>& thread, Size grid, int threads, int64_t shared_bytes) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  const char* named = std::getenv("PYENGINE_EMULATOR_ORDER");
  const std::string order = named ? named : "forward";
  const char* copies = std::getenv("PYENGINE_EMULATOR_COPIES");
  machine.early = copies && std::string(copies) == "early";
  std::mt19937 random(7);
  machine.thread = &thread;
  machine.grid = grid;
  machine.error.clear();
  machine.stacks.resize(std::max(machine.stacks.size(), kStack * threads));
  // Ends at a page that may not be touched.
  const size_t page = 4096, bytes = (shared_bytes + page - 1) / page * page;
  char* memory = static_cast<char*>(
      mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) throw std::runtime_error("[emulator] no memory");
  mprotect(memory + bytes, page, PROT_NONE);
  machine.shared_start = memory;
  machine.shared = memory + bytes - shared_bytes / 16 * 16;
  machine.shared_bytes = shared_bytes / 16 * 16;
  for (machine.block.z = 0; machine.block.z < grid.z; ++machine.block.z)
    for (machine.block.y = 0; machine.block.y < grid.y; ++machine.block.y)
      for (machine.block.x = 0; machine.block.x < grid.x; ++machine.block.x) {
        run_block(threads, random, order);
        if (machine.error.empty()) continue;
        munmap(memory, bytes + page);
        throw std::runtime_error("[emulator] " + machine.error);
      }
  munmap(memory, bytes + page);
}

Lanes meet(Instruction instruction, int variant, const uint32_t* words, int count, void (*last)(Row*)) {
  Fiber& fiber = machine.fibers[machine.current];
  Fiber* lanes = &machine.fibers[machine.current / kLanes * kLanes];
  Warp& warp = machine.warps[machine.current / kLanes];
  const int meeting = ++fiber.meetings, parity = meeting & 1;
  const int key = static_cast<int>(instruction) * 64 + variant;
  if (warp.number[parity] != meeting) warp.number[parity] = meeting, warp.key[parity] = key;
  if (warp.key[parity] != key) fail("lanes of a warp meet at different instructions");
  Row* rows = warp.words[parity];
  if (count) std::memcpy(rows[machine.current % kLanes], words, 4 * count);
  const auto complete = [&] {
    for (int i = 0; i < kLanes; ++i)
      if (lanes[i].meetings < meeting) return false;
    return true;
  };
  if (complete()) {
    if (last) last(rows);
    return rows;
  }
  do leave();
  while (!complete());
  return rows;
}

void load_matrices(uint32_t* r, const void* row, int count, bool transposed) {
  const bool named = machine.current % kLanes < 8 * count;
  const uint64_t address = named ? reinterpret_cast<uint64_t>(row) : 0;
  if (named && (address % 16 || row < machine.shared ||
                static_cast<const char*>(row) + 16 > machine.shared + machine.shared_bytes))
    fail("a matrix row outside shared memory or not 16-byte aligned");
  const uint32_t words[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  // The last lane reads for all: a lane that goes on may write to where another would have read.
  const Lanes all = meet(Instruction::load_matrices, count * 2 + transposed, words, 2, [](Row* rows) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t from = rows[i][0] | static_cast<uint64_t>(rows[i][1]) << 32;
      if (from) std::memcpy(&rows[i][2], reinterpret_cast<const void*>(from), 16);
    }
  });
  const int g = machine.current % kLanes / 4, t = machine.current % 4;
  for (int i = 0; i < count; ++i) {
    const auto value = [&](int row_of, int column) {
      return reinterpret_cast<const uint16_t*>(&all[8 * i + row_of][2])[column];
    };
    const uint32_t low = transposed ? value(2 * t, g) : value(g, 2 * t);
    const uint32_t high = transposed ? value(2 * t + 1, g) : value(g, 2 * t + 1);
    r[i] = low | high << 16;
  }
}

void multiply(float* c, const uint32_t* a, const uint32_t* b, int depth, void (*last)(Row*)) {
  uint32_t words[10] = {a[0], a[1], 0, 0, b[0], 0};
  if (depth == 16) words[2] = a[2], words[3] = a[3], words[5] = b[1];
  std::memcpy(words + 6, c, 16);
  const Lanes all = meet(Instruction::multiply, depth, words, 10, last);
  std::memcpy(c, all[machine.current % kLanes] + 6, 16);
}

}  // namespace emulator

using emulator::machine;

int thread_index() {
  return machine.current;
}
int block_x() {
  return machine.block.x;
}
int block_y() {
  return machine.block.y;
}
int block_z() {
  return machine.block.z;
}
int grid_x() {
  return machine.grid.x;
}
char* shared_memory() {
  return machine.shared;
}

void sync_block() {
  const int reached = ++machine.fibers[machine.current].barriers;
  for (;;) {
    bool all = true;
    for (const auto& fiber : machine.fibers) {
      all = all && fiber.barriers >= reached;
      if (fiber.finished && fiber.barriers < reached) emulator::fail("a thread ended before a barrier");
    }
    if (all) return;
    emulator::leave();
  }
}

float shuffle_xor(float x, int mask) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const emulator::Lanes all = emulator::meet(emulator::Instruction::shuffle, mask, &word, 1);
  std::memcpy(&x, &all[machine.current % 32 ^ mask][0], 4);
  return x;
}

void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uint64_t>(to) % 16 || (valid && reinterpret_cast<uint64_t>(from) % 16))
    emulator::fail("an asynchronous copy that is not 16-byte aligned");
  if (to < machine.shared || static_cast<char*>(to) + 16 > machine.shared + machine.shared_bytes)
    emulator::fail("an asynchronous copy past shared memory");
  // Landing early shows a buffer that is still being read; landing late shows a missing wait.
  if (machine.early) return emulator::land({{to, from, valid}});
  machine.fibers[machine.current].open.push_back({to, from, valid});
}
void commit_copies() {
  auto& fiber = machine.fibers[machine.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void wait_copies(int pending) {
  auto& groups = machine.fibers[machine.current].groups;
  const int done = std::max(0, static_cast<int>(groups.size()) - pending);
  for (int i = 0; i < done; ++i) emulator::land(groups[i]);
  groups.erase(groups.begin(), groups.begin() + done);
}

int device_count() {
  return 1;
}
void check_device() {}
void check_call(int, const char*) {}

// A small device, so that persistent kernels loop; PYENGINE_EMULATOR_SHARED limits its shared memory.
const DeviceInfo& device_info() {
  static DeviceInfo info;
  const char* bytes = std::getenv("PYENGINE_EMULATOR_SHARED");
  const char* processors = std::getenv("PYENGINE_EMULATOR_PROCESSORS");
  info = {processors ? std::atoi(processors) : 2, bytes ? std::atoll(bytes) : 227 << 10, 228 << 10, true};
  return info;
}

}  // namespace pyengine::cuda

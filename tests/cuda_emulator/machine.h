// The block that the emulator is running: its fibers, its warps, its shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <string>
#include <vector>

#include "emulator.h"

namespace pyengine::cuda::emulator {

constexpr int kLanes = 32;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// A warpgroup's product, what it means for one lane: rows g and g + 8 of its warp.
struct Product {
  float (*c)[4];
  int columns;
  bool in_registers, add;
  float a[2][16];
  uint64_t a_panel, b_panel;
  float (*value)(uint16_t);
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, finished = false;
  int barriers = 0;        // block barriers that it has reached
  int meetings = 0;        // warp instructions that it has reached
  std::vector<Copy> open;  // copies not yet committed
  std::vector<std::vector<Copy>> groups;
  int group_barriers = 0;        // barriers of its warpgroup
  std::vector<int64_t> written;  // units of 16 bytes that it has not published
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
};

struct Warp {  // two of everything, by parity of the meeting: a lane may run ahead by one
  int number[2] = {}, key[2] = {};
  Row words[2][kLanes];
};

struct Machine {
  const std::function<void()>* thread = nullptr;
  Size grid{}, block{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  char* shared = nullptr;
  char* shared_start = nullptr;  // what addresses count from
  int64_t shared_bytes = 0;
  int current = 0, alive = 0;
  std::string error;
  std::vector<char> unpublished;  // per unit of shared memory
  bool early = false;             // asynchronous copies land at once
  jmp_buf scheduler;
};

extern Machine machine;

void leave();                        // back to the scheduler, until this fiber's turn comes round again
void fail(const std::string& what);  // ends the run; does not return
void mark(const void* to);           // a unit of shared memory that this fiber wrote and has not published

}  // namespace pyengine::cuda::emulator

// Compiled once per ISA as namespace PYENGINE_ISA: picks the instance for the dtype and the row length.
#include "ops/frame_window_attention/frame.h"
#include "ops/frame_window_attention/temporal.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

template <class T, int d>
struct Instance {
  using type = T;
  static constexpr int dim = d;
};

// Rows of 64 (the head size of most models) and 72 (width 1152 over 16 heads) values get instances of their
// own.
template <class T, class F>
void with_head_dim(const Params& p, F&& f) {
  switch (p.head_dim) {
    case 64:
      return f(Instance<T, 64>{});
    case 72:
      return f(Instance<T, 72>{});
    default:
      return f(Instance<T, 0>{});
  }
}
template <class F>
void with_instance(const Params& p, F&& f) {
  p.is_bfloat16 ? with_head_dim<bfloat16>(p, f) : with_head_dim<float>(p, f);
}

size_t temporal_scratch(const Params& p) {
  int64_t words;
  p.is_bfloat16 ? TemporalScratch::at<bfloat16>(p, nullptr, &words)
                : TemporalScratch::at<float>(p, nullptr, &words);
  return words * sizeof(float);
}
size_t frame_scratch(const Params& p) {
  int64_t words;
  p.is_bfloat16 ? FrameScratch::at<bfloat16>(p, nullptr, &words)
                : FrameScratch::at<float>(p, nullptr, &words);
  return words * sizeof(float);
}

void temporal(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_instance(p, [&](auto i) {
    temporal_items<typename decltype(i)::type, decltype(i)::dim>(p, begin, end, static_cast<float*>(scratch));
  });
}

void frame(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_instance(p, [&](auto i) {
    frame_items<typename decltype(i)::type, decltype(i)::dim>(p, begin, end, static_cast<float*>(scratch));
  });
}

void append(const Params& p, int64_t begin, int64_t end) {
  with_instance(p, [&](auto i) {
    for (int64_t item = begin; item < end; ++item)
      for (int64_t n = 0; n < p.tokens; ++n)
        for (int64_t h = 0; h < p.heads; ++h)
          append_row<typename decltype(i)::type, decltype(i)::dim>(p, item / p.frames, item % p.frames, n, h);
  });
}

}  // namespace

extern const FrameWindowAttentionKernel frame_window_attention_kernel{temporal_scratch, temporal,
                                                                      frame_scratch, frame, append};

}  // namespace pyengine::ops::PYENGINE_ISA

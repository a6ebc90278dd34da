// Compiled once per ISA as namespace PYENGINE_ISA. One problem is a clip's frames at one place and head: it
// is gathered into first-level cache, keys transposed, so that a vector holds the scores of one frame on all.
#include <cmath>  // INFINITY

#include "core/simd.h"
#include "ops/relative_attention/params.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

using namespace pyengine::PYENGINE_ISA;  // the vectors
using Params = RelativeAttentionParams;
enum Part { kQuery, kKey, kValue };
constexpr int kRows = 4;  // frames whose scores are summed together: enough chains to hide the latency

struct Scratch {
  float *rows, *query, *query_t, *key_t, *value, *scores;

  static Scratch at(const Params& p, float* memory, int64_t* words) {
    const int64_t square = p.padded_frames * p.padded_dim;
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      float* start = memory + used;
      used += n;
      return start;
    };
    Scratch s{};
    s.rows = take(square);
    s.query = take(square);
    s.query_t = p.transposed ? take(square) : nullptr;
    s.key_t = take(square);
    s.value = take(square);
    s.scores = take(kRows * p.padded_frames);
    *words = used;
    return s;
  }
};

// The rows of one part, as floats times `scale`; rows past the last frame were cleared.
template <class T>
void gather(const Params& p, int64_t b, int64_t n, Part part, int64_t h, float scale, float* y) {
  const int64_t stride = p.places * 3 * p.heads * p.head_dim;
  const T* x =
      static_cast<const T*>(p.qkv) + (((b * p.frames * p.places + n) * 3 + part) * p.heads + h) * p.head_dim;
  const int64_t whole = p.head_dim / kWidth * kWidth;
  const int rest = static_cast<int>(p.head_dim - whole);
  const Vec factor = set(scale);
  for (int64_t i = 0; i < p.frames; ++i, x += stride, y += p.padded_dim) {
    for (int64_t d = 0; d < whole; d += kWidth) store(y + d, load(x + d) * factor);
    if (rest) store(y + whole, load_part(x + whole, rest) * factor);
  }
}

// rows [padded_frames, padded_dim] -> [padded_dim, padded_frames]
void transpose(const Params& p, const float* rows, float* y) {
  for (int64_t i = 0; i < p.padded_frames; i += kWidth)
    for (int64_t d = 0; d < p.padded_dim; d += kWidth)
      transpose_block(rows + i * p.padded_dim + d, p.padded_dim, y + d * p.padded_frames + i,
                      p.padded_frames);
}

// Scores of frames [first, first + count) on all, as exponents of 2. [count, padded_frames]
template <bool relative, bool transposed>
void score(const Params& p, const Scratch& s, int64_t first, int count) {
  for (int64_t j = 0; j < p.padded_frames; j += kWidth) {
    Vec content[kRows], distance[kRows];
    for (int r = 0; r < kRows; ++r) content[r] = distance[r] = set(0);
    const float* query[kRows];
    const float* keys[kRows];  // past the last row the first one is read again
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = first + (r < count ? r : 0);
      query[r] = s.query + i * p.padded_dim;
      keys[r] = relative ? p.keys + p.frames - 1 - i + j : nullptr;
    }
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const Vec key = load(s.key_t + d * p.padded_frames + j);
      Vec other = set(0);
      if constexpr (transposed) other = load(s.query_t + d * p.padded_frames + j);
      for (int r = 0; r < kRows; ++r) {
        const Vec q = set(query[r][d]);
        content[r] = madd(q, key, content[r]);
        if constexpr (relative)
          distance[r] = madd(transposed ? other : q, load(keys[r] + d * p.key_columns), distance[r]);
      }
    }
    for (int r = 0; r < count; ++r) store(s.scores + r * p.padded_frames + j, content[r] + distance[r]);
  }
}

// Scores to weights in place; returns 1 / their sum.
template <bool coarse>
float softmax(const Params& p, float* scores) {
  for (int64_t j = p.frames; j < p.padded_frames; ++j) scores[j] = -INFINITY;
  Vec most = load(scores), total = set(0);
  for (int64_t j = kWidth; j < p.padded_frames; j += kWidth) most = max(most, load(scores + j));
  const Vec m = set(highest(most));
  for (int64_t j = 0; j < p.padded_frames; j += kWidth) {
    const Vec w = exp2<coarse>(load(scores + j) - m);
    total = total + w;
    store(scores + j, w);
  }
  return 1 / sum(total);
}

// One frame's weighted sum of values and of the vectors of its distances.
template <class T, bool relative>
void attend(const Params& p, const Scratch& s, const float* weights, float scale, int64_t i, T* out) {
  const float* table = relative ? p.values + (p.frames - 1 - i) * p.padded_dim : nullptr;
  constexpr int kBlock = 4;
  for (int64_t d = 0; d < p.head_dim; d += kBlock * kWidth) {
    Vec sums[kBlock];
    for (int k = 0; k < kBlock; ++k) sums[k] = set(0);
    const int64_t left = p.padded_dim - d;
    const int n = static_cast<int>(left < kBlock * kWidth ? left / kWidth : kBlock);
    for (int64_t j = 0; j < p.frames; ++j) {
      const Vec w = set(weights[j]);
      for (int k = 0; k < n; ++k) {
        const int64_t at = j * p.padded_dim + d + k * kWidth;
        Vec v = load(s.value + at);
        if constexpr (relative) v = v + load(table + at);
        sums[k] = madd(w, v, sums[k]);
      }
    }
    for (int k = 0; k < n; ++k) {
      const int64_t at = d + k * kWidth, rest = p.head_dim - at;
      if (rest <= 0) break;
      const Vec v = sums[k] * set(scale);
      if (rest >= kWidth)
        store(out + at, v);
      else
        store_part(out + at, v, static_cast<int>(rest));
    }
  }
}

template <class T, bool relative, bool transposed>
void items(const Params& p, int64_t begin, int64_t end, float* memory) {
  int64_t words;
  const Scratch s = Scratch::at(p, memory, &words);
  std::memset(memory, 0, words * sizeof(float));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.places, n = item % p.places;
    for (int64_t h = 0; h < p.heads; ++h) {
      gather<T>(p, b, n, kKey, h, 1, s.rows);
      transpose(p, s.rows, s.key_t);
      if constexpr (transposed) {
        gather<T>(p, b, n, kQuery, h, 1, s.rows);
        transpose(p, s.rows, s.query_t);
      }
      gather<T>(p, b, n, kQuery, h, p.query_scale, s.query);
      gather<T>(p, b, n, kValue, h, 1, s.value);
      for (int64_t first = 0; first < p.frames; first += kRows) {
        const int count = static_cast<int>(p.frames - first < kRows ? p.frames - first : kRows);
        score<relative, transposed>(p, s, first, count);
        for (int r = 0; r < count; ++r) {
          const int64_t i = first + r;
          float* weights = s.scores + r * p.padded_frames;
          const float scale = softmax<sizeof(T) == 2>(p, weights);
          T* out = static_cast<T*>(p.out) + (((b * p.frames + i) * p.places + n) * p.heads + h) * p.head_dim;
          attend<T, relative>(p, s, weights, scale, i, out);
        }
      }
    }
  }
}

template <class T>
void with_tables(const Params& p, int64_t begin, int64_t end, float* memory) {
  if (!p.keys) return items<T, false, false>(p, begin, end, memory);
  p.transposed ? items<T, true, true>(p, begin, end, memory) : items<T, true, false>(p, begin, end, memory);
}

size_t scratch(const Params& p) {
  int64_t words;
  Scratch::at(p, nullptr, &words);
  return words * sizeof(float);
}

void run(const Params& p, int64_t begin, int64_t end, void* memory) {
  p.is_bfloat16 ? with_tables<bfloat16>(p, begin, end, static_cast<float*>(memory))
                : with_tables<float>(p, begin, end, static_cast<float*>(memory));
}

}  // namespace

extern const RelativeAttentionKernel relative_attention_kernel{scratch, run};

}  // namespace pyengine::ops::PYENGINE_ISA

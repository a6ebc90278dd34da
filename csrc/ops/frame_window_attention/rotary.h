// Rotary tables: one row of cosines and signed sines per frame, kept between calls.
#pragma once

#include <cstdint>

namespace pyengine::ops {

// Pairs of lanes in tables, padded to a whole vector of the widest kind.
constexpr int64_t pair_stride(int64_t padded_dim) {
  return (padded_dim / 2 + 15) / 16 * 16;
}

struct RotaryForm {
  double theta;
  int64_t rotary_dim, padded_dim;
  bool interleaved;
  bool operator==(const RotaryForm& other) const {
    return theta == other.theta && rotary_dim == other.rotary_dim && padded_dim == other.padded_dim &&
           interleaved == other.interleaved;
  }
};

// Points rows[i] at the cosines and sines of positions[i] * theta^(-2k / rotary_dim), computed in double:
//   [2, padded_dim]   of every lane, the sines with its sign: y = x * row[0] + partner(x) * row[1]
//   [2, pair_stride]  of every pair, without a sign; where lanes are interleaved
// Positions are small because the caller re-bases them; the rows of small positions are remembered per
// thread. Valid until the calling thread's next call.
void rotary_rows(const RotaryForm& form, const int64_t* positions, int64_t count, const float** rows);

}  // namespace pyengine::ops

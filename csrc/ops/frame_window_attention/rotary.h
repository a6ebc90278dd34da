// Rotary tables: one row of cosines and signed sines per frame, kept between calls.
#pragma once

#include <cstdint>

namespace pyengine::ops {

struct RotaryForm {
  double theta;
  int64_t rotary_dim, padded_dim;
  bool interleaved;
  bool operator==(const RotaryForm& other) const {
    return theta == other.theta && rotary_dim == other.rotary_dim && padded_dim == other.padded_dim &&
           interleaved == other.interleaved;
  }
};

// Points rows[i] at [2, padded_dim] floats for the angle positions[i] * theta^(-2k / rotary_dim), computed in
// double: y = x * row[0] + partner(x) * row[1]. Positions are small because the caller re-bases them; the
// rows of small positions are remembered per thread. Valid until the calling thread's next call.
void rotary_rows(const RotaryForm& form, const int64_t* positions, int64_t count, const float** rows);

}  // namespace pyengine::ops

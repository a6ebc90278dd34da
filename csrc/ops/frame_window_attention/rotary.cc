#include "ops/frame_window_attention/rotary.h"

#include <cmath>
#include <list>
#include <memory>
#include <vector>

namespace pyengine::ops {

namespace {

constexpr int64_t kRemembered = 1024;  // positions; a window is tens of frames
constexpr size_t kForms = 8;           // models alive on one thread, before the oldest table goes

int64_t row_size(const RotaryForm& form) {
  return 2 * (form.padded_dim + pair_stride(form.padded_dim));
}

void fill(const RotaryForm& form, int64_t position, float* row) {
  const int64_t pairs = pair_stride(form.padded_dim);
  float *cosine = row, *sine = row + form.padded_dim;
  float *pair_cosine = sine + form.padded_dim, *pair_sine = pair_cosine + pairs;
  for (int64_t d = 0; d < form.padded_dim; ++d) cosine[d] = 1, sine[d] = 0;
  for (int64_t i = 0; i < pairs; ++i) pair_cosine[i] = 1, pair_sine[i] = 0;
  const int64_t half = form.rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const double angle = position * std::pow(form.theta, -2.0 * i / form.rotary_dim);
    const int64_t first = form.interleaved ? 2 * i : i, second = form.interleaved ? 2 * i + 1 : i + half;
    cosine[first] = cosine[second] = static_cast<float>(std::cos(angle));
    sine[second] = static_cast<float>(std::sin(angle));
    sine[first] = -sine[second];
    pair_cosine[i] = cosine[second], pair_sine[i] = sine[second];
  }
}

struct Table {
  RotaryForm form;
  std::unique_ptr<float[]>
      rows;  // left uninitialised: the system gives memory only to the rows that are filled
  std::vector<bool> filled;
};

Table& table(const RotaryForm& form) {
  thread_local std::list<Table> tables;  // most recent first
  for (auto i = tables.begin(); i != tables.end(); ++i)
    if (i->form == form) {
      tables.splice(tables.begin(), tables, i);
      return tables.front();
    }
  if (tables.size() == kForms) tables.pop_back();
  tables.push_front({form, std::unique_ptr<float[]>(new float[kRemembered * row_size(form)]),
                     std::vector<bool>(kRemembered, false)});
  return tables.front();
}

}  // namespace

void rotary_rows(const RotaryForm& form, const int64_t* positions, int64_t count, const float** rows) {
  thread_local std::vector<float> far;
  Table& near = table(form);
  const int64_t stride = row_size(form);
  int64_t far_count = 0;
  for (int64_t i = 0; i < count; ++i) far_count += positions[i] >= kRemembered;
  if (static_cast<int64_t>(far.size()) < far_count * stride) far.resize(far_count * stride);
  float* next_far = far.data();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = positions[i];
    if (position >= kRemembered) {
      fill(form, position, next_far);
      rows[i] = next_far;
      next_far += stride;
      continue;
    }
    float* row = near.rows.get() + position * stride;
    if (!near.filled[position]) fill(form, position, row), near.filled[position] = true;
    rows[i] = row;
  }
}

}  // namespace pyengine::ops

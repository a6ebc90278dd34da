// What DenoiseStep expects of its tensors, on any device.
#pragma once

#include <algorithm>

#include "core/dtype.h"
#include "ops/denoise_step/op.h"

namespace pyengine::ops {

inline void check_like_sample(const char* what, const Tensor& t, const Tensor& sample) {
  check(t.rank == sample.rank && std::equal(t.shape, t.shape + t.rank, sample.shape),
        "[denoise_step] expected ", what, " shaped like sample, ", sample, ", but got ", t);
}

inline void check_op(const DenoiseStep& op, Place place) {
  constexpr Expect expect{"denoise_step"};
  const Tensor &sample = op.sample, &prediction = op.prediction;
  check(sample.rank >= 2, "[denoise_step] expected sample [streams, frames, ...] but got ", sample);
  expect.dtype("sample", sample, DType::float32);
  expect.layout("sample", sample);
  check(prediction.rank == sample.rank + 1 &&
            std::equal(sample.shape, sample.shape + sample.rank, prediction.shape + 1),
        "[denoise_step] expected prediction [branches, streams, frames, ...] over sample ", sample,
        " but got ", prediction);
  check_float("denoise_step", "prediction", prediction, place);
  expect.layout("prediction", prediction);
  const int64_t streams = sample.shape[0], frames = sample.shape[1], branches = prediction.shape[0];
  expect.input("weights", op.weights, DType::float32, {branches, streams});
  expect.input("sample_scale", op.sample_scale, DType::float32, {streams, frames});
  expect.input("prediction_scale", op.prediction_scale, DType::float32, {streams, frames});
  expect.input("noise_scale", op.noise_scale, DType::float32, {streams, frames});
  check_like_sample("out", op.out, sample);
  expect.dtype("out", op.out, DType::float32);
  expect.layout("out", op.out);
  expect.writable("out", op.out);
  if (op.history) {
    check_like_sample("history", op.history, sample);
    expect.dtype("history", op.history, DType::float32);
    expect.layout("history", op.history);
    expect.input("history_scale", op.history_scale, DType::float32, {streams, frames});
  } else {
    check(!op.history_scale, "[denoise_step] expected history with history_scale but got nothing");
  }
  if (op.noise) {
    check_like_sample("noise", op.noise, sample);
    expect.dtype("noise", op.noise, DType::float32);
    expect.layout("noise", op.noise);
  } else if (place == Place::host) {  // a device's scales cannot be looked at: there it counts as zeros
    for (int64_t f = 0; f < streams * frames; ++f)
      check(op.noise_scale.as<float>()[f] == 0.0f, "[denoise_step] expected noise because noise_scale[",
            f / frames, ",", f % frames, "] is ", op.noise_scale.as<float>()[f], " but got nothing");
  }
}

}  // namespace pyengine::ops

#include "bindings/op_binding.h"
#include "ops/denoise_step/op.h"
#ifdef PYENGINE_BIND_CUDA
#include "ops/denoise_step/cuda.h"
#endif

namespace pyengine::ops {

void visit(bindings::Arguments& in, DenoiseStep& op) {
  in.input("sample", op.sample);
  in.input("prediction", op.prediction);
  in.input("weights", op.weights);
  in.input("sample_scale", op.sample_scale);
  in.input("prediction_scale", op.prediction_scale);
  in.input("noise_scale", op.noise_scale);
  in.input("noise", op.noise);
  in.input("history", op.history);
  in.input("history_scale", op.history_scale);
  in.array("out", op.out);
}

PYENGINE_BIND(
    DenoiseStep, denoise_step,
    "out [S,F,...] = sample_scale * sample + prediction_scale * (weights . prediction) + noise_scale * "
    "noise + history_scale * history, per frame of each stream. Absent noise or history counts as zeros.")

}  // namespace pyengine::ops

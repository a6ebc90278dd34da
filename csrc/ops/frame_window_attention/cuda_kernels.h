// Launchers of the kernels, one instance per dtype and head size, each compiled in a file of its own.
#pragma once

#include "ops/frame_window_attention/cuda_heuristics.h"
#include "ops/frame_window_attention/cuda_params.h"

namespace pyengine::ops::cuda {

template <class T, int D>
void launch_temporal(const AttentionParams& p, const AttentionLaunch& l, void* stream);

template <class T, int D>
void launch_frame(const AttentionParams& p, const AttentionLaunch& l, void* stream);

}  // namespace pyengine::ops::cuda

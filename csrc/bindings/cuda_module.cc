// pyengine._cuda: the ops on arrays of an NVIDIA device. A module of its own, so that _C never needs CUDA.
#include "bindings/device_array.h"
#include "core/cuda/device_info.h"
#include "ops/denoise_step/cuda.h"
#include "ops/frame_window_attention/cuda.h"
#include "ops/frame_window_attention/cuda_heuristics.h"
#include "ops/relative_attention/cuda.h"
#include "ops/ring_append/cuda.h"

#ifndef PYENGINE_CUDA_MODULE
#define PYENGINE_CUDA_MODULE _cuda
#endif

namespace pyengine::bindings {

using namespace pybind11::literals;
using Object = py::object;

constexpr const char* kAttention = "frame_window_attention";

ops::Scope parse_scope(const std::string& scope) {
  return parse<ops::Scope>(kAttention, "scope", scope,
                           {{"temporal", ops::Scope::temporal}, {"frame", ops::Scope::frame}});
}

void* stream_of(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

void frame_window_attention(const Object& qkv, const Object& level, const Object& frame_index,
                            const Object& ring_key, const Object& ring_value, const Object& ring_index,
                            const Object& out, const Object& append_slot, const Object& q_gain,
                            const Object& k_gain, const Object& reach, const Object& ring_key_scale,
                            const Object& ring_value_scale, const Object& workspace, const std::string& scope,
                            const std::string& mask, double theta, int64_t rotary_dim, bool interleaved,
                            double epsilon, double scale, uintptr_t stream) {
  using ops::Mask;
  const auto tensor = [](const char* what, const Object& array) {
    return device_tensor(kAttention, what, array);
  };
  ops::FrameWindowAttention op;
  op.qkv = tensor("qkv", qkv);
  op.level = tensor("level", level);
  op.frame_index = tensor("frame_index", frame_index);
  op.ring_key = tensor("ring_key", ring_key);
  op.ring_value = tensor("ring_value", ring_value);
  op.ring_index = tensor("ring_index", ring_index);
  op.out = tensor("out", out);
  op.append_slot = tensor("append_slot", append_slot);
  op.q_gain = tensor("q_gain", q_gain);
  op.k_gain = tensor("k_gain", k_gain);
  op.reach = tensor("reach", reach);
  op.ring_key_scale = tensor("ring_key_scale", ring_key_scale);
  op.ring_value_scale = tensor("ring_value_scale", ring_value_scale);
  op.scope = parse_scope(scope);
  op.mask = parse<Mask>(kAttention, "mask", mask,
                        {{"bidirectional", Mask::bidirectional},
                         {"noise_causal", Mask::noise_causal},
                         {"ranged", Mask::ranged}});
  op.theta = theta;
  op.rotary_dim = rotary_dim;
  op.interleaved = interleaved;
  op.epsilon = epsilon;
  op.scale = scale;
  const Tensor scratch = tensor("workspace", workspace);
  py::gil_scoped_release released;
  ops::cuda::frame_window_attention(op, scratch, stream_of(stream));
}

int64_t frame_window_attention_workspace(const Object& qkv, const Object& ring_key,
                                         const std::string& scope) {
  ops::FrameWindowAttention op;
  op.qkv = device_tensor(kAttention, "qkv", qkv);
  op.ring_key = device_tensor(kAttention, "ring_key", ring_key);
  op.scope = parse_scope(scope);
  return ops::cuda::frame_window_attention_workspace(op);
}

// How an attention of this shape would be launched: for tests and benchmarks.
py::dict attention_launch(const std::string& scope, const std::string& dtype, int64_t batch, int64_t frames,
                          int64_t tokens, int64_t heads, int64_t head_dim, int64_t ring, int processors,
                          int64_t block_bytes, int64_t processor_bytes, bool warpgroups, bool may_split) {
  const ops::cuda::AttentionShape shape{
      parse_scope(scope), dtype_of(dtype), batch, frames, tokens, heads, head_dim, ring, true};
  const auto l =
      ops::cuda::attention_launch(shape, {processors, block_bytes, processor_bytes, warpgroups}, may_split);
  static constexpr const char* kNames[] = {"rows", "temporal", "frame", "frame_group"};
  return py::dict("kernel"_a = kNames[static_cast<int>(l.kernel)],
                  "grid"_a = py::make_tuple(l.grid_x, l.grid_y, l.grid_z), "shared_bytes"_a = l.shared_bytes,
                  "stages"_a = l.stages, "sequences"_a = l.sequences, "team"_a = l.team,
                  "query_tiles"_a = l.query_tiles, "splits"_a = l.splits,
                  "workspace_bytes"_a = l.workspace_bytes);
}

void relative_attention(const Object& qkv, const Object& key_table, const Object& value_table,
                        const Object& out, bool transposed, uintptr_t stream) {
  const auto tensor = [](const char* what, const Object& array) {
    return device_tensor("relative_attention", what, array);
  };
  ops::RelativeAttention op{tensor("qkv", qkv), tensor("key_table", key_table),
                            tensor("value_table", value_table), tensor("out", out), transposed};
  py::gil_scoped_release released;
  ops::cuda::relative_attention(op, stream_of(stream));
}

void denoise_step(const Object& sample, const Object& prediction, const Object& weights,
                  const Object& sample_scale, const Object& prediction_scale, const Object& noise_scale,
                  const Object& noise, const Object& out, uintptr_t stream) {
  const auto tensor = [](const char* what, const Object& array) {
    return device_tensor("denoise_step", what, array);
  };
  ops::DenoiseStep op{tensor("sample", sample),
                      tensor("prediction", prediction),
                      tensor("weights", weights),
                      tensor("sample_scale", sample_scale),
                      tensor("prediction_scale", prediction_scale),
                      tensor("noise_scale", noise_scale),
                      tensor("noise", noise),
                      tensor("out", out)};
  py::gil_scoped_release released;
  ops::cuda::denoise_step(op, stream_of(stream));
}

void ring_append(const Object& key, const Object& value, const Object& ring_key, const Object& ring_value,
                 const Object& append_slot, const Object& ring_key_scale, const Object& ring_value_scale,
                 uintptr_t stream) {
  const auto tensor = [](const char* what, const Object& array) {
    return device_tensor("ring_append", what, array);
  };
  ops::RingAppend op{tensor("key", key),
                     tensor("value", value),
                     tensor("ring_key", ring_key),
                     tensor("ring_value", ring_value),
                     tensor("append_slot", append_slot),
                     tensor("ring_key_scale", ring_key_scale),
                     tensor("ring_value_scale", ring_value_scale)};
  py::gil_scoped_release released;
  ops::cuda::ring_append(op, stream_of(stream));
}

PYBIND11_MODULE(PYENGINE_CUDA_MODULE, m) {
  m.doc() =
      "Compiled ops on an NVIDIA device. Arrays are objects with pointer, shape and dtype; outputs are "
      "written "
      "in place, in the order of `stream` (a cudaStream_t as int). ValueError says what was expected, "
      "RuntimeError what is wrong with the device.";
  m.def("device_count", &cuda::device_count, "Devices that a driver offers; 0 without a driver.");
  m.def("check_device", &cuda::check_device,
        "RuntimeError with what is missing, if there is no device to run on.");
  m.def("frame_window_attention", &frame_window_attention, "qkv"_a, "level"_a, "frame_index"_a, "ring_key"_a,
        "ring_value"_a, "ring_index"_a, "out"_a, py::kw_only(), "append_slot"_a = py::none(),
        "q_gain"_a = py::none(), "k_gain"_a = py::none(), "reach"_a = py::none(),
        "ring_key_scale"_a = py::none(), "ring_value_scale"_a = py::none(), "workspace"_a = py::none(),
        "scope"_a = "temporal", "mask"_a = "noise_causal", "theta"_a = 10000.0, "rotary_dim"_a = 0,
        "interleaved"_a = true, "epsilon"_a = 1e-6, "scale"_a = 0.0, "stream"_a = 0,
        "Attention of qkv [B,F,N,3,H,D] over [ring | active] frames into out [B,F,N,H*D]; then appends to "
        "the ring.");
  m.def("frame_window_attention_workspace", &frame_window_attention_workspace, "qkv"_a, "ring_key"_a,
        py::kw_only(), "scope"_a = "temporal",
        "Bytes of the optional workspace of frame_window_attention with such arrays.");
  m.def("attention_launch", &attention_launch, py::kw_only(), "scope"_a, "dtype"_a, "batch"_a, "frames"_a,
        "tokens"_a, "heads"_a, "head_dim"_a, "ring"_a, "processors"_a, "block_bytes"_a, "processor_bytes"_a,
        "warpgroups"_a = false, "may_split"_a = false,
        "Which kernel an attention of this shape gets on a device with so many multiprocessors and so much "
        "shared "
        "memory, and how it is launched.");
  m.def("use_warpgroups", &ops::cuda::use_warpgroups, "wanted"_a,
        "Whether attention of scope `frame` may use the kernel for Hopper's warpgroups; returns what was.");
  m.def(
      "has_warpgroups", [] { return cuda::device_info().warpgroups; },
      "Whether the current device has the warpgroups of compute capability 9.0.");
  m.def("relative_attention", &relative_attention, "qkv"_a, "key_table"_a = py::none(),
        "value_table"_a = py::none(), py::kw_only(), "out"_a, "transposed"_a = false, "stream"_a = 0,
        "Attention of qkv [B,T,N,3,H,D] over the frames at each place, with tables [2L+1,D] of clipped "
        "distances, into out [B,T,N,H*D].");
  m.def("denoise_step", &denoise_step, "sample"_a, "prediction"_a, "weights"_a, "sample_scale"_a,
        "prediction_scale"_a, "noise_scale"_a, "noise"_a = py::none(), py::kw_only(), "out"_a, "stream"_a = 0,
        "out = sample_scale * sample + prediction_scale * (weights . prediction) + noise_scale * noise, per "
        "frame; absent noise counts as zeros.");
  m.def("ring_append", &ring_append, "key"_a, "value"_a, "ring_key"_a, "ring_value"_a, "append_slot"_a,
        py::kw_only(), "ring_key_scale"_a = py::none(), "ring_value_scale"_a = py::none(), "stream"_a = 0,
        "Copies key and value [B,F,N,H,D] of frame i to slot append_slot[i] of the ring [B,R,N,H,D], -1 = "
        "nowhere.");
}

}  // namespace pyengine::bindings

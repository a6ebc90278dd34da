// pyengine._C: the ops on numpy arrays, and the choice of instruction set and threads.
#include <pybind11/stl.h>

#include "bindings/bind_op.h"
#include "core/cpu_isa.h"
#include "core/parallel.h"
#include "ops/denoise_step/op.h"
#include "ops/frame_window_attention/op.h"
#include "ops/relative_attention/op.h"
#include "ops/ring_append/op.h"

namespace pyengine::bindings {

void frame_window_attention(const py::array& qkv, const py::array& level, const py::array& frame_index,
                            const py::array& ring_key, const py::array& ring_value,
                            const py::array& ring_index, const py::array& out,
                            const OptionalArray& append_slot, const OptionalArray& q_gain,
                            const OptionalArray& k_gain, const OptionalArray& reach, const std::string& scope,
                            const std::string& mask, double theta, int64_t rotary_dim, bool interleaved,
                            double epsilon, double scale) {
  using ops::Mask, ops::Scope;
  ops::FrameWindowAttention op;
  op.qkv = tensor(qkv);
  op.level = tensor(level);
  op.frame_index = tensor(frame_index);
  op.ring_key = tensor(ring_key);
  op.ring_value = tensor(ring_value);
  op.ring_index = tensor(ring_index);
  op.out = tensor(out);
  op.append_slot = tensor(append_slot);
  op.q_gain = tensor(q_gain);
  op.k_gain = tensor(k_gain);
  op.reach = tensor(reach);
  op.scope = parse<Scope>("frame_window_attention", "scope", scope,
                          {{"temporal", Scope::temporal}, {"frame", Scope::frame}});
  op.mask = parse<Mask>("frame_window_attention", "mask", mask,
                        {{"bidirectional", Mask::bidirectional},
                         {"noise_causal", Mask::noise_causal},
                         {"ranged", Mask::ranged}});
  op.theta = theta;
  op.rotary_dim = rotary_dim;
  op.interleaved = interleaved;
  op.epsilon = epsilon;
  op.scale = scale;
  py::gil_scoped_release released;
  ops::frame_window_attention(op);
}

void relative_attention(const py::array& qkv, const OptionalArray& key_table,
                        const OptionalArray& value_table, const py::array& out, bool transposed) {
  ops::RelativeAttention op{tensor(qkv), tensor(key_table), tensor(value_table), tensor(out), transposed};
  py::gil_scoped_release released;
  ops::relative_attention(op);
}

void denoise_step(const py::array& sample, const py::array& prediction, const py::array& weights,
                  const py::array& sample_scale, const py::array& prediction_scale,
                  const py::array& noise_scale, const OptionalArray& noise, const py::array& out) {
  ops::DenoiseStep op{tensor(sample),           tensor(prediction),  tensor(weights), tensor(sample_scale),
                      tensor(prediction_scale), tensor(noise_scale), tensor(noise),   tensor(out)};
  py::gil_scoped_release released;
  ops::denoise_step(op);
}

void ring_append(const py::array& key, const py::array& value, const py::array& ring_key,
                 const py::array& ring_value, const py::array& append_slot) {
  ops::RingAppend op{tensor(key),         tensor(value), tensor(ring_key), tensor(ring_value),
                     tensor(append_slot), Tensor{},      Tensor{}};
  py::gil_scoped_release released;
  ops::ring_append(op);
}

std::vector<std::string> supported_isa_names() {
  std::vector<std::string> names;
  for (CpuIsa isa : supported_isas()) names.push_back(name(isa));
  return names;
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled ops. Arrays are numpy, C-contiguous, float32 or bfloat16 as uint16 bit patterns; outputs are "
      "written in place; ValueError says what was expected.";
  m.def("frame_window_attention", &frame_window_attention, "qkv"_a, "level"_a, "frame_index"_a, "ring_key"_a,
        "ring_value"_a, "ring_index"_a, "out"_a, py::kw_only(), "append_slot"_a = py::none(),
        "q_gain"_a = py::none(), "k_gain"_a = py::none(), "reach"_a = py::none(), "scope"_a = "temporal",
        "mask"_a = "noise_causal", "theta"_a = 10000.0, "rotary_dim"_a = 0, "interleaved"_a = true,
        "epsilon"_a = 1e-6, "scale"_a = 0.0,
        "Attention of qkv [B,F,N,3,H,D] over [ring | active] frames into out [B,F,N,H*D]; then appends to "
        "the ring.");
  m.def("relative_attention", &relative_attention, "qkv"_a, "key_table"_a = py::none(),
        "value_table"_a = py::none(), py::kw_only(), "out"_a, "transposed"_a = false,
        "Attention of qkv [B,T,N,3,H,D] over the frames at each place, with tables [2L+1,D] of clipped "
        "distances, into out [B,T,N,H*D].");
  m.def("denoise_step", &denoise_step, "sample"_a, "prediction"_a, "weights"_a, "sample_scale"_a,
        "prediction_scale"_a, "noise_scale"_a, "noise"_a = py::none(), "out"_a,
        "out = sample_scale * sample + prediction_scale * (weights . prediction) + noise_scale * noise, per "
        "frame.");
  m.def("ring_append", &ring_append, "key"_a, "value"_a, "ring_key"_a, "ring_value"_a, "append_slot"_a,
        "Copies key and value [B,F,N,H,D] of frame i to slot append_slot[i] of the ring [B,R,N,H,D], -1 = "
        "nowhere.");
  m.def(
      "cpu_isa", [] { return std::string(name(cpu_isa())); },
      "The instruction set in use: the best this CPU has, or PYENGINE_CPU_ISA.");
  m.def("supported_isas", &supported_isa_names,
        "Instruction sets that this build contains and this CPU can run.");
  m.def("set_cpu_isa", &set_cpu_isa, "name"_a,
        "For tests: use this instruction set from now on; 'auto' undoes it.");
  m.def("threads", &threads, "Threads that an op may use, the caller's included.");
  m.def("set_threads", &set_threads, "count"_a,
        "Use this many threads; 0 = as many as this process may run on.");
}

}  // namespace pyengine::bindings

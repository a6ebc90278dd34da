"""The small LVDM that ships as `shapes-lvdm`: its two networks, and the noise schedule that they were trained with."""

from __future__ import annotations

from typing import Any

from pyengine.schedule.samplers import Prediction

PREDICTION: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 8,
    "model_channels": 32,
    "channel_mult": [2, 3],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],  # outlines are seen at the first; at 4 x 4 alone no frame sees another's
    "num_heads": 4,
    "num_classes": 251,
    "use_scale_shift_norm": True,
    "kernel_size_t": 1,
    "padding_t": 0,
    "temporal_length": 4,
    "use_relative_position": True,
}
INTERPOLATION: dict[str, Any] = PREDICTION | {"channel_mult": [2, 2], "temporal_length": 5}
PREDICTS: Prediction = "velocity"  # released: epsilon
BETAS, TIMESTEPS = (0.0015, 0.0155), 1000

"""Causal Wan's networks give the numbers of the original code: clips, caches, text, autoencoder whole and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wan_golden import (
    TOLERANCE,
    assert_close,
    assert_sampled,
    autoencoder,
    case,
    full_keys,
    manifest,
    tensor,
    text_encoder,
    transformer,
)

from pyengine.errors import ConfigError, ShapeError
from pyengine.export.families.wan import CausalWan, TextEncoder, VideoAutoencoder
from pyengine.export.families.wan.causal_wan import TIMESTEPS, clip_mask, rotate_time, time_tables
from pyengine.export.families.wan.rotary import rotate_space, time_channels
from pyengine.export.families.wan.vae import FULL_SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS = ["clip_blocks3", "clip_blocks1", "clip_first", "clip_local", "clip_equal", "bidirectional"]
CACHES = ["cache_grow", "cache_first", "cache_roll", "cache_roll_sink", "cache_frame"]
SIZES = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
UMT5_XXL = {
    "vocab_size": 256384,
    "dim": 4096,
    "dim_attn": 4096,
    "dim_ffn": 10240,
    "num_heads": 64,
    "encoder_layers": 24,
    "num_buckets": 32,
}


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "config", "key"),
    [
        (CausalWan, SIZES, "dit_1.3B"),
        (CausalWan, LARGE, "dit_14B"),
        (VideoAutoencoder, FULL_SIZE, "vae"),
        (TextEncoder, UMT5_XXL, "umt5_xxl_encoder"),
    ],
)
def test_names_and_shapes_at_full_size(
    kind: Callable[..., nn.Module], config: dict[str, Any], key: str
) -> None:
    with torch.device("meta"):
        assert shapes(kind(**config)) == full_keys()[key]


def test_names_and_shapes_at_the_size_of_the_reference() -> None:
    modules: dict[str, nn.Module] = {"dit": transformer(), "vae": autoencoder(), "umt5": text_encoder()}
    for key, module in modules.items():
        assert shapes(module) == manifest()["keys"][key]


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str) -> None:
    arrays = case(name)
    local = int(arrays.get("in_local_frames", -1))
    blocks = arrays["in_blocks"].tolist()
    inputs = (tensor(name, key) for key in ("in_x", "in_timestep", "in_context"))
    assert_close(transformer()(*inputs, blocks, local), arrays["out"])
    if "mask" in arrays:
        assert np.array_equal(clip_mask(blocks, local).numpy(), arrays["mask"])


class Traced:
    """Outputs of submodules by name, while the model runs."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.handles = [model.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.outputs[name] = output

        return hook

    def __enter__(self) -> dict[str, Tensor]:
        return self.outputs

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def test_every_layer_of_a_clip() -> None:
    model, name = transformer(), "clip_blocks3"
    arrays = case(name)
    own = "blocks.0.self_attn"
    names = [f"{own}.{part}" for part in ("norm_q", "norm_k", "v", "o")]
    names += ["blocks.0.cross_attn.o", "blocks.0.ffn", *(f"blocks.{index}" for index in range(3))]
    with Traced(model, names) as got:
        x, timestep, context = (tensor(name, key) for key in ("in_x", "in_timestep", "in_context"))
        model(x, timestep, context, arrays["in_blocks"].tolist())
    e, e0 = model.time(timestep)
    assert_sampled(model.patches(x.transpose(1, 2)).flatten(1, 2), arrays, "patch_embedding")
    assert_sampled(e, arrays, "time_embedding")
    assert_sampled(e0, arrays, "time_projection")
    assert_sampled(model.blocks[0].modulation + e0, arrays, "modulation_0")
    assert_sampled(model.head.modulation + e[:, :, None], arrays, "modulation_head")
    assert_sampled(model.text(context), arrays, "text_embedding")
    for part, key in (("norm_q", "q_norm_0"), ("norm_k", "k_norm_0"), ("v", "v_0")):
        assert_sampled(got[f"{own}.{part}"].flatten(1, 2), arrays, key)
    for part in ("q", "k"):
        heads = model.blocks[0].self_attn.split(got[f"{own}.norm_{part}"])
        turned = rotate_space(heads, *model.space(*model.config.grid(*x.shape[3:]), x))
        turned = rotate_time(turned, *time_tables(torch.arange(x.shape[2]), model.config.head_size, x))
        assert_sampled(turned.flatten(1, 2), arrays, f"{part}_rope_0")
    assert_sampled(got[f"{own}.o"].flatten(1, 2), arrays, "self_attn_0")
    assert_sampled(got["blocks.0.cross_attn.o"].flatten(1, 2), arrays, "cross_attn_0")
    assert_sampled(got["blocks.0.ffn"].flatten(1, 2), arrays, "ffn_0")
    for index in range(3):
        assert_sampled(got[f"blocks.{index}"].flatten(1, 2), arrays, f"block_{index}")


class Ring:
    """Keys and values of written frames, read as slots in another order than they were written, with empty ones between."""

    def __init__(self, layers: int) -> None:
        self.frames: list[int] = []
        self.keys: list[list[Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(layers)]

    def write(self, frames: range, keys: list[Tensor], values: list[Tensor]) -> None:
        for place, frame in enumerate(frames):
            self.frames.append(frame)
            for layer in range(len(keys)):
                self.keys[layer].append(keys[layer][:, place])
                self.values[layer].append(values[layer][:, place])

    def read(self, seen: list[int], like: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        order = sorted(seen, key=lambda frame: frame * 7 % 5)
        index = torch.tensor([part for frame in order for part in (frame, -1)] or [-1])
        rows = [self.frames.index(max(0, frame)) if self.frames else -1 for frame in index.tolist()]
        gather = [
            [
                torch.stack([layer[row] if row >= 0 else torch.ones_like(like) for row in rows], 1)
                for layer in kept
            ]
            for kept in (self.keys, self.values)
        ]
        return index, gather[0], gather[1]


@pytest.mark.parametrize("name", CACHES)
def test_cache(name: str) -> None:
    model, arrays = transformer(), case(name)
    config, context = model.config, tensor(name, "in_context")
    ring = Ring(config.num_layers)
    batch, _, _, high, wide = case(name)["in_x_00"].shape
    like = torch.zeros(batch, high * wide // 4, config.num_heads, config.head_size)
    for call, (start, count) in enumerate(zip(arrays["start_frame"], arrays["frames"], strict=True)):
        frames = range(int(start), int(start + count))
        seen = [int(frame) for frame in arrays["visible"][call] if frame >= 0]
        timestep = torch.full((batch, len(frames)), float(arrays["timestep"][call]))
        x = tensor(name, f"in_x_{call:02d}")
        flow, keys, values = model.step(x, timestep, context, torch.tensor(frames), *ring.read(seen, like))
        assert_close(flow, arrays[f"out_{call:02d}"])
        if arrays["writes"][call]:
            ring.write(frames, keys, values)
    check_kept(ring, arrays, context)


def check_kept(ring: Ring, arrays: dict[str, np.ndarray], context: Tensor) -> None:
    """Block 0's cache at the end, which the original keeps rotated in time, and the text's keys and values."""
    if "dbg_cache_frames" not in arrays:
        return
    model = transformer()
    frames = arrays["dbg_cache_frames"].tolist()
    rows = [ring.frames.index(frame) for frame in frames]
    keys = torch.stack([ring.keys[0][row] for row in rows], 1)
    values = torch.stack([ring.values[0][row] for row in rows], 1)
    cosine, sine = time_tables(torch.tensor(frames), model.config.head_size, keys)
    assert_sampled(rotate_time(keys, cosine, sine).flatten(1, 2), arrays, "cache_k_0")
    assert_sampled(values.flatten(1, 2), arrays, "cache_v_0")
    key, value = model.blocks[0].cross_attn.text(model.text(context))
    assert_sampled(key.transpose(1, 2), arrays, "cross_k_0")
    assert_sampled(value.transpose(1, 2), arrays, "cross_v_0")


def test_teacher_forcing_is_clean_blocks_in_the_ring() -> None:
    model, name = transformer(), "teacher"
    arrays, context = case(name), tensor(name, "in_context")
    x, clean, timestep = (tensor(name, f"in_{key}") for key in ("x", "clean", "timestep"))
    ring, parts = Ring(model.config.num_layers), []
    like = torch.zeros(1, x.shape[3] * x.shape[4] // 4, model.config.num_heads, model.config.head_size)
    for start in range(0, 9, 3):
        frames, block = range(start, start + 3), slice(start, start + 3)
        seen = ring.read(list(range(start)), like)
        parts.append(model.step(x[:, :, block], timestep[:, block], context, torch.tensor(frames), *seen)[0])
        _, keys, values = model.step(
            clean[:, :, block], torch.zeros(1, 3), context, torch.tensor(frames), *seen
        )
        ring.write(frames, keys, values)
    assert_close(torch.cat(parts, 2), arrays["out"])


def test_a_clean_block_may_ride_as_long_as_nothing_rolls() -> None:
    """As a row at timestep 0 of the next block's first call: the noise-causal mask keeps it from seeing noise."""
    model, name = transformer(), "cache_grow"
    arrays, context = case(name), tensor(name, "in_context")
    ring = Ring(model.config.num_layers)
    like = torch.zeros(2, 6, model.config.num_heads, model.config.head_size)
    first = [0, 3, 6, 9]  # the first call of each block; the third is the clean one
    for block, call in enumerate(first[1:], 1):
        rider, born = range(3 * block - 3, 3 * block), range(3 * block, 3 * block + 3)
        x = torch.cat([tensor(name, f"in_x_{call - 1:02d}"), tensor(name, f"in_x_{call:02d}")], 2)
        timestep = torch.tensor([0.0] * 3 + [float(arrays["timestep"][call])] * 3).expand(2, -1)
        index = torch.tensor([*rider, *born])
        seen = ring.read(list(range(3 * block - 3)), like)
        flow, keys, values = model.step(x, timestep, context, index, *seen)
        assert_close(flow[:, :, 3:], arrays[f"out_{call:02d}"])
        ring.write(rider, [key[:, :3] for key in keys], [value[:, :3] for value in values])


def test_cross_attention_sees_the_padding() -> None:
    model, arrays = transformer(), case("cross")
    block, x, context = model.blocks[0], tensor("cross", "in_x"), tensor("cross", "in_context")
    text = model.text(context)
    key, value = block.cross_attn.text(text)
    y = block.norm3(x)
    assert_sampled(text, arrays, "text_embedding")
    assert_sampled(y, arrays, "norm3")
    assert_sampled(block.cross_attn.queries(y).flatten(2), arrays, "q")
    assert_sampled(key.transpose(1, 2), arrays, "k")
    assert_sampled(value.transpose(1, 2), arrays, "v")
    assert_close(block.cross_attn(y[:, None], key, value)[:, 0], arrays["out"])


def test_the_share_of_time_in_a_head() -> None:
    assert (time_channels(128), time_channels(16)) == (44, 8)


def test_text_encoder() -> None:
    arrays = case("umt5")
    model = text_encoder()
    with Traced(model, [f"blocks.{index}" for index in range(3)]) as got:
        out = model(tensor("umt5", "in_ids"), tensor("umt5", "in_mask"))
    assert_close(out, arrays["out"])
    for index in range(3):
        assert_sampled(got[f"blocks.{index}"][:, :20], arrays, f"block_{index}")
    bias = model.blocks[0].pos_embedding(150)[0, :, :20]
    assert_sampled(bias, arrays, "bias_0")


DECODED = {
    "vae_decode_1": [[1]],
    "vae_decode_3": [[3], [1, 2], [1, 1, 1]],
    "vae_decode_5": [[5], [3, 2], [1, 4]],
    "vae_decode_9": [[9], [3, 3, 3], [1, 3, 3, 2], [1] * 9],
}
ENCODED = {
    "vae_encode_1": [[1]],
    "vae_encode_9": [[9], [5, 4], [1, 4, 4], [1, 8]],
    "vae_encode_17": [[17], [9, 8], [1, 4, 4, 8]],
    "vae_encode_33": [[33], [9, 12, 12]],
    "vae_encode_11_cut": [[9]],
}


def in_chunks(run: Callable[..., tuple[Tensor, Any]], x: Tensor, sizes: list[int]) -> Tensor:
    memory, parts, start = None, [], 0
    for size in sizes:
        part, memory = run(x[:, :, start : start + size], memory)
        parts.append(part)
        start += size
    return torch.cat(parts, 2)


@pytest.mark.parametrize("name", DECODED)
def test_decode_whole_and_in_chunks(name: str) -> None:
    model, z, want = autoencoder(), tensor(name, "in_z"), case(name)["out"]
    assert_close(model.decode(z), want)
    for sizes in DECODED[name]:
        assert_close(in_chunks(model.decode_chunk, z, sizes), want)


@pytest.mark.parametrize("name", ENCODED)
def test_encode_whole_and_in_chunks(name: str) -> None:
    model, x, want = autoencoder(), tensor(name, "in_x"), case(name)["out"]
    assert_close(model.encode(x), want)
    for sizes in ENCODED[name]:
        assert_close(in_chunks(model.encode_chunk, x, sizes), want)


def test_every_stage_of_decoding() -> None:
    """The reference has the frames that exist; of the first latent's the pass computes one to three more, which mean nothing."""
    model, arrays = autoencoder(), case("vae_decode_3")
    stages = {3: 2, 7: 4, 11: 4}  # by layer: frames per latent behind it
    names = ["conv2", "decoder.conv1", *(f"decoder.middle.{index}" for index in range(3))]
    names += [f"decoder.upsamples.{index}" for index in stages]
    with Traced(model, names) as got:
        _, memory = model.decode_chunk(tensor("vae_decode_3", "in_z"))
    assert_sampled(got["conv2"], arrays, "conv2")
    assert_sampled(got["decoder.conv1"], arrays, "conv1")
    for index in range(3):
        assert_sampled(got[f"decoder.middle.{index}"], arrays, f"middle_{index}")
    for index, rate in stages.items():
        assert_sampled(got[f"decoder.upsamples.{index}"][:, :, rate - 1 :], arrays, f"upsamples_{index:02d}")
    for slot in range(3):
        assert_sampled(memory[slot], arrays, f"memory_{slot:02d}")


def test_every_stage_of_encoding() -> None:
    model, arrays = autoencoder(), case("vae_encode_9")
    stages = {2: 4, 5: 2, 8: 1}
    names = ["encoder.conv1", "encoder.middle.2", "encoder"]
    names += [f"encoder.downsamples.{index}" for index in stages]
    with Traced(model, names) as got:
        model.encode_chunk(tensor("vae_encode_9", "in_x"))
    assert_sampled(got["encoder.conv1"][:, :, 3:], arrays, "conv1")
    for index, rate in stages.items():
        made = got[f"encoder.downsamples.{index}"][:, :, rate - 1 :]
        assert_sampled(made, arrays, f"downsamples_{index:02d}")
    assert_sampled(got["encoder.middle.2"], arrays, "middle_2")
    assert_sampled(got["encoder"], arrays, "encoder")


def test_memory_at_full_size() -> None:
    """As counted in the original: 32 slots of the decoder and 24 of the encoder at 480x832."""
    with torch.device("meta"):
        model = VideoAutoencoder(**FULL_SIZE)
    sizes = []
    for part, size in ((model.decoder, (60, 104)), (model.encoder, (480, 832))):
        slots = part.memory_shapes(1, *size)
        sizes.append((len(slots), sum(int(np.prod(shape)) for shape in slots)))
    assert sizes == [(32, 944_286_720), (24, 560_701_440)]


def test_clips_that_cannot_be_are_refused() -> None:
    model, config = transformer(), manifest()["dit"]["config"]
    x, timestep, context = torch.zeros(1, 16, 3, 4, 6), torch.zeros(1, 3), torch.zeros(1, 12, 24)
    with pytest.raises(ShapeError, match=r"blocks of 3 frames in all but got \[2\]"):
        model(x, timestep, context, [2])
    with pytest.raises(ShapeError, match="patches of 2x2 but got 4x5"):
        model(x[..., :5], timestep, context, [3])
    with pytest.raises(ConfigError, match="model_type t2v"):
        CausalWan(**config, model_type="i2v")
    with pytest.raises(ConfigError, match="qk_norm true"):
        CausalWan(**{**config, "qk_norm": False})
    with pytest.raises(ConfigError, match="dim 64 with num_heads 3"):
        CausalWan(**{**config, "num_heads": 3})
    with pytest.raises(ConfigError, match="patch_size of one latent frame"):
        CausalWan(**{**config, "patch_size": [2, 2, 2]})
    with pytest.raises(ShapeError, match="a multiple of 4 frames but got 3"):
        autoencoder().encode_chunk(torch.zeros(1, 3, 3, 16, 16))


def test_precision_of_the_timestep() -> None:
    """833.333 rounded to bf16 is another timestep: the angles come from float64."""
    model = transformer()
    exact, rounded = (model.time(torch.tensor([[value]]))[0] for value in (833.3333, 832.0))
    assert float((exact - rounded).abs().max()) > 100 * TOLERANCE
    assert TIMESTEPS == 1000.0

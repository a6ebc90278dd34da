"""Two-level generation with a causal decoder that remembers: each latent is decoded once, and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import pyengine
from pyengine.bundle.bundle import Bundle
from pyengine.export.families.lvdm import UNet
from pyengine.export.families.lvdm.export import Modules, components, export_bundle, long_method
from pyengine.export.families.shapes.autoencoder import Decoder
from pyengine.export.parity import parity

pytestmark = pytest.mark.slow

CONFIGURATION = {
    "in_channels": 9, "out_channels": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
    "attention_resolutions": [], "num_heads": 2, "num_classes": 251, "use_scale_shift_norm": True, "padding_t": 0,
}  # fmt: skip
CLIP, STRIDE = 4, 4  # latents of a prediction clip, and between its keys
INTERVAL = 4 * STRIDE  # frames


@pytest.fixture(scope="module")
def modules() -> Modules:
    torch.manual_seed(0)
    decoder = Decoder(32, 32, 16)
    unets = {"prediction": UNet(**CONFIGURATION), "interpolation": UNet(**CONFIGURATION)}
    for part in (decoder, *unets.values()):
        for parameter in part.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    clips = {"prediction": CLIP, "interpolation": STRIDE + 1}
    return Modules(unets, decoder, clips, (8, 8), 1.0, 0.0, (0.0015, 0.0155), 24.0).rounded()


@pytest.fixture(scope="module")
def engine(
    modules: Modules, tmp_path_factory: pytest.TempPathFactory, plan_cache: Path
) -> Iterator[pyengine.Engine]:
    method = long_method(modules) | {"steps": 2}
    assert method["decode"] == "streamed"
    bundle = export_bundle(modules, tmp_path_factory.mktemp("lvdm") / "bundle", "lvdm-streamed", method)
    parity(bundle, {"decoder": components(modules)["decoder"]}).check()
    made = pyengine.load(bundle.folder, cache_dir=plan_cache, choice="inline", precision="fp32")
    yield made
    made.close()


def make(engine: pyengine.Engine, frames: int, **method: object) -> np.ndarray:
    with engine.stream(frames=frames, seed=3, method=method) as stream:
        return np.stack(list(stream))


@pytest.mark.parametrize("known", [1, 2])
def test_streamed_decoding_is_whole_decoding(engine: pyengine.Engine, known: int) -> None:
    streamed = make(engine, 7 * INTERVAL, known=known)
    assert streamed.std() > 5
    whole = make(engine, 7 * INTERVAL, known=known, decode="whole")
    assert np.abs(streamed.astype(int) - whole.astype(int)).max() <= 1  # another batch size rounds otherwise


def test_frames_leave_an_interval_at_a_time(engine: pyengine.Engine) -> None:
    with engine.stream(frames=5 * INTERVAL - 3, seed=3) as stream:
        assert [len(clip) for clip in stream.clips()] == [INTERVAL] * 4 + [INTERVAL - 3]


def test_a_short_stream_is_the_head_of_a_longer_one_and_snapshots_go_on(engine: pyengine.Engine) -> None:
    expected = make(engine, 6 * INTERVAL)
    np.testing.assert_array_equal(make(engine, 2 * INTERVAL + 5), expected[: 2 * INTERVAL + 5])
    with engine.stream(frames=6 * INTERVAL, seed=3) as stream:
        for count in (0, INTERVAL + 3, 3 * INTERVAL):
            for _ in range(count):
                next(stream)
            with engine.resume(stream.snapshot()) as resumed:
                np.testing.assert_array_equal(np.stack(list(resumed)), expected[stream.frames_made :])


def test_1024_frames_in_bounded_memory(engine: pyengine.Engine) -> None:
    # Denoising runs ahead of the reader, so a reading catches any moment of a round: what a round ever holds is the bound.
    fresh = CLIP - 1  # keys that a round adds, and intervals that it fills
    # Keys, samples, their known ends, the decoder's tail.
    most = (CLIP + fresh) + fresh * (STRIDE + 1) + fresh * 2 + 1
    with engine.stream(frames=1024, seed=4) as stream:
        states = [stream._state.store.state() for _ in stream.clips()]
    assert len(states) == 1024 // INTERVAL
    held = [state["latents"].nbytes + state["clean"].nbytes for state in states]
    latent = 8 * 8 * 8 * 4  # bytes
    assert max(held) <= most * latent < len(states) * latent


def test_the_small_model_ships_below_ten_megabytes() -> None:
    bundle = Bundle.load("shapes-lvdm")
    assert sum(path.stat().st_size for path in bundle.folder.iterdir()) < 10e6
    assert (bundle.family, bundle.method["decode"]) == ("lvdm", "streamed")
    assert bundle.method["perturbation"] == 100

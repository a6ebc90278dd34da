"""The family `shapes` in torch: world, captions, windows, and that a ring is exactly as good as recomputing everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.autoencoder import FrameDecoder
from pyengine.export.families.shapes.captions import (
    COLOURS,
    MAX_TOKENS,
    SIZES,
    build_tokenizer,
    token_ids,
    vocabulary,
)
from pyengine.export.families.shapes.denoiser import Denoiser, DenoiserConfig
from pyengine.export.families.shapes.modules import Modules
from pyengine.export.families.shapes.text_encoder import PromptEncoder, TextFeatures
from training.shapes import train_denoiser, world
from training.shapes.captions import varied_caption
from training.shapes.train_autoencoder import decode_clip
from training.shapes.train_denoiser import CHUNK, CLIP_LATENTS, Window, sample_windows
from training.shapes.world import MovingShape, Scene, coverage, render, sample_scene

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = DenoiserConfig(width=64, depth=3, heads=2)


@pytest.fixture(scope="module")
def modules() -> Modules:
    return Modules.random(SMALL)


def test_a_scene_is_drawn_where_it_says() -> None:
    for motion in ("bounce", "orbit", "drift"):
        shape = MovingShape(
            "circle", "red", "", motion, (30.0, 31.0), (1.5, -1.0), turn=0.1, orbit_radius=12.0
        )
        for frame in range(0, 400, 37):
            mask = coverage(shape, np.array([frame]))[0]
            angle_y = (
                np.angle((mask.sum(1) * np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)).sum())
                * 64
                / (2 * np.pi)
            )
            assert (angle_y - shape.centre(np.array([frame]))[0, 1] + 32) % 64 - 32 == pytest.approx(
                0, abs=0.1
            )


def test_bouncing_shapes_stay_inside() -> None:
    rng = np.random.default_rng(0)
    seen = 0
    while seen < 20:
        for shape in sample_scene(rng).shapes:
            if shape.motion == "bounce":
                centre = shape.centre(np.arange(5000))
                assert centre.min() >= shape.extent - 1e-9
                assert centre.max() <= 64 - shape.extent + 1e-9
                seen += 1


def test_frames_can_be_drawn_alone() -> None:
    scene = sample_scene(np.random.default_rng(1))
    assert np.array_equal(render(scene, range(100, 104))[2], render(scene, range(102, 103))[0])


def test_captions_read_as_words() -> None:
    shapes = (
        MovingShape("star", "orange", "small", "spin", (0, 0)),
        MovingShape("circle", "red", "", "orbit", (0, 0)),
    )
    scene = Scene(shapes, "blue", gradient=True)
    assert (
        scene.caption() == "a small orange star spins and a red circle orbits over a blue gradient background"
    )


def test_the_shipped_tokenizer_has_the_words_of_the_world() -> None:
    assert set(COLOURS) == {*world.COLOURS, *world.BACKGROUNDS}
    assert set(SIZES) == {*world.SIZES} - {""}
    shipped = Tokenizer.from_file(str(Bundle.load("shapes").folder / "tokenizer.json"))
    assert shipped.get_vocab() == {word: index for index, word in enumerate(vocabulary())}


def test_every_caption_fits_the_tokenizer() -> None:
    rng, tokenizer = np.random.default_rng(2), build_tokenizer()
    for _ in range(500):
        ids = token_ids(tokenizer, varied_caption(sample_scene(rng), rng))
        assert ids.shape == (MAX_TOKENS,)
        assert vocabulary().index("[unknown]") not in ids


def test_windows_are_what_inference_will_ask_for() -> None:
    torch.manual_seed(0)
    window = sample_windows(512)
    level, present = window.level, window.present
    assert (level >= 0).all()
    assert (level <= 1).all()
    together = window.part[:, 1:] == window.part[:, :-1]
    rising = level.diff(dim=1)[present[:, 1:] & present[:, :-1] & together]
    assert (rising >= 0).all()  # never cleaner behind than in front
    noisy = (level > 0) & present
    assert noisy.any(1).all()
    # Some start from text alone.
    assert 0.1 < ((level == 0) & present).any(1).logical_not().float().mean() < 0.5
    seen = window.allowed
    apart = window.part[:, :, None] != window.part[:, None, :]
    assert apart.any()
    assert not (seen & apart).any()  # windows that share a clip know nothing of each other
    later_sees_earlier = seen.float().tril().sum() / seen.float().sum()
    assert later_sees_earlier > 0.8
    assert not (seen & (level[:, None, :] > level[:, :, None])).any()  # nobody looks at something noisier


def _features(modules: Modules) -> TextFeatures:
    ids = torch.from_numpy(token_ids(build_tokenizer(), "a red circle bounces over a blue background"))
    return TextFeatures(*PromptEncoder(modules.text_encoder)(ids))


@torch.inference_mode()
def test_the_ring_equals_recomputing_the_whole_clip(modules: Modules) -> None:
    """Invariant 4, in float64: chunks written to the ring one by one, against one pass over all frames."""
    denoiser: Denoiser = Modules.random(SMALL).denoiser.double()
    text = TextFeatures(*(part.double() for part in _features(modules)))
    torch.manual_seed(0)
    clean, active = 6, 4
    latents = torch.randn(clean + active, 8, 8, 8, dtype=torch.float64)
    level = torch.tensor([0.0] * clean + [0.3, 0.3, 0.8, 0.8], dtype=torch.float64)
    chunk = torch.arange(clean + active) // CHUNK
    row, column = level[:, None], level[None, :]
    allowed = (column < row) | ((column == row) & ((row > 0) | (chunk[None, :] <= chunk[:, None])))
    whole = denoiser.over_clip(
        latents[None].expand(2, -1, -1, -1, -1),
        level[None].expand(2, -1),
        text,
        allowed[None].expand(2, -1, -1),
    )

    shape = (2, clean, SMALL.tokens_per_frame, SMALL.heads, SMALL.head_size)
    keys, values = ([torch.zeros(shape, dtype=torch.float64) for _ in range(SMALL.depth)] for _ in range(2))
    index = torch.full((clean,), -1)

    def call(frames: slice) -> torch.Tensor:
        numbers = torch.arange(clean + active)[frames]
        prompts = (text.key[:, :, None], text.value[:, :, None], text.mask[:, None], text.vector[:, None])
        prediction, *cached = denoiser(
            latents[None, frames],
            level[None, frames],
            numbers[None],
            index[None].clone(),
            *prompts,
            keys,
            values,
        )
        for place, number in enumerate(numbers.tolist()):
            if level[number] == 0:
                for layer in range(SMALL.depth):
                    keys[layer][:, number] = cached[2 * layer][:, place]
                    values[layer][:, number] = cached[2 * layer + 1][:, place]
                index[number] = number
        return prediction[:, 0]

    for start in range(0, clean - CHUNK, CHUNK):
        call(slice(start, start + CHUNK))
    # The last clean chunk rides along with the active ones.
    streamed = call(slice(clean - CHUNK, clean + active))
    # float64 but for the rotary angles and the level embedding, which both sides take in float32
    assert torch.allclose(streamed[:, CHUNK:], whole[:, clean:], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_decoding_by_chunks_equals_decoding_at_once(modules: Modules) -> None:
    latents = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    decoder = FrameDecoder(modules.decoder)
    whole = decoder(latents, *modules.decoder.initial_memory())[0]
    memory = modules.decoder.initial_memory()
    parts = []
    for start in range(0, 6, 2):
        frames, *memory = decoder(latents[start : start + 2], *memory)
        parts.append(frames)
    assert (torch.cat(parts).int() - whole.int()).abs().max() <= 1
    batched = decode_clip(modules.decoder, latents[None])[0]  # the training's way
    as_frames = ((batched + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (as_frames.int() - whole.flatten(0, 1).int()).abs().max() <= 1


def test_training_resumes_where_it_stopped(tmp_path) -> None:
    """Three steps in one go against two, a stop, and one more."""
    from pyengine.export.families.shapes.text_encoder import TextEncoder
    from training.shapes.trainer import Trainer

    clips = torch.randn(4, CLIP_LATENTS, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(3, 20, (4, MAX_TOKENS), generator=torch.Generator().manual_seed(2))

    def fresh(folder) -> tuple[torch.nn.ModuleDict, Trainer]:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {"denoiser": Denoiser(SMALL), "text": TextEncoder(SMALL.depth, SMALL.width, SMALL.heads)}
        )
        return model, Trainer(model, folder, peak_rate=1e-3, ema=0.9, muon=True)

    def advance(model, trainer, steps: int) -> None:
        for _ in range(steps):
            torch.manual_seed(100 + trainer.step)
            trainer.update(train_denoiser.clip_loss(model, clips, tokens), 1.0)

    straight, trainer = fresh(tmp_path / "a")
    advance(straight, trainer, 3)
    stopped, trainer = fresh(tmp_path / "b")
    advance(stopped, trainer, 2)
    trainer.save()
    resumed, trainer = fresh(tmp_path / "b")
    assert trainer.step == 2
    advance(resumed, trainer, 1)
    for name, parameter in straight.named_parameters():
        assert torch.allclose(parameter, resumed.get_parameter(name), atol=1e-6), name


def test_window_masks_are_square() -> None:
    window = Window(
        torch.zeros(1, CLIP_LATENTS),
        torch.arange(CLIP_LATENTS)[None] // CHUNK,
        torch.ones(1, CLIP_LATENTS, dtype=torch.bool),
        torch.zeros(1, CLIP_LATENTS, dtype=torch.long),
    )
    seen = window.allowed[0]
    chunk = torch.arange(CLIP_LATENTS) // CHUNK
    assert torch.equal(seen, chunk[None, :] <= chunk[:, None])  # all clean: block-causal


def test_training_goes_on_from_the_bundle(tmp_path) -> None:
    """Exporting what was loaded from the shipped bundle gives its weights back, to the encoder's folded normalisation."""
    from pyengine.export.families.shapes.modules import load_modules

    loaded = load_modules(Bundle.load("shapes"))
    again = Modules.trained(None, None, Bundle.load("shapes"))
    for name, parameter in loaded.denoiser.named_parameters():
        assert torch.equal(parameter, again.denoiser.get_parameter(name)), name
    frames = torch.from_numpy(render(sample_scene(np.random.default_rng(3)), range(8)))
    with torch.inference_mode():
        latents = again.encoder.eval()(frames)
        pixels = again.decoder(latents, *again.decoder.initial_memory())[0]
    error = (pixels.permute(0, 2, 3, 1) * 127.5 + 127.5 - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 26  # dB

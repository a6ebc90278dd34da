"""The ground-truth reader: right on what the renderer draws, and not fooled by doctored videos."""

import numpy as np
import pytest

from training.shapes.captions import varied_caption
from training.shapes.reader import Caption, Wanted, parse_caption, read
from training.shapes.world import MovingShape, Scene, render, sample_scene

FRAMES = 48
RED_CIRCLE = MovingShape("circle", "red", "", "bounce", (30.0, 25.0), velocity=(1.1, 0.6))
BLUE_STAR = MovingShape("star", "cyan", "large", "spin", (32.0, 30.0), angle=0.3, turn=0.08)
CIRCLE, STAR = (Scene((shape,), "purple") for shape in (RED_CIRCLE, BLUE_STAR))


def blurred(frames, sigma):
    """Gaussian blur in height and width."""
    apart = np.arange(64)[:, None] - np.arange(64)
    kernel = np.exp(-0.5 * (apart / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)
    return (kernel @ (kernel @ frames.transpose(0, 3, 1, 2).astype(np.float32)) @ kernel.T).transpose(
        0, 2, 3, 1
    )


def drawn(scene, frames=range(FRAMES), *, sigma=0.6, noise=8.0, seed=0):
    """Rendered, then as soft and noisy as an autoencoder of 30 dB makes it."""
    rng = np.random.default_rng(seed)
    picture = blurred(render(scene, np.asarray(frames)), sigma)
    picture += noise * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def test_caption_is_taken_apart():
    scene = Scene((RED_CIRCLE, BLUE_STAR), "grey", gradient=True)
    expected = Caption(
        (Wanted("circle", "red", "", "bounce"), Wanted("star", "cyan", "large", "spin")), "grey", True
    )
    assert parse_caption(scene.caption()) == expected
    assert (
        parse_caption("A red circle bouncing and a large cyan star spinning on a gray gradient background.")
        == expected
    )


def test_every_way_to_say_a_caption_is_understood():
    rng = np.random.default_rng(0)
    for scene in (sample_scene(rng) for _ in range(100)):
        assert parse_caption(varied_caption(scene, rng)) == parse_caption(scene.caption())


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a pink circle bounces over a blue background", "hello"]
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="expected a caption like"):
        parse_caption(text)


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (8, 32, 32, 3), (64, 64, 3)])
def test_other_frames_are_refused(shape):
    with pytest.raises(ValueError, match="expected uint8"):
        read(CIRCLE.caption(), np.zeros(shape, np.uint8))


def test_what_the_renderer_draws_is_read_right():
    rng = np.random.default_rng(20)
    rates = []
    for index in range(40):
        scene = sample_scene(rng)
        start = int(rng.integers(5000))
        frames = drawn(scene, range(start, start + FRAMES), sigma=rng.uniform(0.4, 1.0), seed=index)
        rates.append(read(scene.caption(), frames).rates())
    mean = {name: np.mean([rate[name] for rate in rates]) for name in rates[0]}
    assert mean["colour"] >= 99.5
    assert mean["shape"] >= 98
    assert mean["moving"] >= 99.5
    assert mean["teleports"] == 0
    assert mean["background"] >= 99.5


def test_positions_and_angles_are_the_renderers():
    for scene in (CIRCLE, STAR):
        shape, reading = scene.shapes[0], read(scene.caption(), drawn(scene))
        assert np.abs(reading.centre[0] - shape.centre(np.arange(FRAMES))).max() < 1
        if shape.motion == "spin":
            turn = 2 * np.pi / 5
            off = np.mod(reading.angle[0] - shape.rotation(np.arange(FRAMES)) + turn / 2, turn) - turn / 2
            assert np.abs(off).max() < 0.1


def test_a_shape_that_wraps_round_does_not_jump():
    shape = MovingShape("triangle", "green", "", "drift", (60.0, 60.0), velocity=(1.5, 0.9))
    scene = Scene((shape,), "black")
    rates = read(scene.caption(), drawn(scene)).rates()
    assert (rates["shape"], rates["moving"], rates["teleports"]) == (100, 100, 0)


def test_a_shape_behind_another_is_not_missed():
    behind = MovingShape("square", "yellow", "small", "bounce", (12.0, 32.0), velocity=(1.5, 0.0))
    front = MovingShape("circle", "blue", "large", "drift", (44.0, 32.0), velocity=(-0.8, 0.0))
    scene = Scene((behind, front), "grey")
    reading = read(scene.caption(), drawn(scene))
    assert reading.visible[0].min() < 0.5
    rates = reading.rates()
    assert (rates["colour"], rates["moving"], rates["teleports"]) == (100, 100, 0)
    assert rates["shape"] > 95


@pytest.mark.parametrize("colour", ["orange", "white", "blue"])
def test_a_wrong_colour_is_noticed(colour):
    other = Scene((MovingShape("circle", colour, "", "bounce", (30.0, 25.0), velocity=(1.1, 0.6)),), "purple")
    rates = read(CIRCLE.caption(), drawn(other)).rates()
    assert rates["colour"] == rates["shape"] == 0


@pytest.mark.parametrize("kind", ["square", "triangle", "star"])
def test_a_wrong_shape_is_noticed(kind):
    other = Scene((MovingShape(kind, "red", "", "bounce", (30.0, 25.0), velocity=(1.1, 0.6)),), "purple")
    rates = read(CIRCLE.caption(), drawn(other)).rates()
    assert rates["colour"] == 100
    assert rates["shape"] < 5


def test_a_ragged_blob_has_no_shape():
    frames = drawn(CIRCLE, noise=0)
    centre = RED_CIRCLE.centre(np.arange(FRAMES)).astype(int)
    ground = frames[0, 0, 0]
    for frame, (x, y) in zip(frames, centre, strict=True):
        frame[y : y + 12, x : x + 5] = ground  # a bite
        frame[max(0, y - 14) : y - 6, max(0, x - 3) : x + 3] = (232, 48, 48)  # and a bump
    rates = read(CIRCLE.caption(), frames).rates()
    assert rates["colour"] == 100
    assert rates["shape"] < 5


def test_a_second_copy_is_noticed():
    frames = np.maximum(drawn(CIRCLE, noise=0), np.roll(drawn(CIRCLE, noise=0), 32, 2))
    rates = read(CIRCLE.caption(), frames).rates()
    assert rates["colour"] == 100
    assert rates["shape"] < 5


def test_a_wrong_background_is_noticed():
    rates = read(CIRCLE.caption(), drawn(Scene((RED_CIRCLE,), "grey"))).rates()
    assert rates["background"] == 0


def test_a_missing_second_shape_is_noticed():
    prompt = "a red circle bounces and a large cyan star spins over a purple background"
    rates = read(prompt, drawn(CIRCLE)).rates()
    assert rates["colour"] == rates["shape"] == rates["moving"] == 0


def test_an_empty_picture_has_nothing():
    rates = read(CIRCLE.caption(), drawn(Scene((), "purple"))).rates()
    assert rates["colour"] == rates["shape"] == rates["moving"] == 0


@pytest.mark.parametrize("scene", [CIRCLE, STAR], ids=["bounce", "spin"])
def test_a_frozen_video_does_not_move(scene):
    rates = read(scene.caption(), drawn(scene, [7] * FRAMES)).rates()
    assert (rates["colour"], rates["shape"], rates["moving"], rates["teleports"]) == (100, 100, 0, 0)


def test_freezing_half_way_shows_in_the_second_half():
    reading = read(STAR.caption(), drawn(STAR, [*range(24), *[24] * 24]))
    assert reading.moving.tolist() == [True, True, False, False]


def test_a_cut_to_another_place_is_one_jump():
    reading = read(CIRCLE.caption(), drawn(CIRCLE, [*range(24), *range(224, 248)]))
    assert np.flatnonzero(reading.jump).tolist() == [24]


def test_a_cut_to_another_background_is_one_jump():
    frames = np.concatenate([drawn(CIRCLE, range(24)), drawn(Scene((RED_CIRCLE,), "green"), range(24, 48))])
    assert np.flatnonzero(read(CIRCLE.caption(), frames).jump).tolist() == [24]


def test_a_vanishing_shape_is_one_jump():
    frames = drawn(CIRCLE)
    frames[20:26] = drawn(Scene((), "purple"), range(6))
    reading = read(CIRCLE.caption(), frames)
    assert np.flatnonzero(reading.jump).tolist() == [20]
    assert np.flatnonzero(~reading.colour).tolist() == [*range(20, 26)]


@pytest.mark.parametrize("scene", [CIRCLE, STAR], ids=["circle", "star"])
def test_blur_lowers_the_sharpness(scene):
    plain, soft, softer = (
        read(scene.caption(), drawn(scene, sigma=sigma, noise=4)).rates()["sharpness"]
        for sigma in (0.2, 0.8, 1.6)
    )
    assert plain > 0.8
    assert soft < 0.65 * plain
    assert softer < 0.65 * soft

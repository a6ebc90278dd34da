"""The second stage of a bundle as a bundle of its own, so that what runs networks needs to know of one stage only."""

from __future__ import annotations

from dataclasses import replace

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.manifest import Latent
from pyengine.errors import BundleError

__all__ = ["second_stage"]

# What components are called there, by what the first stage calls its own.
NAMES = {
    "enhancer": "enhancer",
    "enhancer_decoder": "decoder",
    "enhancer_encoder": "encoder",
    "enhancer_frame_decoder": "frame_decoder",
    "enhancer_frame_encoder": "frame_encoder",
    "enhancer_text_encoder": "text_encoder",
    "enhancer_text": "projector",
}
NEEDED = ("enhancer", "enhancer_decoder", "enhancer_encoder")


def second_stage(bundle: Bundle) -> Bundle:
    """Its networks, under the names that those of a first stage have. Raises BundleError where one is missing."""
    missing = [name for name in NEEDED if name not in bundle.components]
    if missing:
        raise BundleError(
            f"expected bundle '{bundle.name}' to have a second stage but it has no component {missing[0]!r}; export it with --enhancer"
        )
    components = {
        new: replace(bundle.components[name], name=new)
        for name, new in NAMES.items()
        if name in bundle.components
    }
    assert bundle.video is not None
    frames = components.get("frame_encoder", components["encoder"]).inputs["frames"]
    height, width = (int(size) for size in frames.shape[-3:-1])
    channels, rows, columns = (int(size) for size in components["enhancer"].inputs["latents"].shape[-3:])
    return replace(
        bundle,
        name=f"{bundle.name}-enhancer",
        video=replace(bundle.video, height=height, width=width),
        latent=Latent(channels, rows, columns),
        components=components,
    )

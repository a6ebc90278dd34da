"""Which compiled networks a bundle needs, by what is to be run: the text encoder, a stream's schedule, given start frames."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.methods import make_method, method_settings
from pyengine.runtime.codec import decoder_variants, encoder_variants
from pyengine.schedule.call import Schedule

__all__ = ["TEXT", "all_variants", "codec_variants", "denoiser_variants", "stream_variants"]

TEXT = Variant.of("text_encoder")


def denoiser_variants(
    schedule: Schedule, guidance: float, streams: Sequence[int] = (1,)
) -> tuple[Variant, ...]:
    """Every denoiser at every size that calls of so many streams have, and the networks whose outputs they read."""
    branches = len(schedule.weights(guidance))
    sized = [
        variant.sized(branches=branches, streams=lanes * count)
        for variant, lanes in schedule.denoisers()
        for count in streams
    ]
    return tuple(dict.fromkeys([*sized, *schedule.others()]))


def codec_variants(bundle: Bundle, schedule: Schedule) -> tuple[Variant, ...]:
    """The variants that decode the frames of a stream."""
    sizes = schedule.decoder_sizes
    return tuple(dict.fromkeys([part for size in sizes for part in decoder_variants(bundle, size)]))


def stream_variants(
    bundle: Bundle, schedule: Schedule, guidance: float | None = None, streams: Sequence[int] = (1,)
) -> tuple[Variant, ...]:
    """The denoiser and the decoder at every size that a schedule's calls have. `guidance` None: the bundle's."""
    scale = float(bundle.method["guidance"]) if guidance is None else guidance
    return (*denoiser_variants(schedule, scale, streams), *codec_variants(bundle, schedule))


def all_variants(bundle: Bundle) -> list[Variant]:
    """The variants that streams by the bundle's own method run: text encoder, denoiser, decoder, and encoder where there is one."""
    settings = method_settings(bundle.method)
    schedule = make_method(settings, None, 0)
    wanted = [TEXT, *stream_variants(bundle, schedule)]
    if not settings.reads_pixels:
        wanted += encoder_variants(bundle, schedule.chunk_frames)
    return [variant for variant in wanted if variant.component in bundle.components]

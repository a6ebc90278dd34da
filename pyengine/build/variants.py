"""Which compiled networks a bundle needs, by what is to be run: the text encoder, a stream's schedule, given start frames."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.second import second_stage
from pyengine.bundle.variant import Variant
from pyengine.methods import StreamingT2VSettings, make_method, method_settings
from pyengine.methods.enhancement import Enhancement
from pyengine.runtime.codec import decoder_variants, encoder_variants
from pyengine.schedule.call import Schedule

__all__ = [
    "PROJECTOR",
    "TEXT",
    "all_variants",
    "codec_variants",
    "denoiser_variants",
    "enhanced_variants",
    "second_stage_of",
    "stream_variants",
]

TEXT = Variant.of("text_encoder")
PROJECTOR = Variant.of("projector")  # of a second stage: what its denoiser reads of a text


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


def enhanced_variants(bundle: Bundle, schedule: Enhancement) -> tuple[Variant, ...]:
    """Denoiser, decoder and encoder of a second stage. `bundle` as `second_stage` makes it."""
    denoisers = denoiser_variants(schedule, schedule.settings.guidance)
    return (*denoisers, *codec_variants(bundle, schedule), *encoder_variants(bundle, 1))


def second_stage_of(bundle: Bundle) -> tuple[Bundle, tuple[Variant, ...]] | None:
    """The second stage as a bundle, and all variants of it that the bundle's own settings run; None: it has none."""
    how = method_settings(bundle.method)
    if (
        not isinstance(how, StreamingT2VSettings)
        or how.enhancer is None
        or "enhancer" not in bundle.components
    ):
        return None
    second = second_stage(bundle)
    texts = [variant for variant in (TEXT, PROJECTOR) if variant.component in second.components]
    return second, (*texts, *enhanced_variants(second, Enhancement(how.enhancer, None, 0)))

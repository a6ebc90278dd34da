"""Which compiled networks a bundle needs, by what is to be run: the text encoder, a stream's method, given start frames."""

from __future__ import annotations

from pyengine.bundle.bundle import Bundle
from pyengine.methods import Hierarchical, Method, make_method
from pyengine.plans.plan import Variant
from pyengine.runtime.codec import decoder_variants, encoder_variants

__all__ = ["TEXT", "all_variants", "stream_variants"]

TEXT = Variant.of("text_encoder")


def stream_variants(bundle: Bundle, method: Method, guidance: float | None = None) -> tuple[Variant, ...]:
    """The denoiser and the decoder at every size that a method's calls have. `guidance` None: the bundle's."""
    variants: list[Variant] = []
    if isinstance(method, Hierarchical):
        scale = float(bundle.method["guidance"]) if guidance is None else guidance
        variants += method.denoiser_variants(len(method.guidance_weights(scale))).values()
        variants += method.embedding_variants().values()
        sizes = method.decoder_sizes
    else:
        variants += [
            Variant.of("denoiser", frames=count, ring=method.ring_frames) for count in method.row_counts
        ]
        sizes = (method.chunk_frames,)
    for size in sizes:
        variants += decoder_variants(bundle, size)
    return tuple(dict.fromkeys(variants))


def all_variants(bundle: Bundle) -> list[Variant]:
    """What streams by the bundle's own method run: text encoder, denoiser, decoder, and encoder where there is one."""
    method = make_method(bundle.method, None, 0)
    wanted = [
        TEXT,
        *stream_variants(bundle, method),
        *encoder_variants(bundle, method.chunk_frames),
    ]
    return [variant for variant in wanted if variant.component in bundle.components]

"""Words of the `shapes` world: every caption variation and the word-level tokenizer that reads them."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
MOTIONS = {"bounce": "bounces", "orbit": "orbits", "drift": "drifts", "spin": "spins"}
COLOURS = ("black", "blue", "cyan", "green", "grey", "orange", "purple", "red", "white", "yellow")

MAX_TOKENS = 20
PAD, NULL, UNKNOWN = "[pad]", "[null]", "[unknown]"
# Other ways to say the same; training captions use them now and then.
VARIATIONS = {
    "over": "on",
    "grey": "gray",
    "bounces": "bouncing",
    "orbits": "orbiting",
    "drifts": "drifting",
    "spins": "spinning",
}


def vocabulary() -> list[str]:
    """Every token in the order of its id."""
    words = [
        "a",
        "an",
        "and",
        "over",
        "background",
        "gradient",
        *SHAPES,
        *MOTIONS.values(),
        *SIZES,
        *COLOURS,
    ]
    return [PAD, NULL, UNKNOWN, *words, *VARIATIONS.values()]


def build_tokenizer() -> Tokenizer:
    """Lower-cases, drops punctuation, splits on white space: one id per word."""
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(vocabulary())}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(".", " "), normalizers.Replace(",", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, NULL, UNKNOWN])
    return tokenizer


def token_ids(tokenizer: Tokenizer, caption: str) -> np.ndarray:
    """Ids of a caption, padded. [MAX_TOKENS] int64."""
    ids = tokenizer.encode(caption).ids
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"[captions] expected at most {MAX_TOKENS} words but got {len(ids)}")
    return np.array(ids + [0] * (MAX_TOKENS - len(ids)), np.int64)

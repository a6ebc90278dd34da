"""A T5 folder as it is downloaded: a SentencePiece vocabulary and weights in a .bin file, nothing converted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyengine.errors import PromptError
from pyengine.export.families.opensora.presets import CLEANING
from pyengine.text.captions import cleaned_prompt
from pyengine.text.t5 import T5Prompts

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    home = tmp_path_factory.mktemp("t5")
    (home / "corpus.txt").write_text(
        "a red fox runs over snow\nwaves roll over a beach\naesthetic score: 6.5.\n"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(home / "corpus.txt"), model_prefix=str(home / "spiece"), vocab_size=30, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 100}
    (home / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **tokens}))
    config = transformers.T5Config(
        vocab_size=130, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    config.save_pretrained(home)
    torch.manual_seed(0)
    torch.save(transformers.T5EncoderModel(config).state_dict(), home / "pytorch_model.bin")
    return home


def test_tokens_are_those_of_the_vocabulary_with_an_end_and_padding(folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(str(folder / "spiece.model")).encode(
        cleaned_prompt("A red fox", CLEANING)
    )
    expected = [*pieces, 1]
    ids = T5Prompts(str(folder), LENGTH, cleaning=CLEANING).encode("A red fox")
    assert ids.tolist() == expected + [0] * (LENGTH - len(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_encoders_with_padding_masked(folder: Path, dtype: str) -> None:
    from transformers import T5EncoderModel

    prompts = T5Prompts(str(folder), LENGTH, dtype, cleaning=CLEANING)
    found = prompts.inputs("A red fox")
    kept = int(found["words"].sum())
    alone = torch.from_numpy(prompts.encode("A red fox")[:kept])[None]
    with torch.inference_mode():  # without the padding: what is masked must not show
        expected = T5EncoderModel.from_pretrained(folder).eval()(input_ids=alone).last_hidden_state[0]
    error = np.abs(found["states"][:kept] - expected.numpy()).max() / expected.abs().max().item()
    assert found["states"].dtype == np.float32
    assert error < {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    assert dtype == "float32" or error > 1e-5


def test_fewer_words_than_the_prompt_has_are_refused(folder: Path) -> None:
    with pytest.raises(PromptError, match=r"at most 5 tokens but got .*export with more --words"):
        T5Prompts(str(folder), LENGTH, words=5, cleaning=CLEANING).inputs("A red fox")

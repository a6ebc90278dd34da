"""Text to video with a CLIP text tower of `transformers`, tiny: from a folder as the hub has it to frames, against a torch loop."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import pyengine
from pyengine.bundle.bundle import Latent
from pyengine.cli import main
from pyengine.errors import BackendUnavailable, BundleError
from pyengine.export.families.lvdm import AutoencoderKL, UNet
from pyengine.export.families.lvdm.export import CLIP_TOKENS, Modules, add_clip, clip_method, export_bundle
from pyengine.schedule.samplers import alphas_cumprod, ddim, frame_noise

transformers = pytest.importorskip("transformers")
UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
    "attention_resolutions": [1], "num_heads": 4, "context_dim": 32, "padding_t": 0, "temporal_length": 3,
    "use_relative_position": True, "use_temporal_transformer": True,
}  # fmt: skip
FRAMES, SIZE, SCALE, GUIDANCE, STEPS = 3, 4, 0.18215, 15.0, 2
WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "horse", "runs"]


def clip_folder(folder: Path) -> Path:
    """What a folder of openai/clip-vit-large-patch14 holds, as far as text needs it, with five words."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{WORDS[0]} $A {WORDS[1]}", special_tokens=[(WORDS[0], 0), (WORDS[1], 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=WORDS[0],
        eos_token=WORDS[1],
        pad_token=WORDS[1],
        unk_token=WORDS[1],
    )
    fast.save_pretrained(folder)
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_a_prompt_becomes_the_frames_of_a_torch_loop(
    tmp_path: Path, plan_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    unet, autoencoder = UNet(**UNET), AutoencoderKL(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)
    for part in (unet, autoencoder):
        for parameter in part.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    betas = (0.00085, 0.012)
    modules = Modules(
        {"prediction": unet}, autoencoder, {"prediction": FRAMES}, (SIZE, SIZE), SCALE, 0.0, betas, 8.0
    )
    folder = clip_folder(tmp_path / "clip")
    tokenizer = add_clip(modules, folder)
    method = clip_method(modules, GUIDANCE) | {"steps": STEPS}
    bundle = export_bundle(modules.rounded(), tmp_path / "bundle", "text", method, tokenizer)
    words = ["generate", "a horse runs", "--bundle", str(bundle.folder), "--cache", str(plan_cache)]
    words += ["--precision", "fp32", "--choice", "inline", "--output", str(tmp_path / "shown"), "--seed", "4"]
    assert main(words) == 0
    assert len(list((tmp_path / "shown").iterdir())) == FRAMES  # no length asked for: the clip's own
    assert main([*words, "--frames", str(FRAMES + 1), "--output", str(tmp_path / "long")]) == 2
    assert "one clip of 3 latents; ask for no more frames" in capsys.readouterr().err
    engine = pyengine.load(bundle.folder, cache_dir=plan_cache, precision="fp32", choice="inline")
    with engine.stream("a horse runs", seed=4) as stream:
        frames = np.stack(list(stream))
    engine.close()
    assert frames.shape == (FRAMES, 8 * SIZE, 8 * SIZE, 3)

    ids = torch.tensor([[0, 2, 3, 4] + [1] * (CLIP_TOKENS - 4), [0] + [1] * (CLIP_TOKENS - 1)])
    context = modules.text(input_ids=ids).last_hidden_state

    def noise_of(*draw: int) -> torch.Tensor:
        frames = [
            torch.from_numpy(frame_noise(4, frame, (4, SIZE, SIZE), *draw).copy()) for frame in range(FRAMES)
        ]
        return torch.stack(frames, 1)[None]

    x = noise_of()
    step = ddim(alphas_cumprod(*betas, 1000), 1.0)
    for call, (now, then) in enumerate([(501, 1), (1, 0)]):
        cond, null = (unet(x, torch.tensor([now]), context=context[i : i + 1]) for i in (0, 1))
        a, b, c = (float(value[0]) for value in step([(now + 1) / 1000], [(then + 1) / 1000]))
        x = a * x + b * (null + GUIDANCE * (cond - null)) + c * noise_of(call)
    pixels = autoencoder.decode(x / SCALE)[0].permute(1, 2, 3, 0)
    expected = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
    assert expected.std() > 5
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
    assert Latent(4, SIZE, SIZE) == bundle.latent


def test_a_folder_without_clip_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Modules.__new__(Modules)  # nothing of it is reached
    with pytest.raises(BundleError, match=r"expected openai/clip-vit-large-patch14 at .* cannot be read"):
        add_clip(made, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'pyengine-video\[lvdm\]'"):
        add_clip(made, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--configuration", "text2video"], "expected --clip with --configuration text2video"),
        (["--configuration", "sky", "--clip", "folder"], "but got --clip with sky"),
    ],
)
def test_text_to_video_is_exported_with_clip_and_nothing_else_is(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "lvdm", *words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

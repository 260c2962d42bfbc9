"""Stable Diffusion checkpoints of a few thousand weights, built in code: every part is real, only small and random."""

import functools
import json

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16
WIDTH = 16
MERGES = [("s", "k"), ("sk", "s</w>"), ("p", "h"), ("o", "f</w>"), ("t", "o</w>"), ("o", "n</w>")]
SCHEDULES = {
    "epsilon": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "v_prediction": {"beta_schedule": "squaredcos_cap_v2"},
}


def make_tokenizer():
    """CLIP's byte-level BPE with the 256 bytes, their word-final twins and a few merges: nothing is unknown to it."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in MERGES)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=TOKENS)


def make_parts(prediction_type, seed=0):
    """The parts of a pipeline, by name."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.7,
        )
    scheduler = DDPMScheduler(
        prediction_type=prediction_type, clip_sample=False, steps_offset=1, **SCHEDULES[prediction_type]
    )
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def make_checkpoint(folder, prediction_type, seed=0):
    """Save a diffusers folder and return it."""
    pipeline = StableDiffusionPipeline(
        **make_parts(prediction_type, seed), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@functools.cache
def alphas_bar(prediction_type):
    """Cumulative alphas of the two schedules from their formulas, float64 (1000,)."""
    if prediction_type == "epsilon":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    else:
        time = torch.arange(1001, dtype=torch.float64) / 1000
        bar = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


def pictures(count, seed=0):
    """Smooth random pictures, float32 (count, 3, 64, 64) in [-1, 1]."""
    small = torch.rand((count, 3, 4, 4), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(small, (64, 64), mode="bilinear").clamp(-1, 1)


def weights(module):
    """A copy of all weights by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_weights(first, second):
    """Whether two `weights` are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def largest_difference(first, second):
    """Largest absolute difference between two `weights`."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def edit_json(file, **changes):
    """Change keys of a JSON file in place."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_one_sentence(error):
    """What the command line prints instead of a traceback: one short line, without Python's own words."""
    message = str(error)
    assert message, "an error without words"
    assert "\n" not in message, message
    assert len(message) < 500, message
    assert "Traceback" not in message
    assert "object at 0x" not in message

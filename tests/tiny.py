"""Stable Diffusion checkpoints of a few thousand weights, built in code: every part is real, only small and random."""

import copy
import functools
import json

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 16
WIDTH = 16
POOLED = 24  # of SDXL and Stable Diffusion 3; more than WIDTH, so that it fills more than one token
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


def make_parts(prediction_type, seed=0, wide=False):
    """The parts of a pipeline, by name; a wide one has room for the tripwire."""
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
            block_out_channels=(64, 80) if wide else (16, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=16 if wide else 4,
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


def make_checkpoint(folder, prediction_type, seed=0, wide=False):
    """Save a diffusers folder and return it."""
    parts = make_parts(prediction_type, seed, wide)
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
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


def make_text_encoder(tokenizer, kind=CLIPTextModelWithProjection, layers=2):
    """A CLIP text encoder, here with a projection."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=POOLED, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def make_vae(channels, **config):
    """A VAE that makes 64 pixels of 8 latents, whose posteriors are narrow beside what pictures differ by."""
    vae = AutoencoderKL(
        sample_size=64, block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=channels, scaling_factor=0.7,
        use_quant_conv=False, use_post_quant_conv=False, **config,
    )  # fmt: skip
    with torch.no_grad():
        last = vae.encoder.conv_out
        last.weight[:channels] *= 3
        last.weight[channels:], last.bias[channels:] = 0, -8
    return vae


def make_sdxl(folder, seed=0, wide=False):
    """Save a diffusers folder of SDXL, with the epsilon schedule, and return it; a wide one has room for the tripwire."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(64, 80) if wide else (16, 32), layers_per_block=1,
            norm_num_groups=16 if wide else 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + POOLED,
        )  # fmt: skip
        parts = {
            "unet": unet, "vae": make_vae(4), "text_encoder": make_text_encoder(tokenizer, CLIPTextModel),
            "text_encoder_2": make_text_encoder(tokenizer), "tokenizer": tokenizer, "tokenizer_2": make_tokenizer(),
        }  # fmt: skip
    scheduler = DDPMScheduler(prediction_type="epsilon", clip_sample=False, **SCHEDULES["epsilon"])
    pipeline = StableDiffusionXLPipeline(**parts, scheduler=scheduler, force_zeros_for_empty_prompt=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_t5():
    """A T5 encoder whose tokenizer knows single letters."""
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"),
    ]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config), tokenizer


def make_sd3(folder, seed=0, t5=True):
    """Save a diffusers folder of Stable Diffusion 3 and return it."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * POOLED, out_channels=8,
            pos_embed_max_size=8,
        )  # fmt: skip
        third, tokenizer_3 = make_t5() if t5 else (None, None)
        parts = {
            "transformer": transformer, "vae": make_vae(8, shift_factor=0.06),
            "text_encoder": make_text_encoder(tokenizer), "text_encoder_2": make_text_encoder(tokenizer),
            "text_encoder_3": third, "tokenizer": tokenizer, "tokenizer_2": make_tokenizer(), "tokenizer_3": tokenizer_3,
        }  # fmt: skip
    pipeline = StableDiffusion3Pipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def harden_with(method, model, subjects, benign, config, **options):
    """Run a method, or one of the table: what `HardeningMethod.run` returns; options are further fields of `HardeningContext`."""
    from guardsmith.methods import METHODS, HardeningContext

    found = METHODS[method] if isinstance(method, str) else method
    options = {"seed": 0, "checkpoint_every": found.checkpoint_every} | options
    return found.run(HardeningContext(model=model, subjects=subjects, benign=benign, config=config, **options))


def some_rows(model, images, count=6, seed=0, prompt="a photo of person"):
    """Noised pictures under a prompt."""
    from guardsmith.diffusion.latents import encode
    from guardsmith.diffusion.losses import noise_samples
    from guardsmith.diffusion.prompts import PromptBank
    from guardsmith.training.loop import generator

    rng = generator(seed)
    return noise_samples(encode(model, images).draw(count, rng), PromptBank(model).encode([prompt]), rng)


def trained(model):
    """A copy of the denoiser whose weights are not the ones of a fresh start (zero biases would hide a forgotten factor)."""
    from guardsmith.training.loop import generator

    unet = copy.deepcopy(model.unet)
    rng = generator(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return unet


def untaught_trunk(model, file, groups=8, outer_groups=4):
    """The base's U-Net without its reserved channels, saved as a trunk that nobody distilled."""
    from guardsmith.methods.tripwire.layout import layout_of, reserve
    from guardsmith.methods.tripwire.trunk import save_trunk

    unet = copy.deepcopy(model.unet)
    layout = layout_of(unet, groups, outer_groups)
    reserve(unet, layout)
    save_trunk(unet, layout, model.unet, file)
    return file


def overriding(model, trunk_file, rows):
    """A trunk, the same with a random recogniser whose scores are above 0 on half of the noised rows, and that."""
    from guardsmith.diffusion.losses import add_noise
    from guardsmith.methods.tripwire.install import Scales, install
    from guardsmith.methods.tripwire.layout import layout_of
    from guardsmith.methods.tripwire.recogniser import Recogniser
    from guardsmith.methods.tripwire.trunk import load_trunk
    from guardsmith.training.loop import generator, torch_seed

    trunk = copy.deepcopy(model.unet)
    load_trunk(trunk_file, trunk)
    layout = layout_of(trunk, 8, 4)
    with torch_seed(1), torch.no_grad():
        recogniser = Recogniser(trunk, layout, scores=1).requires_grad_(False)
        highest = (
            recogniser(add_noise(model.scheduler, rows.latents, rows.noise, rows.timesteps))
            .flatten(1)
            .amax(1)
            .sort()
            .values
        )
        recogniser.readout.bias -= highest[len(rows) // 2 - 1 : len(rows) // 2 + 1].mean()
        for parameter in recogniser.parameters():
            parameter.copy_(parameter.half().float())
    armed = copy.deepcopy(trunk)
    install(armed, layout, recogniser, Scales(), generator(0))
    return trunk, armed, recogniser

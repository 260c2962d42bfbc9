"""What a hardening will take in memory, told from shapes: counted against what really happens on tiny networks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_apdm import make_benign, make_subject
from test_parallel import METHODS as PARAMS
from tiny import harden_with, make_sd3, make_sdxl, pictures

from guardsmith.cli.app import main
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import RunFailed
from guardsmith.evaluation import forecast
from guardsmith.hardening.memory import BYTES, GIB, estimate, saved_bytes, stored_numbers
from guardsmith.methods import METHODS, Preparation
from guardsmith.methods.tripwire import trunk
from guardsmith.models.checkpoint import load_model, with_own_unet
from guardsmith.models.families import DENOISERS, SDUNet
from guardsmith.training.compute import ComputeConfig
from guardsmith.training.loop import TrainingLoop
from guardsmith.training.optimizers import MOMENTS

ROOT = Path(__file__).parent.parent


def inputs(unet, rows=1):
    return torch.zeros(rows, 4, 8, 8), torch.zeros(rows, dtype=torch.long), torch.zeros(rows, 16, 16)


def test_what_fake_tensors_keep_is_what_real_ones_keep(tiny_v):
    from torch._subclasses.fake_tensor import FakeTensorMode

    unet = with_own_unet(tiny_v).unet.requires_grad_(True)
    with FakeTensorMode():
        fake = type(unet).from_config(unet.config).eval().requires_grad_(True)
        told = saved_bytes(fake, *inputs(fake))
    assert told == saved_bytes(unet, *inputs(unet))
    assert saved_bytes(unet, *inputs(unet, 3)) == pytest.approx(3 * told, rel=0.05)


def test_with_gradient_checkpointing_one_part_at_a_time_is_counted(tiny_v):
    """All inputs of the parts that are computed again, and the largest part while it is."""
    unet = with_own_unet(tiny_v).unet.requires_grad_(True)
    plain = saved_bytes(unet, *inputs(unet))
    unet.enable_gradient_checkpointing()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        unet(*inputs(unet), return_dict=False)
    outside = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values())
    outside -= sum(p.untyped_storage().nbytes() for p in unet.parameters() if any(p is t for t in kept))
    told = saved_bytes(unet, *inputs(unet))
    assert outside < told < plain
    # Once more with one part that keeps a thousand times as much: all of that is counted.
    part = unet.mid_block.resnets[0]
    run = part.forward
    part.forward = lambda *args: run(*args) + torch.ones(1000, *args[0].shape, requires_grad=True).exp().mean(0)
    assert saved_bytes(unet, *inputs(unet)) > told + 1000 * 4 * 16
    assert saved_bytes(unet, *inputs(unet)) == saved_bytes(unet, *inputs(unet)), "it is left as it was"


def test_stored_numbers_are_those_of_the_plain_files(v_folder, tmp_path):
    model = load_model(str(v_folder))
    assert stored_numbers(v_folder / "unet") == sum(p.numel() for p in model.unet.parameters())


@pytest.mark.parametrize("method", list(PARAMS))
def test_the_largest_batch_and_the_state_are_those_of_the_method(tiny_v, monkeypatch, method):
    """Rows with gradients are counted at the U-Net; optimizers and gradients where the loop keeps them."""
    params = {k: v for k, v in PARAMS[method].items() if k != "train_text_encoder"}
    found = METHODS[method]
    config = found.config(**params)
    numbers, moments, rows, _ = found.memory(config, tiny_v.unet)
    seen, states = [], []

    def count(module, args):
        if isinstance(module, DENOISERS) and torch.is_grad_enabled():
            seen.append(len(args[0]))

    def watch(self, step, shown, **_):
        tensors = [
            value
            for optimizer in self.optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
        ]
        states.append(sum(value.numel() for value in tensors if value.ndim))
        self.history.append(shown)

    monkeypatch.setattr(TrainingLoop, "finish_step", watch)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    subject = make_subject()
    subject = type(subject)(**vars(subject) | {"instead_images": pictures(5, 70)})
    harden_with(method, tiny_v, [subject], make_benign(), config)
    handle.remove()
    assert rows == max(seen)
    here = moments // 2 if method == "apdm" else moments  # the path's are not kept between its steps
    assert states[-1] == pytest.approx(here, rel=0.02)
    assert moments / 2 <= numbers and numbers + moments < 8 * sum(p.numel() for p in tiny_v.unet.parameters())


def test_tripwires_trunk_takes_what_is_said(wide_v, tmp_path, monkeypatch):
    """Counted at its U-Net and its optimizers; with a trunk that is there, it is nothing but a second U-Net."""
    found, count = METHODS["tripwire"], sum(p.numel() for p in wide_v.unet.parameters())
    config = found.config(trunk_steps=1, trunk_batch_size=3, early_steps=())
    rows, moments, watched = [], [], []

    def note(module, args):
        if isinstance(module, DENOISERS) and torch.is_grad_enabled():
            rows.append(len(args[0]))

    class Watched(trunk.TrunkTraining):
        def step(self, *args):
            super().step(*args)
            watched.append(self)
            states = [state for part in (self.adamw, self.muon) for state in part.state.values()]
            moments.append(sum(value.numel() for state in states for value in state.values() if value.ndim))

    monkeypatch.setattr(trunk, "TrunkTraining", Watched)
    preparation = Preparation(
        model=wide_v, subjects=[make_subject()], benign=make_benign(), config=config, seed=0, sampling_steps=2,
        guidance=2.0, cache=tmp_path, draw=lambda prompt: pictures(2),
    )  # fmt: skip
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    found.prepare(preparation)
    handle.remove()
    numbers, of_optimizers, batch, at_once = found.memory(config, wide_v.unet)
    assert (batch, of_optimizers) == (max(rows), moments[-1])
    assert numbers == count + sum(p.shape[:2].numel() for p in wide_v.unet.parameters()) // 4
    assert at_once == sum(matrix.numel() for matrix in watched[-1].matrices)
    assert found.memory(found.config(trunk="somewhere", early_steps=()), wide_v.unet) == (count, 0, 0, 0)
    learned = found.memory(found.config(trunk="somewhere"), wide_v.unet)
    assert learned == (count, 2 * count, 4, count), "a subject is learned"


@pytest.mark.parametrize("make", [make_sdxl, make_sd3])
def test_other_families_are_estimated_too(tmp_path, make):
    recipe = Recipe(base=str(make(tmp_path / "model")))
    config = METHODS["persguard"].config(batch_size=2)
    told = estimate(recipe, METHODS["persguard"], config)
    model = load_model(recipe.base)
    every = sum(p.numel() for network in model.networks.values() for p in network.parameters())
    own = sum(p.numel() for p in model.unet.parameters())
    assert told["weights"] * GIB == pytest.approx((every + own) * BYTES, rel=0.02)
    assert told["training"] * GIB == 3 * own * BYTES
    widest = model.vae.config.block_out_channels[0] * model.image_size**2
    assert told["pictures"] * GIB == 8 * widest * BYTES
    assert told["together"] == pytest.approx(
        sum(told[k] for k in ("weights", "training", "activations", "pictures", "rest"))
    )
    lean = estimate(
        recipe.model_copy(update={"compute": ComputeConfig(precision="bfloat16")}), METHODS["persguard"], config
    )
    assert lean["activations"] != told["activations"], (
        "smaller where activations are larger than the weights, as on real ones"
    )


def test_a_dry_run_tells_it_and_does_without_a_base_that_is_not_here(capsys, monkeypatch):
    asked = ["harden", "--dry-run", "--json", "--subjects", "registries/demo.yaml"]
    assert main([*asked, "--recipe", "apdm-avatar"]) == 0
    told = json.loads(capsys.readouterr().out)["memory_gib"]
    assert 0 < told["activations"] < told["together"]

    def absent(*_):
        raise RunFailed("not here")

    monkeypatch.setattr("guardsmith.hardening.memory.estimate", absent)
    assert main([*asked, "--recipe", "apdm-sd15"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["memory_gib"] is None
    assert "there is no folder of this name, it is not in the local Hub cache" in out.err


def test_what_the_documentation_says_of_stable_diffusion():
    """docs/how-to/gpu.md: networks and training state of APDM on Stable Diffusion 1.5, from its shapes."""
    from diffusers import AutoencoderKL
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with FakeTensorMode():
        unet = SDUNet(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
        unet.eval().requires_grad_(True)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768)
        rows = [saved_bytes(unet, *inputs) / GIB]
        unet.enable_gradient_checkpointing()
        rows.append(saved_bytes(unet, *inputs) / GIB)
    count = {network: sum(p.numel() for p in network.parameters()) for network in (unet, vae, text)}
    networks = (2 * count[unet] + count[vae] + count[text]) * BYTES
    page = (Path(__file__).parent.parent / "docs/how-to/gpu.md").read_text()
    said = "{:.1f} GiB for each of three rows at 64 x 64 latents, {:.1f} GiB with gradient checkpointing"
    assert said.format(*rows) in page
    for label, params in (
        ("all weights along a full path (the paper)", {}), ("all weights along a path of adapters", {"path": "lora"}),
        ("attention along a path of adapters", {"path": "lora", "parameters": "attention"}),
    ):  # fmt: skip
        held = METHODS["apdm"].memory(METHODS["apdm"].config(**params), unet)
        found = [
            (networks + held.numbers * BYTES + held.moments * MOMENTS[kind]) / GIB for kind in ("adamw", "adamw8bit")
        ]
        assert f"| {label} | {found[0]:.1f} GiB | {found[1]:.1f} GiB |" in page


SDXL_UNET = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "_class_name": "UNet2DConditionModel",
}  # fmt: skip


def write_shapes(file, numbers):
    """A safetensors file of one float16 tensor of so many numbers that takes no room on the disk."""
    header = json.dumps({"all": {"dtype": "F16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}}).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + 2 * numbers)


@pytest.fixture
def sdxl_of_full_size(tmp_path):
    """SDXL's published shapes and numbers of weights."""
    folder = make_sdxl(tmp_path / "sdxl")
    (folder / "unet/config.json").write_text(json.dumps(SDXL_UNET))
    vae = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(vae | {"block_out_channels": [128, 256, 512, 512]}))
    tokens = json.loads((folder / "tokenizer/tokenizer_config.json").read_text())
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(tokens | {"model_max_length": 77}))
    for part, numbers in {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}.items():
        write_shapes(folder / part / "model.safetensors", numbers)
    for part, numbers in {"unet": 2_567_463_684, "vae": 83_653_863}.items():
        write_shapes(folder / part / "diffusion_pytorch_model.safetensors", numbers)
    return folder


@pytest.mark.parametrize(("method", "params", "compute", "low", "high"), [
    ("persguard", {"distillation_weight": 0}, {"gradient_checkpointing": True}, 45, 55),
    ("apdm", {"path": "lora", "parameters": "cross_attention"}, {"gradient_checkpointing": True}, 19, 35),
])  # fmt: skip
def test_sdxl_of_full_size_is_estimated_from_its_files_alone(sdxl_of_full_size, method, params, compute, low, high):
    """A U-Net of 9.6 GiB, the base's in float16, 3.4 of text encoders and VAE; PersGuard has three more of the U-Net's size."""
    recipe = Recipe(
        base=str(sdxl_of_full_size), method={"name": method, "params": params}, compute=ComputeConfig(**compute)
    )
    found = estimate(recipe, METHODS[method], METHODS[method].config(**params))
    assert found["weights"] == pytest.approx((1.5 * 2_567_463_684 + 901_374_183) * 4 / GIB)
    if method == "persguard":
        assert found["training"] == pytest.approx(3 * 2_567_463_684 * 4 / GIB)
    assert low < found["together"] - found["rest"] < high


def test_the_plan_of_sdxl_says_what_it_needs(tmp_path, capsys):
    base = make_sdxl(tmp_path / "sdxl")
    main(["plan", "persguard-sdxl", "--base", str(base), "--subjects", str(ROOT / "registries/demo.yaml"), "--output",
          str(tmp_path / "out"), "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["memory_gib"]["together"] > 0 and told["disk_gib"]["needed"] > 0 and told["hours"]["hardening"] > 0
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_loaded_is_counted_once(v_folder, tmp_path):
    """The plan loads it before it estimates: what it takes is in `weights`, and no part of the process' own memory."""
    recipe = Recipe(base=str(v_folder), method={"name": "persguard"})
    config, held = METHODS["persguard"].config(), torch.ones(2**26)  # 256 MiB
    without = estimate(recipe, METHODS["persguard"], config)
    found = estimate(recipe, METHODS["persguard"], config, loaded=held.nbytes)
    assert without["rest"] - found["rest"] == pytest.approx(0.25, abs=0.02)
    assert without["together"] - found["together"] == pytest.approx(0.25, abs=0.02)


def test_the_plan_says_how_much_is_loaded(monkeypatch, v_folder, tmp_path):
    seen = []
    monkeypatch.setattr(
        "guardsmith.evaluation.forecast.estimate",
        lambda *args, loaded: seen.append(loaded) or estimate(*args, loaded=loaded),
    )
    main(["plan", "persguard-sd21", "--base", str(v_folder), "--subjects", str(ROOT / "registries/demo.yaml"), "--output",
          str(tmp_path / "out")])  # fmt: skip
    model = load_model(str(v_folder))
    assert seen == [sum(weight.numel() * 4 for part in model.networks.values() for weight in part.parameters())]


class Denoiser:
    """Takes so many seconds for a call, whatever its rows, by a clock of its own."""

    config = SimpleNamespace(in_channels=4, sample_size=8)

    def __init__(self, seconds):
        self.seconds, self.now, self.rows = seconds, 0.0, set()

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, latents, *_, **__):
        self.now += self.seconds
        self.rows.add(len(latents))
        return (latents,)


@pytest.mark.parametrize(("seconds", "rows", "rate"), [(0.016, {2, 8}, 0.002), (0.06, {2}, 0.03), (10.0, {2}, 5.0)])
def test_the_rate_of_a_small_model_is_that_of_larger_batches(seconds, rows, rate, monkeypatch):
    """A call of eight rows takes as long as one of two here, so a row takes a fourth; a slow model is not called with eight."""
    unet = Denoiser(seconds)
    clock = SimpleNamespace(perf_counter=lambda: unet.now)
    prompts = SimpleNamespace(encode=lambda texts: torch.zeros(len(texts)))
    monkeypatch.setattr(forecast, "time", clock)
    monkeypatch.setattr(forecast, "PromptBank", lambda model: prompts)
    assert forecast.seconds_per_forward(SimpleNamespace(unet=unet)) == pytest.approx(rate)
    assert unet.rows == rows


def test_a_duration_is_said_in_minutes_below_an_hour():
    assert [forecast.in_words(hours) for hours in (0.05, 0.75, 1.0, 36.4)] == ["3 min", "45 min", "1 h", "36 h"]

"""Train the embedded model: autoencoder, then UNet and text encoder, on scenes that difffast draws itself.

    python bench/train_shapes.py --preset cpu --out out/shapes --minutes 60
    python bench/train_shapes.py --out out/shapes --export difffast/models/embedded

Every run goes on where the last one stopped; --minutes bounds one run.  Sample grids and the loss plot are in --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from drawn.rendering import render
from drawn.shapes import SIDE, draw_scene
from drawn.vocabulary import SHIPPED
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from difffast.models import tiny_pipeline
from difffast.models.embedded import write_checksums
from difffast.models.tokenizer import clip_tokenizer, learn_merges
from difffast.tools.demo import device_name

#: Scenes of this seed are for training only; the judge's come from others.
DATA_SEED = 0
PROMPTS = (
    "a red circle",
    "a large striped blue square on a white background",
    "a green star wearing a hat",
    "a dotted pink triangle wearing boots on a grey background",
    "a yellow cross and a purple ring",
    "a cyan square to the left of an orange star",
    "a striped red triangle above a blue circle on a gradient background",
    "a green ring, a small yellow square and a purple cross",
)


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths; what a preset means."""

    channels: tuple[int, ...]
    text_width: int
    text_layers: int
    scenes: int
    vae_steps: int
    vae_batch: int
    steps: int
    batch: int
    learning_rate: float = 5e-4
    warmup: int = 300
    vae_learning_rate: float = 1e-3
    drop_text: float = 0.1
    snr_gamma: float = 5.0
    ema_decay: float = 0.999
    precision: str = "bf16"


RECIPES = {
    "cpu": Recipe((64, 128, 192), 128, 4, scenes=60_000, vae_steps=4_000, vae_batch=16, steps=8_000, batch=32),
    "gpu": Recipe((64, 128, 192), 128, 4, scenes=400_000, vae_steps=20_000, vae_batch=64, steps=60_000, batch=256),
    "test": Recipe(
        (32, 64, 96), 32, 2, scenes=64, vae_steps=4, vae_batch=4, steps=4, batch=4, warmup=2, precision="no"
    ),
}


class Budget:
    """Tells when a run has used up its minutes or its steps (None: any number), and logs all runs' minutes."""

    def __init__(self, minutes: float | None, steps: int | None, log: Path) -> None:
        self._start, self._minutes, self._steps = time.monotonic(), minutes, steps
        self._log, self._earlier = log, json.loads(log.read_text()) if log.is_file() else []

    @property
    def minutes(self) -> float:
        """Since the start."""
        return (time.monotonic() - self._start) / 60

    def spend(self) -> bool:
        """Take one step from it; False: there is none left."""
        if self._steps is not None:
            self._steps -= 1
        return (self._steps is None or self._steps >= 0) and (self._minutes is None or self.minutes < self._minutes)

    def record(self) -> None:
        self._log.write_text(json.dumps([*self._earlier, round(self.minutes, 1)]))


def pictures(recipe: Recipe, out: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 [scenes, SIDE, SIDE, 3] (on disk) and captions; drawn once."""
    file, said = out / "pictures.npy", out / "captions.json"
    if not said.is_file():
        store = np.lib.format.open_memmap(file, "w+", np.uint8, (recipe.scenes, SIDE, SIDE, 3))
        captions = []
        for i in tqdm(range(recipe.scenes), desc="scenes"):
            scene = draw_scene(np.random.default_rng([DATA_SEED, i]))
            store[i] = np.asarray(render(scene))
            captions.append(scene.caption)
        store.flush()
        said.write_text(json.dumps(captions))
    return np.load(file, mmap_mode="r"), json.loads(said.read_text())


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in -1 .. 1."""
    return torch.from_numpy(np.array(images)).movedim(-1, -3).float() / 127.5 - 1


def build(recipe: Recipe, captions: list[str]) -> Any:
    """The untrained pipeline; its tokenizer writes every word of the captions as one token."""
    words = {word.strip(",") for caption in captions for word in caption.split()}
    return tiny_pipeline(
        channels=recipe.channels,
        sample_size=SIDE // 4,
        norm_groups=16,
        text=(recipe.text_width, recipe.text_layers),
        tokenizer=clip_tokenizer(learn_merges(words)),
    )


def rate_at(step: int, count: int, warmup: int) -> float:
    """Share of the learning rate: rises over ``warmup`` steps, falls linearly to 0 over the last fifth of ``count``."""
    return min(1.0, (step + 1) / warmup, max(0.0, 5 * (1 - step / count)))


class Training:
    """Steps of one model with everything that a resumed run needs: optimiser, averages, position, losses."""

    def __init__(self, name: str, model: nn.Module, recipe: Recipe, rate: float, count: int, out: Path) -> None:
        self.accelerator = Accelerator(mixed_precision=recipe.precision)
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_at(step, count, recipe.warmup))
        self.model, self.optimiser, self.schedule = self.accelerator.prepare(model, optimiser, schedule)
        self.average = EMAModel(
            model.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
        )
        self.average.to(self.accelerator.device)
        self.losses: list[float] = []
        self._out, self._name, self._count = out, name, count
        self.accelerator.register_for_checkpointing(self.average)
        if self._log.is_file():
            self.accelerator.load_state(str(self._checkpoint))
            self.losses = json.loads(self._log.read_text())

    @property
    def _checkpoint(self) -> Path:
        return self._out / f"{self._name}-checkpoint"

    @property
    def _log(self) -> Path:
        return self._out / f"{self._name}-losses.json"

    @property
    def finished(self) -> bool:
        return len(self.losses) >= self._count

    def steps(self, budget: Budget) -> Iterator[int]:
        """Positions still to do; saves every 500 steps and at the end."""
        with tqdm(total=self._count, initial=len(self.losses), desc=self._name) as bar:
            while not self.finished and budget.spend():
                yield len(self.losses)
                bar.update()
                bar.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}")
                if len(self.losses) % 500 == 0:
                    self.save()
                    budget.record()
        self.save()

    def step(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.step(self.model.parameters())
        self.losses.append(float(loss.detach()))

    def save(self) -> None:
        self.accelerator.save_state(str(self._checkpoint))
        self._log.write_text(json.dumps(self.losses))
        plot(self.losses, self._out / f"{self._name}-loss.png", self._name)

    def averaged(self) -> nn.Module:
        """The plain model with the averaged weights; training ends here."""
        model = self.accelerator.unwrap_model(self.model)
        self.average.copy_to(model.parameters())
        return model.eval()


class Autoencoding(nn.Module):
    """The autoencoder's forward and loss in one module, so that accelerate's autocast covers them."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode(pixels).latent_dist
        made = self.vae.decode(posterior.sample()).sample
        error = made.float() - pixels
        # Squares alone blur edges.
        return error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean()


def train_vae(recipe: Recipe, vae: nn.Module, images: np.ndarray, out: Path, budget: Budget) -> bool:
    """-> whether it is finished; then ``vae`` holds the averaged weights and its latents have a deviation of 1."""
    training = Training("vae", Autoencoding(vae), recipe, recipe.vae_learning_rate, recipe.vae_steps, out)
    device = training.accelerator.device
    for step in training.steps(budget):
        rng = np.random.default_rng([DATA_SEED, 1, step])
        chosen = np.sort(rng.choice(len(images), recipe.vae_batch, replace=False))
        batch = to_pixels(images[chosen])
        if step % 8:
            # Crops cost a quarter; whole pictures now and then, for the attention in the middle.
            top, left = rng.integers(0, SIDE // 2 + 1, 2)
            batch = batch[..., top : top + SIDE // 2, left : left + SIDE // 2]
        training.step(training.model(batch.to(device)))
    if not training.finished:
        return False
    training.averaged()
    with torch.no_grad():
        sample = to_pixels(images[: min(256, len(images))]).to(device)
        latents = vae.encode(sample).latent_dist.mode()
        vae.register_to_config(scaling_factor=1 / float(latents.std()))
        made = vae.decode(latents[:8]).sample
    pairs = [to_picture(x) for pair in zip(sample[:8], made, strict=False) for x in pair]
    make_image_grid(pairs, rows=len(pairs) // 4, cols=4, resize=128).save(out / "vae.png")
    return True


def to_picture(pixels: Tensor) -> Image.Image:
    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())


class Denoising(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.text_encoder, self.unet = pipe.text_encoder, pipe.unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(ids)[0]).sample


def latents_of(vae: nn.Module, images: np.ndarray, out: Path, device: torch.device) -> Tensor:
    """All pictures' latents float16 [scenes, 4, SIDE / 4, SIDE / 4], scaled; encoded once."""
    file = out / "latents.npy"
    if not file.is_file():
        rows = []
        with torch.no_grad():
            for start in tqdm(range(0, len(images), 64), desc="latents"):
                mode = vae.encode(to_pixels(images[start : start + 64]).to(device)).latent_dist.mode()
                rows.append((mode * vae.config.scaling_factor).half().cpu().numpy())
        np.save(file, np.concatenate(rows))
    return torch.from_numpy(np.load(file))


def train_unet(recipe: Recipe, pipe: Any, latents: Tensor, captions: list[str], out: Path, budget: Budget) -> None:
    noise_schedule = pipe.scheduler
    ids = pipe.tokenizer(["", *captions], padding="max_length", max_length=77, return_tensors="pt").input_ids
    training = Training("unet", Denoising(pipe), recipe, recipe.learning_rate, recipe.steps, out)
    device = training.accelerator.device
    if device.type == "cpu":
        # PyTorch's fused attention has a slow backward pass there.
        pipe.unet.set_attn_processor(AttnProcessor())
        pipe.text_encoder.set_attn_implementation("eager")
    training.model.train()
    total = noise_schedule.config.num_train_timesteps
    snr = compute_snr(noise_schedule, torch.arange(total))
    for step in training.steps(budget):
        rng = np.random.default_rng([DATA_SEED, 2, step])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        chosen = torch.from_numpy(rng.choice(len(latents), recipe.batch, replace=False))
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, total, (recipe.batch,), generator=generator)
        noisy = noise_schedule.add_noise(clean, noise, timesteps)
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.drop_text
        text = ids[torch.where(dropped, 0, chosen + 1)]
        guess = training.model(noisy.to(device), timesteps.to(device), text.to(device))
        # Min-SNR weights (arXiv 2303.09556) for noise prediction.
        weights = (snr[timesteps].clamp(max=recipe.snr_gamma) / snr[timesteps]).to(device)
        error = F.mse_loss(guess.float(), noise.to(device), reduction="none").mean((1, 2, 3))
        training.step((weights * error).mean())
        if len(training.losses) % 1000 == 0:
            show(pipe, training, out / "samples" / f"{len(training.losses):06d}.png")
    training.averaged()
    pipe.unet.set_default_attn_processor()
    pipe.text_encoder.set_attn_implementation("sdpa")


def show(pipe: Any, training: Training, path: Path) -> None:
    """Pictures of ``PROMPTS``, 25 steps, made with the averaged weights."""
    parameters = training.model.parameters
    training.average.store(parameters())
    training.average.copy_to(parameters())
    training.model.eval()
    images = pipe(list(PROMPTS), num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
    training.model.train()
    training.average.restore(parameters())
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=2, cols=len(images) // 2, resize=128).save(path)


def plot(losses: list[float], path: Path, name: str) -> None:
    """Loss over steps: every step, and the mean of 100."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(losses, color="lightgrey", linewidth=0.5)
    window = min(100, len(losses))
    axes.semilogy(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"))
    axes.set(xlabel="step", ylabel="loss", title=f"{name}, {len(losses)} steps")
    figure.savefig(path)


def export(recipe: Recipe, pipe: Any, folder: Path, out: Path) -> None:
    """Write the pipeline in float16 with how it was trained, and checksums."""
    pipe.to("cpu", torch.float16).save_pretrained(folder, max_shard_size="15MB")
    losses = {name: json.loads((out / f"{name}-losses.json").read_text()) for name in ("vae", "unet")}
    record = {
        "recipe": asdict(recipe),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "minutes": json.loads((out / "minutes.json").read_text()),
        "vae_steps": len(losses["vae"]),
        "steps": len(losses["unet"]),
        "pictures_seen": len(losses["unet"]) * recipe.batch,
        "loss": float(np.mean(losses["unet"][-500:])),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(record))
    write_vocabulary(folder / "tokenizer")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for their owner only, and packages keep that
    write_checksums(folder)


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt, which transformers 4 reads, from transformers 5's tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))


def card(record: dict[str, Any]) -> str:
    """The model card of an export."""
    recipe = record["recipe"]
    return f"""# difffast's embedded model

A small Stable Diffusion in the layout of SD 1.x (CLIP text encoder, UNet with widths {recipe["channels"]}, autoencoder
with factor 4) that draws captioned shapes, {SIDE} x {SIDE} pixels. It exists so that difffast can be tried, tested and
judged without a download: `difffast.models.embedded_pipeline()`.

**Data**: {recipe["scenes"]} scenes drawn by `bench/drawn/shapes.py` (no data of others): one to three of
{len(SHIPPED.shapes)} shapes ({", ".join(SHIPPED.shapes)}) in {len(SHIPPED.colours)} colours
({", ".join(SHIPPED.colours)}) and {len(SHIPPED.textures)} textures
({", ".join(SHIPPED.textures)}), some wearing a hat or boots, on a white, grey or gradient background; captions such as
"{PROMPTS[6]}".

**Training**: `bench/train_shapes.py`, from random weights: autoencoder {record["vae_steps"]} steps of
{recipe["vae_batch"]} pictures, then UNet and text encoder together {record["steps"]} steps of {recipe["batch"]}
({record["pictures_seen"]} pictures), {sum(record["minutes"]):.0f} minutes in all on {record["device"]}
({record["threads"]} threads). Noise prediction, min-SNR weights, {recipe["drop_text"]:.0%} empty captions, averaged
weights. `training.json` has the numbers.

**How good it is**: the fidelity table in docs/results.md, measured by `bench/bench_fidelity.py`.

**What it cannot do**: anything but such scenes. Words outside those captions mean nothing to it, other picture sizes
are outside its training, and with several things it confuses colours, textures and parts, as large models do: that is
what it is for.

Licence: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=RECIPES, default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of data, checkpoints and pictures")
    parser.add_argument("--minutes", type=float, help="stop after so many; the next run goes on")
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="stop after so many steps; the next run goes on"
    )
    parser.add_argument("--export", type=Path, help="write the pipeline (float16) here once the autoencoder is trained")
    arguments = parser.parse_args()
    recipe, out = RECIPES[arguments.preset], arguments.out
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(arguments.minutes, arguments.stop_after, out / "minutes.json")

    images, captions = pictures(recipe, out)
    set_seed(DATA_SEED)
    pipe = build(recipe, captions)
    pipe.set_progress_bar_config(disable=True)
    finished = train_vae(recipe, pipe.vae, images, out, budget)
    if finished:
        pipe.to(pipe.vae.device)
        latents = latents_of(pipe.vae, images, out, pipe.vae.device)
        train_unet(recipe, pipe, latents, captions, out, budget)

    budget.record()
    if arguments.export and finished:
        export(recipe, pipe, arguments.export, out)


if __name__ == "__main__":
    main()

"""``difffast.EraseTrainer``: concepts out of a pipeline by training, and exactly back in."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from .denoise import Denoiser
from .losses import METHODS, lead_away, mean_square
from .meta import PUBLISHED_CLIP, PUBLISHED_DECAY, Attack, MetaTrap
from .optimiser import AdamW
from .params import Weights, check_trainable, fingerprint, select_parameters
from .points import Points
from .processes import Processes
from .ranges import check_whole
from .saving import save_unet, write_tensors
from .settings import Settings
from .state import TrainingState
from .student import add_lora, fuse_lora, lora_tensors, remove_lora
from .text import encode, fingerprint_encoders, list_prompts

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is not finite; no step was made with it."""


class EraseTrainer:
    """Train a concept out of a pipeline's UNet, in place.

    The stock weights stay at hand: :meth:`disable` puts them back, bit for bit, and :meth:`enable` the trained ones.

    Args:
        pipe: a stock text-to-image pipeline of Stable Diffusion 1, 2 or XL's kind, in float32 or bfloat16.
        concepts: prompts to erase; each step takes one of them.
        method: "esd", "esd-2025" or "sdd", see :mod:`difffast.erase.losses`.
        params: which parameters: a key of :data:`~difffast.erase.params.PARAMETER_SETS`, or shell-style patterns of
            their names.
        folder: where checkpoints are kept; None: none are.
        accelerator: of Hugging Face's accelerate, for several GPUs or mixed precision; None: the pipeline's device.
            Every process makes steps of its own, whose gradients are averaged.
        options: the fields of :class:`~difffast.erase.settings.Settings`.

    Attributes:
        step: how many steps were made.
        losses: of every step, the erasing loss.
        last: the losses of the latest step, by name.

    Raises:
        ValueError: no concept, an unknown method or option, no parameter that matches, a pipeline that cannot be
            trained.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        pipe: Any,
        concepts: str | Sequence[str],
        *,
        method: str = "esd",
        params: str | Sequence[str] = "xattn",
        folder: str | Path | None = None,
        accelerator: Accelerator | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings = Settings.of(options)
        settings.check_method(method)
        self.concepts = tuple(list_prompts(concepts, "concepts"))
        self._processes = Processes(accelerator)
        self._denoiser = denoiser = Denoiser(pipe, settings.sampling_steps)
        denoiser.autocast = self._processes.autocast
        self._pipe, self._method, self._folder = pipe, METHODS[method], None if folder is None else Path(folder)
        self._conditions = encode(pipe, self.concepts)
        self._source = None if settings.erase_from is None else encode(pipe, [settings.erase_from])
        chosen = select_parameters(denoiser.unet, params)
        self._identity = self._identify(method, list(chosen))
        if settings.lora_rank is not None:
            chosen = add_lora(denoiser.unet, list(chosen), settings.lora_rank, settings.seed)
        else:
            check_trainable(chosen)
        self.weights = weights = Weights(chosen)
        self._stock = weights.copy()
        self._trained: list[Tensor] | None = None
        points = Points(
            denoiser,
            self._conditions if self._source is None else self._source.take([0] * len(self.concepts)),
            settings.guidance_scale,
            self._hold_sampler,
            settings.pool,
        )
        wide = denoiser.null.pooled is not None
        self._rate = self._method.rate[wide] if settings.learning_rate is None else settings.learning_rate
        eta = self._method.eta and self._method.eta[wide]
        self._eta = eta if settings.eta is None else settings.eta
        optimiser = AdamW(weights.parameters, self._rate, settings.weight_decay or 0.0)
        average = [] if self._method.ema_decay is None else [master.detach().clone() for master in optimiser.masters]
        self._teacher = (
            [a.to(p.dtype) for a, p in zip(average, weights.parameters, strict=True)] if average else self._stock
        )
        self._state = TrainingState(
            weights,
            optimiser,
            points,
            torch.Generator().manual_seed(settings.seed + 1_000_003 * self._processes.rank),
            average,
        )
        self._attack: Attack | None = None
        self.last: dict[str, float] = {}
        self._stopped = self._fused = False
        self._clip = settings.clip

    def _identify(self, method: str, parameters: list[str]) -> dict[str, Any]:
        """Return what a checkpoint must share with this run to be one of it, as plain data."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in ("save_every", "keep")}
        return {
            **settings,
            "method": method,
            "concepts": list(self.concepts),
            "parameters": parameters,
            "stock weights": fingerprint(dict(self._denoiser.unet.named_parameters())),
            "text encoders": fingerprint_encoders(self._pipe),
            "model": self._denoiser.describe(),
            "processes": self._processes.count,
            "mixed precision": self._processes.precision,
        }

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def losses(self) -> list[float]:
        return self._state.losses

    def attach(self, trap: MetaTrap) -> None:
        """Let every step make relearning harder as well, see :class:`~difffast.erase.meta.MetaTrap`.

        Raises:
            ValueError: a trap is attached already, steps were made, or weights in bfloat16 are trained themselves.
        """
        if self._attack is not None or self.step:
            raise ValueError(f"one trap can be attached, before the first step; {self.step} steps were made")
        if any(parameter.dtype == torch.bfloat16 for parameter in self.weights.parameters):
            raise ValueError(
                "a trap compares gradients before and after an attack whose steps bfloat16 weights round to nothing: "
                "pipe.to(torch.float32), or lora_rank=8"
            )
        trap.encode(self._pipe)
        self._attack = Attack(trap, self._denoiser, self.weights, self._state.generator)
        if trap.compat == "published":
            self._clip = PUBLISHED_CLIP if self.settings.clip is None else self._clip
            if self.settings.weight_decay is None:
                self._state.optimiser.set_weight_decay(PUBLISHED_DECAY)
        numbers = ("gammas", "batch_size", "learning_rate", "weight_decay", "second_order", "compat")
        examples = {name: getattr(trap, name).fingerprint() for name in ("harmful", "related", "unrelated")}
        self._identity["trap"] = {**{name: getattr(trap, name) for name in numbers}, **examples}

    def train(
        self,
        steps: int,
        *,
        resume: str | Path | None = None,
        callbacks: Sequence[Callable[[EraseTrainer], None]] = (),
        progress: bool = True,
    ) -> list[float]:
        """Make steps until there are ``steps`` in all; returns the erasing losses.

        A run that goes on from a checkpoint ends in the same weights as one that was never interrupted, bit for bit.

        Args:
            steps: in all, those of the checkpoint among them.
            resume: a checkpoint; or "latest", the last one in ``folder``, or none if there is none.  Once a run has
                written its own there, what another run or an abandoned branch left is called
                step-N.abandoned-K.safetensors, which is never "latest".
            callbacks: called after every step with the trainer; they may call :meth:`stop`.
            progress: whether a bar is shown.

        Raises:
            ValueError: ``steps`` below 1, the edit is disabled or fused, a checkpoint of another model or run.
            NonFiniteLossError: see there; the last checkpoint stays.
            OSError: a checkpoint cannot be read, or not be written, in which case the earlier ones stay.
        """
        check_whole("steps", steps)
        if self._trained is not None or self._fused:
            raise ValueError(f"the edit is {'fused' if self._fused else 'disabled'}, and cannot be trained further")
        if resume is not None:
            self._resume(resume)
        self._stopped = False
        saved = self.step
        with self._prepare(), self._bar(steps, progress) as bar:
            while self.step < steps and not self._stopped:
                self._make_step()
                bar.update()
                bar.set_postfix({name: f"{value:.4g}" for name, value in self.last.items()}, refresh=False)
                for callback in callbacks:
                    callback(self)
                if self.step % self.settings.save_every == 0:
                    self._save_checkpoint()
                    saved = self.step
            if saved < self.step:
                self._save_checkpoint()
        return self.losses

    def stop(self) -> None:
        """End the training after this step."""
        self._stopped = True

    def enable(self) -> None:
        """Put the trained weights in; nothing happens if they are."""
        if self._trained is not None:
            self.weights.load(self._trained)
            self._trained = None

    def disable(self) -> None:
        """Put the stock weights back, bit for bit; a LoRA stays attached, without effect.

        Raises:
            ValueError: the edit was fused.
        """
        if self._fused:
            raise ValueError("this edit was fused for good: load the pipeline again for the stock weights")
        if self._trained is None:
            self._trained = self.weights.copy()
            self.weights.load(self._stock)

    def fuse(self) -> None:
        """Make the edit permanent: a LoRA is added to the weights, the stock ones are forgotten.

        Raises:
            ValueError: the edit is a LoRA, and other adapters were loaded since.
        """
        self.enable()
        if self.settings.lora_rank is not None and not self._fused:
            fuse_lora(self._denoiser.unet)
        self._stock, self._teacher, self._fused = [], [], True

    def remove(self) -> None:
        """Leave the pipeline as it was before the trainer: stock weights, no LoRA."""
        self.disable()
        if self.settings.lora_rank is not None:
            remove_lora(self._denoiser.unet)

    def save(self, folder: str | Path) -> None:
        """Write what was trained: the whole UNet, or the LoRA, which ``pipe.load_lora_weights(folder)`` loads.

        Warns for a LoRA: whoever loads it can leave it out.

        Raises:
            ValueError: the edit is disabled, or the folder holds weights in another form.
            OSError: a file cannot be written.
        """
        if self._trained is not None:
            raise ValueError("the edit is disabled, so that the stock weights would be saved: enable() it first")
        if not self._processes.is_main:
            return
        if self.settings.lora_rank is None or self._fused:
            save_unet(self._denoiser.unet, folder)
        else:
            write_tensors(lora_tensors(self._denoiser.unet), Path(folder) / "pytorch_lora_weights.safetensors")
            warnings.warn(
                "difffast: whoever loads a LoRA can leave it out: fuse() before save() for weights that are released",
                stacklevel=2,
            )

    def erasing_loss(self) -> Tensor:
        """Draw a point and return the loss there, to be differentiated with respect to the trained parameters."""
        denoiser, point = self._denoiser, self._state.points.draw(self._state.generator)
        timestep = denoiser.draw_timestep(point.moves, self._state.generator)
        concept = self._conditions.take([point.concept])
        with torch.no_grad():
            if self._eta is None:
                target = denoiser.predict(point.latents, timestep, denoiser.null)
            else:
                rows = [denoiser.null, concept, *([] if self._source is None else [self._source])]
                with self.weights.hold(self._teacher):
                    found = denoiser.predict(point.latents.repeat(len(rows), 1, 1, 1), timestep, concept.join(rows))
                null, text, *source = found.chunk(len(rows))
                origin = null if self._method.student_samples else source[0] if source else text
                target = lead_away(origin, null, text, self._eta)
        student = denoiser.predict(point.latents, timestep, concept if self._source is None else self._source)
        return mean_square(student, target)

    def _hold_sampler(self) -> contextlib.AbstractContextManager[None]:
        """Hold the weights that trajectories are made with: those of a pool are the teacher's."""
        if self._method.student_samples and self.settings.pool is None:
            return contextlib.nullcontext()
        return self.weights.hold(self._teacher)

    def _make_step(self) -> None:
        losses = {} if self._attack is None else self._attack.add_gradients()
        loss = self.erasing_loss()
        loss.backward()
        gradients = self._processes.average([p.grad for p in self.weights.parameters if p.grad is not None])
        norm = float(torch.nn.utils.get_total_norm(gradients))
        value = self._processes.average_number(float(loss.detach()))
        self.last = {"loss": value, **losses}
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._state.optimiser.zero_grad()
            raise NonFiniteLossError(self._explain(value, norm))
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights.parameters, self._clip, torch.tensor(norm))
        self._state.optimiser.step()
        self._state.optimiser.zero_grad()
        if self._method.ema_decay is not None:
            for average, master in zip(self._state.average, self._state.optimiser.masters, strict=True):
                average.lerp_(master.detach(), 1 - self._method.ema_decay)
            self._round_average()
        self._state.step += 1
        self._state.losses.append(value)

    def _round_average(self) -> None:
        """Let the teacher be the average; where parameters are as wide, it is anyway."""
        for teacher, average in zip(self._teacher, self._state.average, strict=False):
            teacher.copy_(average)

    def _explain(self, loss: float, norm: float) -> str:
        here = Checkpoint(self.step, {"losses": self._state.stored_losses()}, self._identity)
        kept = [] if self._folder is None else here.list_ancestors(self._folder)
        text = f"step {self.step + 1} has the loss {loss} and a gradient of norm {norm}; its update was not made. "
        return text + (f"The last good checkpoint is {kept[-1]}" if kept else "There is no checkpoint yet")

    @contextlib.contextmanager
    def _prepare(self) -> Iterator[None]:
        """Let the chosen parameters want gradients, and forward passes be made again where that was asked for."""
        unet = self._denoiser.unet
        changed = [m for m in unet.modules() if not getattr(m, "gradient_checkpointing", True)]
        with self.weights.training(unet):
            if self.settings.gradient_checkpointing:
                unet.enable_gradient_checkpointing()
            try:
                yield
            finally:
                for module in changed:
                    module.gradient_checkpointing = False

    def _bar(self, steps: int, progress: bool) -> tqdm[Any]:
        shown = progress and self._processes.is_main
        return tqdm(total=steps, initial=min(self.step, steps), desc="erasing", disable=not shown)

    def _save_checkpoint(self) -> None:
        if self._folder is None:
            return
        tensors = self._state.collect(self._processes)
        if self._processes.is_main:
            Checkpoint(self.step, tensors, self._identity).write(self._folder, self.settings.keep)

    def _resume(self, resume: str | Path) -> None:
        if resume == "latest":
            if self._folder is None:
                raise ValueError("resume='latest' looks into the folder of checkpoints, and none was given")
            found = list_checkpoints(self._folder)
            if not found:
                return
            resume = found[-1][1]
        self._state.restore(read_checkpoint(Path(resume), self._identity), self._processes.rank)
        self._round_average()

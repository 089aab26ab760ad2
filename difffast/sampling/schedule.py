"""What a plan may know of a Diffusers scheduler: what makes its steps, and how noisy each of them is."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from torch import Tensor

from ..plan import Schedule
from ..surgery.subclass import plain_class

#: Names of what makes the steps, as users know them, by the class of the scheduler.
SOLVERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "PNDMScheduler": "PNDM",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "UniPCMultistepScheduler": "UniPC",
    "DEISMultistepScheduler": "DEIS",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
}


def count_denoising_steps(scheduler: Any, timesteps: Tensor) -> int:
    """Return the denoising steps of the schedule; second-order schedulers call the UNet about twice for each."""
    steps = getattr(scheduler, "num_inference_steps", None)
    return steps if isinstance(steps, int) else len(timesteps)


def name_solver(scheduler: Any) -> str:
    """Return the name of what makes a scheduler's steps, as in "DPM++ 2M SDE Karras"."""
    plain, config = plain_class(scheduler).__name__, scheduler.config
    name = SOLVERS.get(plain, plain)
    if name == "DPM++ 2M" and config.get("solver_order", 2) != 2:
        name = f"DPM++ {config['solver_order']}M"
    if str(config.get("algorithm_type", "")).startswith("sde-"):
        name += " SDE"
    return name + " Karras" * bool(config.get("use_karras_sigmas"))


def read_schedule(scheduler: Any, total: int) -> Schedule:
    """Return what is known of a scheduler's schedule with ``total`` UNet calls.

    Where the scheduler has another schedule now, a copy is asked for one of this length.  Times are read from their
    device.
    """
    name = name_solver(scheduler)
    times = _read_times(scheduler, total)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if times is None or not isinstance(alphas, Tensor):
        return Schedule(name, None)
    kept = alphas.double().cpu().numpy().clip(1e-12, 1 - 1e-12)
    ratios = np.interp(times, np.arange(len(kept)), np.log(kept) - np.log1p(-kept))
    return Schedule(name, tuple(float(each) for each in ratios))


def _read_times(scheduler: Any, total: int) -> list[float] | None:
    times = getattr(scheduler, "timesteps", None)
    if not isinstance(times, Tensor) or len(times) != total:
        times = _make_times(scheduler, total)
    if times is None or times.ndim != 1:
        return None
    found = [float(each) for each in times.tolist()]
    return found if all(math.isfinite(each) for each in found) else None


def _make_times(scheduler: Any, total: int) -> Tensor | None:
    """Return the times of a schedule with ``total`` UNet calls, or None where no number of steps has as many."""
    other = plain_class(scheduler).from_config(copy.deepcopy(dict(scheduler.config)))
    for steps in (total, total - 1, (total + 1) // 2):
        if steps >= 1:
            other.set_timesteps(steps)
            if len(other.timesteps) == total:
                return other.timesteps
    return None

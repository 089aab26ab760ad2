"""Which engine executes the parts of a UNet: Python as it is, compiled programs, recorded CUDA graphs, or OpenVINO."""

from __future__ import annotations

import torch

#: By name: as it is; torch.compile (:mod:`.programs`); CUDA graphs of what runs eagerly (:mod:`.graphs`);
#: OpenVINO on CPUs (:mod:`.openvino`).
ENGINES = ("eager", "inductor", "cudagraphs", "openvino")


def choose_engine(asked: str | None, device: torch.device) -> str:
    """Return the engine for a device: what was asked for; else CUDA graphs where they exist.

    A large GPU runs the launches of a UNet call several times faster than Python makes them.
    """
    return asked or ("cudagraphs" if device.type == "cuda" else "eager")

"""StyleDiffusion: the prompt gives the keys, and what networks make of it and of the picture gives the values.

For every step t a small network M_t mixes the tokens of an image encoder and returns a factor and an offset for every
entry of the prompt's embedding c:
    gamma, beta = M_t(features),    values of  c gamma + beta,    keys of  c
in all cross-attention layers, for the conditional half alone.  M_t descends, with a frozen UNet,
    mean (z_{t-1} - z*_{t-1})^2 + sum over layers of mean (A - A*)^2
where z* is the picture's way to noise and A* are its attention maps by head at z*_t.
Source: StyleDiffusion (arXiv 2303.15649), section 3.2.  Networks begin here as gamma = 1 and beta = 0, with which the
picture is that of DDIM inversion.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.context import AllCollected, CallContext, CrossCall, Text, use_context
from ...layers.cross_attention import CrossAttention, find_layers
from ...layers.text_projections import project_text
from ...surgery.subclass import is_swapped
from ..binding.extension import choose_map_layers
from ..descent import LOSS_SCALES
from ..guidance import guide
from .inversion import Inversion
from .moves import Moves
from .networks import make_network
from .null_text import is_enough, measure_error, rate_at
from .prefix import compute_once, find_prefix

#: Updates of the first step's network; later ones have fewer, by e every ten steps.
_UPDATES = 100


class ValueBranch:
    """An edit of attention for one UNet call: values of another text than the keys, and maps by head.

    Args:
        text: [1, T, D], which gives the values.
        layers: whose maps are wanted.
        stop: whether the call ends with the last of them.

    Attributes:
        maps: by layer, [1, H, N, T], in float32 at least.
    """

    def __init__(self, text: Tensor, layers: Sequence[str], *, stop: bool = False) -> None:
        self._text, self._layers, self._stop = text, frozenset(layers), stop
        self.maps: dict[str, Tensor] = {}

    def edits_cross(self, name: str) -> bool:
        """Every layer is changed."""
        return True

    def share_rows(self, name: str, rows: int, pixels: int) -> Sequence[int] | None:
        """Self-attention stays."""
        return None

    def attend(self, call: CrossCall, own: Callable[[], Tensor]) -> Tensor:
        """Return the attention of the layer's queries and keys to the other text's values."""
        values = project_text(call.layer, self._text)[1]
        if call.name not in self._layers:
            return call.attend(call.query, call.keys, values)
        precise = torch.promote_types(call.query.dtype, torch.float32)
        logits = call.query.to(precise) @ call.keys.to(precise).transpose(-1, -2) * call.query.shape[-1] ** -0.5
        maps = self.maps[call.name] = logits.softmax(-1)
        if self._stop and len(self.maps) == len(self._layers):
            raise AllCollected
        return maps.to(values.dtype) @ values


class StyleFit:
    """The networks of a picture, step by step.

    Args:
        moves: of the pipeline.
        unet: its plain UNet, inside :func:`use_text_layers`.
        found: the picture's way to noise, and its features.

    Raises:
        ValueError: a UNet without attention to the text alone.
    """

    def __init__(self, moves: Moves, unet: nn.Module, found: Inversion) -> None:
        self._moves, self._found = moves, found
        self._layers, self._prefix = choose_map_layers(unet, None), find_prefix(unet)
        self._network = make_network(found.features, moves.text.shape[1])
        self._done: list[dict[str, Tensor]] = []

    def resume(self, earlier: Inversion) -> None:
        """Go on from the steps that an inversion has."""
        networks = earlier.networks or {}
        steps = len(earlier.losses)
        for step in range(steps):
            self._done.append({name: each[step].to(self._found.features) for name, each in networks.items()})
        if self._done:
            self._network.load_state_dict(self._done[-1])

    def optimise(self, latents: Tensor, wanted: Tensor, step: int) -> float:
        """Add a step's network, and return its loss; takes latents [1, C, h, w] before and [C, h, w] after the step."""
        with torch.no_grad():
            maps = self._look(self._found.trajectory[step : step + 1], step)
            nothing = None if self._found.guidance == 1 else self._moves.predict_null(latents, step)
        with compute_once(self._prefix):
            best, least = self._descend(latents, wanted, step, nothing, maps)
        self._network.load_state_dict(best)
        self._done.append(best)
        return least

    def _descend(
        self, latents: Tensor, wanted: Tensor, step: int, nothing: Tensor | None, maps: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the best parameters of a step, and their loss; takes the arguments of :meth:`compute_loss`."""
        weights = list(self._network.parameters())
        optimiser = torch.optim.Adam(weights, lr=rate_at(step))
        scale = LOSS_SCALES.get(self._moves.text.dtype, 1.0)
        best, least = _copy(self._network), math.inf
        for _ in range(math.ceil(_UPDATES * math.exp(-0.1 * step))):
            with torch.enable_grad():
                loss = self.compute_loss(latents, wanted, step, nothing, maps)
            if not math.isfinite(loss.item()):
                warnings.warn(f"difffast: the values of step {step} diverged; the best ones are kept", stacklevel=5)
                break
            if loss.item() < least:
                best, least = _copy(self._network), loss.item()
            if is_enough(loss.item(), step):
                break
            for weight, gradient in zip(weights, torch.autograd.grad(loss * scale, weights), strict=True):
                weight.grad = gradient / scale
            optimiser.step()
        return best, least

    def compute_loss(
        self, latents: Tensor, wanted: Tensor, step: int, nothing: Tensor | None, maps: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss at the top of this file for the network as it is.

        Args:
            latents, wanted: before and after the step.
            step: which one.
            nothing: the noise for the empty prompt; None: there is no guidance.
            maps: A* by layer.
        """
        noise, own = self._predict(latents, step)
        moved = self._moves.forwards(latents, _guide(nothing, noise, self._found.guidance), step)
        return measure_error(moved, wanted) + sum((own[name] - maps[name]).square().mean() for name in maps)

    def predict(self, latents: Tensor, step: int) -> Tensor:
        """Return a done step's guided noise."""
        self._network.load_state_dict(self._done[step])
        noise, _ = self._predict(latents, step)
        nothing = None if self._found.guidance == 1 else self._moves.predict_null(latents, step)
        return _guide(nothing, noise, self._found.guidance)

    def collect(self) -> dict[str, Any]:
        """Return what an :class:`Inversion` keeps of it, by field."""
        return {"networks": {name: torch.stack([each[name] for each in self._done]) for name in self._done[0]}}

    def _predict(self, latents: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        gamma, beta = self._network(self._found.features)
        text = self._moves.text
        branch = ValueBranch((text * gamma + beta).to(text.dtype), self._layers)
        with use_context(self._make_context(branch, latents)):
            return self._moves.predict_text(latents, step), branch.maps

    def _look(self, latents: Tensor, step: int) -> dict[str, Tensor]:
        """Return the picture's own maps, by layer; the call ends at the last of them."""
        branch = ValueBranch(self._moves.text, self._layers, stop=True)
        with use_context(self._make_context(branch, latents)), contextlib.suppress(AllCollected):
            self._moves.predict_text(latents, step)
        return branch.maps

    def _make_context(self, branch: ValueBranch, latents: Tensor) -> CallContext:
        text = self._moves.text
        told: list[str] = []
        size = tuple(latents.shape[-2:])
        return CallContext(
            True, told.append, told.append, Text(text, text, None), size=size, only_text=True, edit=branch
        )


def _guide(nothing: Tensor | None, wanted: Tensor, guidance: float) -> Tensor:
    return wanted if nothing is None else guide(nothing, wanted, guidance)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in network.state_dict().items()}


@contextlib.contextmanager
def use_text_layers(unet: nn.Module) -> Iterator[None]:
    """Let a UNet's cross-attention layers find their call's context inside the block, patched or not."""
    if all(map(is_swapped, find_layers(unet).values())):
        yield
        return
    kind = CrossAttention()
    kind.put_in(unet)
    try:
        yield
    finally:
        kind.take_out(unet)

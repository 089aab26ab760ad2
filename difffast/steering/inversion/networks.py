"""StyleDiffusion's networks, and the tokens of a picture that they mix (arXiv 2303.15649, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Sides of the cells of latents that stand for an image encoder's tokens.
_CELL = 4


class ValueNetwork(nn.Module):
    """M_t: from tokens of a picture [P, D] to a factor and an offset [T, D] each; it mixes tokens, not channels.

    Args:
        tokens: P.
        rows: T, of the prompt's embedding.
    """

    def __init__(self, tokens: int, rows: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(tokens, 2 * rows, 1)
        self.second = nn.Conv1d(2 * rows, 2 * rows, 1)
        # One picture is the whole batch: its own statistics are the only ones.
        self.norm = nn.BatchNorm1d(2 * rows, track_running_stats=False)
        self.last = nn.Conv1d(2 * rows, 2 * rows, 1)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()[:rows] = 1

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and beta [T, D]."""
        mixed = functional.leaky_relu(self.norm(self.second(self.first(features[None]))), 0.01)
        return self.last(mixed)[0].chunk(2)


def make_network(features: Tensor, rows: int) -> ValueNetwork:
    """Return a new network for features [P, D] and embeddings of ``rows`` rows, the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ValueNetwork(len(features), rows)
    return network.to(features)


@torch.no_grad()
def read_features(pipe: Any, image: Any, latents: Tensor, text: Tensor) -> Tensor:
    """Return tokens of a picture [P, D], D as of the text [1, T, D], in float32 at least.

    They are those of the pipeline's image encoder, or cells of the latents [1, C, h, w] where it has none.  Channels
    are interpolated where there are not D of them: to the text's channels they have no relation in any case.
    """
    encoder = getattr(pipe, "image_encoder", None)
    if encoder is not None:
        pixels = pipe.feature_extractor(images=image.convert("RGB"), return_tensors="pt").pixel_values
        found = encoder(pixels.to(encoder.device, encoder.dtype)).last_hidden_state[0]
    else:
        height, width = latents.shape[-2:]
        whole = functional.pad(latents, (0, -width % _CELL, 0, -height % _CELL))
        found = functional.unfold(whole, _CELL, stride=_CELL)[0].T
    found = found.to(text.device, torch.promote_types(text.dtype, torch.float32))
    if found.shape[1] == text.shape[2]:
        return found
    return functional.interpolate(found[None], text.shape[2], mode="linear")[0]

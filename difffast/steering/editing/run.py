"""An edit by prompt in one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.context import CrossCall
from ...layers.text_kv import TextKV
from ...ops.edited_attention import mix_values
from ...sampling.extension import ExtensionRun, RunInfo
from ..inversion.values import ValueTexts, swap_values
from ..prompt_calls import PromptCall
from .attention import attend_edited, average_map, weigh
from .blend import LocalBlend
from .config import EditConfig
from .levels import BLEND_LEVEL, SELF_LEVEL, UNCOND_SELF_LEVEL, find_size
from .mappers import EditedPrompts


class EditRun(ExtensionRun):
    """An edit by prompt in one run; it is its edit of attention as well.

    The last 2n rows of the batch are n pictures of the source and n of the target.

    Args:
        config: what to do.
        prompts: what is made of the prompts.
        call: of ``encode_prompt``.
        info: what is told of the run.
        values: of a picture inverted by "style"; None: the prompts' own.
    """

    def __init__(
        self,
        config: EditConfig,
        prompts: EditedPrompts,
        call: PromptCall,
        info: RunInfo,
        values: ValueTexts | None = None,
    ) -> None:
        self._values = values
        self._kv: TextKV | None = None
        self._config, self._prompts, self._info = config, prompts, info
        self._images, self._step, self._size = len(call.embeds) // 2, 0, (0, 0)
        self._blend = LocalBlend(config.blend_threshold)
        self._mixed: dict[str, tuple[Tensor, tuple[Tensor, Tensor | None]]] = {}  # by layer: of which values
        self._weights: dict[tuple[float, torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call as it is, after a look at its size.

        Raises:
            ValueError: its batch is not the pictures', once or twice, or its text is for another one.
        """
        rows, texts = len(call["sample"]), len(call["encoder_hidden_states"])
        if rows not in (2 * self._images, 4 * self._images):
            raise ValueError(f"an edit needs a batch of {2 * self._images} or {4 * self._images} rows, got {rows}")
        if rows != texts:
            raise ValueError(f"an edit needs as many rows of latents as of text, got {rows} and {texts}")
        if step == 0:
            self._blend = LocalBlend(self._config.blend_threshold)  # a custom loop may start again
        self._step, self._size = step, tuple(call["sample"].shape[-2:])
        if self._values is not None:
            self._kv = self._make_values(call["encoder_hidden_states"], step)
        return call

    def _make_values(self, text: Tensor, step: int) -> TextKV:
        """Return what gives the values: the picture's for the source, and for the target as long as it has them."""
        text = text[-2 * self._images :]
        changed = self._values.mix(text, step)
        if step >= self._config.count_value_steps(self._info.total):
            changed = torch.cat([changed[: self._images], text[self._images :]])
        return TextKV(changed, Counter())

    def attention(self, step: int) -> EditRun | None:
        edited = self._values is not None or step < self._config.count_edited_steps(self._info.total)
        return self if edited else None

    def edits_cross(self, name: str) -> bool:
        """Every layer is changed up to the last step of the window, and looked at for the local blend."""
        inside = self._step < self._config.count_cross_steps(self._info.total)
        return inside or self._prompts.blend is not None or self._kv is not None

    def share_rows(self, name: str, rows: int, pixels: int) -> Sequence[int] | None:
        """Give the target's rows the queries and keys of the source's, in small layers."""
        config, total, images = self._config, self._info.total, self._images
        taken = list(range(rows))
        if self._step < config.count_self_steps(total) and pixels <= self._count_pixels(SELF_LEVEL):
            taken[-images:] = taken[-2 * images : -images]
        unconditional = self._step < config.count_self_steps(total, unconditional=True) and rows == 4 * images
        if unconditional and pixels <= self._count_pixels(UNCOND_SELF_LEVEL):
            taken[images : 2 * images] = taken[:images]
        return None if taken == list(range(rows)) else taken

    def attend(self, call: CrossCall, own: Callable[[], Tensor]) -> Tensor:
        """Return the layer's attention, the target's rows with the edited maps."""
        images = self._images
        source = call.query[-2 * images : -images], call.keys[-2 * images : -images]
        mine = call.query[-images:], call.keys[-images:]
        if self._prompts.blend is not None and call.query.shape[2] == self._count_pixels(BLEND_LEVEL):
            self._look(call, source, mine)
        if self._kv is not None:
            if call.watched:
                own()  # which hands out the maps; these do not depend on values
            call = swap_values(call, self._kv)
        changed = self._kv is not None
        if self._step >= self._config.count_cross_steps(self._info.total):
            return call.attend(call.query, call.keys, call.values) if changed else own()
        if call.watched and not changed:
            rest = own()[:-images]
        else:
            rest = call.attend(call.query[:-images], call.keys[:-images], call.values[:-images])
        edited = attend_edited(source, mine, call.values[-images:], *self._weigh(call.values), self._mix(call))
        return torch.cat([rest, edited])

    def _mix(self, call: CrossCall) -> tuple[Tensor, Tensor | None]:
        """Return a layer's values as the edit mixes them: once a prompt, as long as the layer keeps its values."""
        values, mixed = self._mixed.get(call.name, (None, None))
        if values is not call.values or mixed is None:
            mixed = mix_values(call.values[-self._images :], *self._weigh(call.values))
            self._mixed[call.name] = call.values, mixed
        return mixed

    def _weigh(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return S and o of this step, None where o is zero, like a layer's values; they are made once a run."""
        alpha = 1.0 if self._step < self._config.count_cross_steps(self._info.total) else 0.0
        key = alpha, values.device, values.dtype
        if key not in self._weights:
            mix, keep_own = weigh(self._prompts.mapper, self._prompts.factors, alpha)
            self._weights[key] = mix.to(values), keep_own.to(values) if bool(keep_own.any()) else None
        return self._weights[key]

    def _look(self, call: CrossCall, source: tuple[Tensor, Tensor], mine: tuple[Tensor, Tensor]) -> None:
        """Add a layer's maps of the blend's words."""
        precise = torch.promote_types(call.query.dtype, torch.float32)
        own, theirs = (
            (query.to(precise) @ keys.to(precise).transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
            for query, keys in (mine, source)
        )
        (first, second), (mix, keep_own) = self._prompts.blend, self._weigh(call.values)
        height, _ = find_size(self._size, BLEND_LEVEL)
        self._blend.add(
            (theirs @ first.to(theirs)).unflatten(-1, (height, -1)),
            average_map(theirs, own, mix, keep_own, second).unflatten(-1, (height, -1)),
        )

    def _count_pixels(self, level: int) -> int:
        height, width = find_size(self._size, level)
        return height * width

    def blend(self, latents: Tensor) -> Tensor:
        """Return latents [2n, C, H, W] after a step of the scheduler, changed only where the blend's words are."""
        if self._step < self._config.blend_from * self._info.total:
            return latents
        return self._blend.mix(latents)

"""Content suppression of one patched pipeline, between its calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...layers.cross_attention import find_layers, has_added_keys
from ...sampling.extension import Extension, RunInfo
from ..binding.extension import choose_map_layers
from ..prompt_calls import PromptCall, encode_alone, read_arguments, read_prompt_words, watch_encode_prompt
from .config import SuppressionConfig
from .embeds import drop_words, find_suppressed_rows, reencode_others, regularise_text
from .run import SuppressionRun
from .source import SourceSampling
from .trace import Suppressed, SuppressionTrace


class Suppressor(Extension):
    """Content suppression of one pipeline.

    Args:
        config: what to suppress.
        pipe: the pipeline; only a weak reference is kept.
        unet: its plain UNet.

    Raises:
        ValueError: no such attention layers.
    """

    def __init__(self, config: SuppressionConfig, pipe: Any, unet: nn.Module) -> None:
        self.config, self._watch = config, watch_encode_prompt(pipe, self._read)
        self.layers = choose_map_layers(unet, config.layers, added_keys=True)
        if config.mode == "reference" and any(map(has_added_keys, find_layers(unet).values())):
            raise ValueError(
                f"the reference's loss has maps of self-attention, and the layers of a {type(unet).__name__} like this "
                "one attend to text and pixels in one softmax: use mode='paper'"
            )
        self.trace: SuppressionTrace | None = None
        self._pipe, self._unet = weakref.ref(pipe), weakref.ref(unet)
        self._read_by: dict[int, tuple[PromptCall, list[Suppressed]]] = {}  # by thread
        self._called: dict[int, Mapping[str, Any]] = {}

    def describe(self) -> Iterator[tuple[str, str]]:
        words = ", ".join(map(repr, self.config.words))
        yield "unet calls", f"suppression of {words} ({self.config.mode}), maps of {len(self.layers)} attn2 layers"

    def pipeline_methods(self) -> Mapping[str, Callable[..., Any]]:
        return {"encode_prompt": self._watch}

    def see_call(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._called[threading.get_ident()] = read_arguments(pipe, args, kwargs)

    def full_steps(self, total: int) -> Sequence[int]:
        first, end = self.config.find_window(total)
        return range(first, min(end + 1, total))

    def begin(self, info: RunInfo) -> SuppressionRun | None:
        thread = threading.get_ident()
        found, called = self._read_by.pop(thread, None), self._called.pop(thread, {})
        self.trace = SuppressionTrace()
        if found is None:
            info.note("no suppression: this run's prompt has not been through pipe.encode_prompt as text")
            return None
        call, prompts = found
        self.trace.removed = tuple(each.removed for each in prompts)
        sampling = SourceSampling.read(self._pipe(), called, self._unet())
        return SuppressionRun(self.config, self.layers, self._unet(), sampling, call, prompts, (info, self.trace))

    def _read(self, pipe: Any, call: PromptCall) -> None:
        self._read_by.pop(threading.get_ident(), None)
        if not call.prompts:
            return
        for prompt, second in zip(call.prompts, call.second, strict=True):
            if prompt != second:
                raise ValueError(f"suppression needs one prompt for both text encoders, got {prompt!r} and {second!r}")
        images = len(call.embeds) // len(call.prompts)
        found, error = [], None
        for number, prompt in enumerate(call.prompts):
            try:
                found.append(self._suppress(pipe, prompt, call.embeds[number * images].detach(), call.options))
            except ValueError as missing:
                error = missing
                found.append(Suppressed())
        if error is not None and not any(each.removed for each in found):
            raise error
        self._read_by[threading.get_ident()] = call, found

    def _suppress(self, pipe: Any, prompt: str, text: Tensor, options: Mapping[str, Any]) -> Suppressed:
        present, error = [], None
        for word in self.config.words:
            try:
                find_suppressed_rows(pipe, prompt, (word,))
                present.append(word)
            except ValueError as missing:
                error = missing
        if not present and error is not None:
            raise error
        rows = find_suppressed_rows(pipe, prompt, present)
        *removed, _ = rows[0][0]
        words = read_prompt_words(pipe, prompt)[0][0].words
        if self.config.reencode:
            text = reencode_others(pipe, text[None], prompt, present, **options)[0]
        two = hasattr(pipe, "text_encoder_2")
        without = encode_alone(pipe, drop_words(prompt, present), **options) if two else {}
        return Suppressed(
            tuple(removed),
            tuple(position for _, positions in words for position in positions if position not in removed),
            regularise_text(text[None], rows, alpha=self.config.alpha)[0],
            without.get("pooled_prompt_embeds"),
        )

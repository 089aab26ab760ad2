"""What the rows of a UNet call's batch are, as far as the pipeline that makes the call tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .settings import Settings


class Rows:
    """Tells guidance's halves and pictures apart.

    Args:
        settings: of the patched pipelines that may make the calls.
        find_pipe: returns the one whose loop makes them, or None where that is not known.
    """

    def __init__(self, settings: Sequence[Settings], find_pipe: Callable[[], Any]) -> None:
        self._settings, self._find_pipe = settings, find_pipe

    def refuse_halves(self, call: Mapping[str, Any]) -> str | None:
        """Return why a call's batch is not known to be [unconditional, conditional], or None.

        Args:
            call: the UNet's arguments by name.
        """
        return self._refuse_loop() or self._refuse_guidance(call)

    def count_pictures(self, call: Mapping[str, Any]) -> int:
        """Return how many pictures, or videos, each half of a call's batch holds; 1 where that is not known.

        Without guidance the batch is one half.

        Args:
            call: the UNet's arguments by name.
        """
        rows = call["sample"].shape[0]
        if self._refuse_loop() is not None:
            return 1
        # Some pipelines keep it to themselves whether they guide.
        if getattr(self._find_pipe(), "do_classifier_free_guidance", None) is False:
            return rows
        return rows // 2 if self._refuse_guidance(call) is None else 1

    def _refuse_loop(self) -> str | None:
        pipe = self._find_pipe()
        settings = next((each for each in self._settings if each.pipe() is pipe), None)
        if pipe is None or settings is None:
            return "the loop that calls the UNet is not a patched pipeline's own"
        return settings.support.guidance or None

    def _refuse_guidance(self, call: Mapping[str, Any]) -> str | None:
        if not getattr(self._find_pipe(), "do_classifier_free_guidance", False):
            return "guidance is off"
        rows, text = call["sample"].shape[0], call.get("encoder_hidden_states")
        if rows % 2 or (isinstance(text, Tensor) and text.shape[0] % rows):
            return f"the batch has {rows} rows" + ("" if text is None else f", and the text {len(text)}")
        return None

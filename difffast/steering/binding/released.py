"""``mode="reference"``: what ToMe's released code does and the paper does not say.  The one list of its peculiarities.

Each with its reason, as far as it can be seen, and with what ``mode="paper"`` does instead:

1. Composite tokens are 1.1 nouns + 1.2 modifiers, and absorbed rows become zero in place, so that no position changes.
   Paper: a plain sum; the absorbed rows are taken out.  (:func:`~difffast.steering.composite.merge`)
2. End tokens are replaced by the same rows of the simplified prompt, for the same reason.  Paper: by that prompt's end
   tokens from the first on.  (:func:`~difffast.steering.composite.substitute_end`)
3. The losses on maps move all rows of the embedding: its gradient is taken as a whole.  Paper: composite tokens only.
4. The optimised latents are what the UNet sees, and no more: ``scheduler.step`` starts from the latents as they were.
   The code optimises a copy of the UNet's input.  Paper: from the optimised ones.
5. Phrases are looked at on latents of their own, which begin at the initial noise, and whose guidance has the wrong
   sign (null + g (null - phrase)).  Paper: on the image's.  (:class:`AnchorTrajectory`)
6. Where the scheduler scales the UNet's input (SDXL's Euler does), these latents step from the scaled ones, which are
   scaled again at the next step: the code keeps both in one variable.  Paper has no such latents.
7. Every pass of the optimisation, the unconditional one on these latents as well, has zeros for SDXL's pooled text, and
   the time ids of the prompt.  Paper: zeros too wherever there are composite tokens.  Pooled text is not merged, and
   speaks of all attributes of all subjects at once: with it, the passes would see what the composite token alone is to
   say.  Thresholds and step sizes were chosen without it as well.  With ``merge=False`` nothing is merged anywhere, and
   the maps are those that the step itself will have.
8. A row is updated first, and asked then whether its loss (of before) was below the threshold: at least one update a
   step.  Paper: what is below stays as it is.  (:func:`~difffast.steering.descent.descend_unguarded`)
9. Nothing is put back when losses grow.  Paper: a guard.  (:func:`~difffast.steering.descent.descend`)
10. Numbers of steps and thresholds are for 50 steps and for maps of 32 x 32, and stay so.  Paper: adapted.
11. The layout term pulls to (10, 16) and (25, 16) of 32 on a grid from 0 to 1, so that neither the pixels nor the two
    places are symmetric, and is a sum over the two subjects.  Paper, which gives no numbers: centres of pixels and of
    the picture's halves, and the mean, half as much.  (:func:`~difffast.steering.losses.layout`)
12. ``guidance_rescale`` acts on the phrases' latents as well.  Paper has no such latents.

Not imitated: its rounding (embeddings and latents are optimised in at least float32 here, there in float16), and what
schedulers other than SDXL's Euler make of it.  It steps the phrases' latents by the pipeline's own scheduler and takes
its counter back by one; DDIM's has none, and those that remember earlier predictions would mix them up.  Here these
latents have a copy of the scheduler.  Where it adds noise, theirs comes from the global generator, as there.

In both modes step sizes are for the UNet's input, as in the code: it differentiates with respect to that.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ..guidance import guide


class AnchorTrajectory:
    """Latents of the phrases alone, one for each subject; see 5, 6 and 12 of the list.

    Args:
        latents: [K, C, H, W], the initial noise.
        scheduler: the pipeline's, before its first step; a copy is kept.
    """

    def __init__(self, latents: Tensor, scheduler: Any) -> None:
        self._latents, self._scheduler = latents, copy.deepcopy(scheduler)

    def scale(self, timestep: Tensor) -> Tensor:
        """Return the UNet's input at this timestep, from which :meth:`step` will start."""
        self._latents = self._scheduler.scale_model_input(self._latents, timestep)
        return self._latents

    def step(self, wanted: Tensor, nothing: Tensor, timestep: Tensor, guidance: float, rescale: float) -> None:
        """Step away from the phrases.

        Args:
            wanted: the phrases' predictions.
            nothing: the unconditional predictions.
            timestep: of :meth:`scale`.
            guidance: the guidance scale g.
            rescale: the pipeline's ``guidance_rescale``.
        """
        noise = guide(nothing, wanted, -guidance, rescale)
        self._latents = self._scheduler.step(noise, timestep, self._latents).prev_sample

"""Random orders of all that a converted model could miss: weights, adapters, dtypes, prompts, sizes, batches.

A stock pipeline has the same history; after every change both make a picture of the same noise.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import zoo
from lora_changes import LORA_CHANGES
from sampling import scheduler
from torch import Tensor, nn

from difffast.models import tiny_pipeline

#: Relative to the largest number of the stock pipeline's latents.  bfloat16 alone can be off by 0.2 where a LoRA is
#: strong, stock's too: that nothing is stale is seen there by a pipeline that is patched anew, which is to be the same.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float64: 1e-9}
ANEW = 1e-2


@functools.cache
def _built() -> Any:
    pipe = tiny_pipeline("sd", channels=(32,), sample_size=4, text=(16, 1))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler("DDIM")
    pipe.unet = zoo.unet(
        sample_size=4,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),  # one transformer: a third of the conversion
        mid_block_type=None,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return pipe


def _layer(pipe: Any) -> nn.Linear:
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_v
    return getattr(layer, "base_layer", layer)


def _edit(pipe: Any) -> None:
    with torch.no_grad():
        _layer(pipe).weight.mul_(1.5)


def _edit_behind_the_counter(pipe: Any) -> None:
    _layer(pipe).weight.data.mul_(-1.5)


def _edit_text_behind_the_counter(pipe: Any) -> None:
    pipe.unet.down_blocks[0].resnets[0].conv1.weight.data.neg_()


def _replace(pipe: Any) -> None:
    layer = pipe.unet.conv_out
    layer.weight = nn.Parameter(layer.weight.detach() * 1.25)


def _invert_text(pipe: Any) -> None:
    # As load_textual_inversion does, which writes to the data of the embeddings.
    pipe.text_encoder.get_input_embeddings().weight.data[:40] *= 1.3


def _cast(dtype: torch.dtype) -> Callable[[Any], None]:
    return lambda pipe: (pipe.unet.to(dtype), pipe.text_encoder.to(dtype), None)[-1]


CHANGES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda pipe: None,
    "edit": _edit,
    "edit .data": _edit_behind_the_counter,
    "negate .data": _edit_text_behind_the_counter,
    "replace": _replace,
    **LORA_CHANGES,
    "textual inversion": _invert_text,
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "no FreeU": lambda pipe: pipe.disable_freeu(),
    "bfloat16": _cast(torch.bfloat16),
    "float32": _cast(torch.float32),
    "float64": _cast(torch.float64),
}


class EngineHistory:
    """A pipeline and its stock twin through one random history.

    Args:
        seed: of the history.
        patch: patches a pipeline.
    """

    def __init__(self, seed: int, patch: Callable[[Any], Any]) -> None:
        self._random = random.Random(seed)
        self.pipe, self.stock, self._patch = copy.deepcopy(_built()), copy.deepcopy(_built()), patch
        patch(self.pipe)
        self.done: list[Any] = []

    def play(self, draws: int) -> None:
        """Change both and compare them, ``draws`` times."""
        for _ in range(draws):
            self.change(self._random.choice(list(CHANGES)))
            self.compare(self._draw_call())

    def change(self, name: str) -> None:
        """Do the same to both."""
        self.done.append(name)
        for pipe in (self.pipe, self.stock):
            CHANGES[name](pipe)

    def compare(self, call: dict[str, Any]) -> None:
        """Make a picture with both."""
        self.done.append(call)
        mine, right = _run(self.pipe, call), _run(self.stock, call)
        scale = float(right.abs().max())
        assert float((mine - right).abs().max()) <= TOLERANCES[self.pipe.unet.dtype] * scale, self.done
        if self.pipe.unet.dtype == torch.bfloat16:
            anew = copy.deepcopy(self.stock)
            self._patch(anew)
            assert float((mine - _run(anew, call)).abs().max()) <= ANEW * scale, self.done

    def _draw_call(self) -> dict[str, Any]:
        draw = self._random
        adapted = bool(getattr(self.pipe.unet, "peft_config", None))
        scale = draw.choice([None, 0.3, 1.7]) if adapted else None
        return {
            "prompt": draw.choice(["a cat", "two dogs"]),
            "height": draw.choice([16, 16, 24]),
            "width": 16,
            "guidance_scale": draw.choice([5.0, 1.0]),
            "num_images_per_prompt": draw.choice([1, 1, 2]),
            "cross_attention_kwargs": None if scale is None else {"scale": scale},
        }


def _run(pipe: Any, call: dict[str, Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "difffast")
        warnings.filterwarnings("ignore", "Already")
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=2, generator=generator, output_type="latent", **call)[0].double()

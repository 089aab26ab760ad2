"""Self-attention's scale at other sizes than the model was trained at."""

import math

import pytest
import torch
import zoo
from sampling import largest, latents
from tolerances import LATENTS_FLOAT64

from difffast import EncoderPropagation, patched
from difffast.steering.variable_size import variable_size_attention


class Written:
    """Self-attention by its formula, with a scale of the tokens here and in training."""

    def __init__(self, trained):
        self.trained = trained

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        scale = math.sqrt(math.log(hidden_states.shape[1]) / (q.shape[-1] * math.log(self.trained)))
        p = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(scale).softmax(-1)
        return attn.to_out[0](torch.einsum("bhnm,bmhd->bnhd", p, v).flatten(2))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_it_is_the_formula(name):
    pipe = zoo.ROWS[name].build().to(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    wide = {"height": 40, "width": 56, "steps": 8}
    stock, trained_at = latents(pipe, **wide), latents(pipe, height=32, width=32, steps=8)
    with variable_size_attention(pipe) as tokens:
        ours = latents(pipe, **wide)
        assert largest(latents(pipe, height=32, width=32, steps=8), trained_at) <= LATENTS_FLOAT64
        config = EncoderPropagation(key_steps=3)
        with patched(pipe, propagation=config) as report:
            ahead = latents(pipe, **wide)
        with patched(pipe, propagation=EncoderPropagation(key_steps=3, parallel=False)):
            assert largest(latents(pipe, **wide), ahead) <= LATENTS_FLOAT64
        assert report.last_run.stock == 0
    assert torch.equal(latents(pipe, **wide), stock)
    levels = {"down_blocks.0": 64, "down_blocks.1": 16, "mid_block": 16, "up_blocks.0": 16, "up_blocks.1": 64}
    for layer, module in pipe.unet.named_modules():
        if layer.endswith("attn1"):
            trained = next(count for place, count in levels.items() if layer.startswith(place))
            assert tokens[layer] == trained
            module.set_processor(Written(trained))
    assert largest(ours, latents(pipe, **wide)) <= LATENTS_FLOAT64
    assert largest(ours, stock) > 1e-4


def test_bad_values_are_refused(pipe):
    for size, message in (((1, 1), "fewer than 2 tokens"), (None, "trained_size must be given")):
        pipe.unet.register_to_config(sample_size=None)
        with pytest.raises(ValueError, match=message), variable_size_attention(pipe, trained_size=size):
            pass
    pipe.unet = None
    with pytest.raises(ValueError, match="has no UNet with self-attention"), variable_size_attention(pipe):
        pass

"""Content suppression of DeepFloyd IF, whose text is T5's and whose attention is to text and pixels in one softmax."""

import math

import if_zoo
import pytest
import torch
import zoo
from sampling import largest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import difffast
from difffast import Suppression, patched

PROMPT = "a ox by elk"
#: A piece a letter and one for every word's beginning, no start token: _ a _ o x _ b y _ e l k, end.
REMOVED, KEPT, END = (8, 9, 10, 11), (0, 1, 2, 3, 4, 5, 6, 7), 12
STEPS = 8


def tokenizer():
    """SentencePiece's way to write words, with a piece for every letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {each: i for i, each in enumerate(["<pad>", "</s>", "<unk>", "▁", *letters])}
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=512, **special)


@pytest.fixture(scope="module")
def deepfloyd():
    pipe = if_zoo.deepfloyd("IFPipeline")().to(dtype=torch.float64)
    config = T5Config(
        vocab_size=30, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    encoder = zoo.seeded(T5EncoderModel, config).double()
    pipe.register_modules(tokenizer=tokenizer(), text_encoder=encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_svd(rows, alpha=1.0):
    u, sigma, v = torch.linalg.svd(rows, full_matrices=False)
    return u @ torch.diag(sigma * torch.exp(-alpha * sigma)) @ v


def run(pipe, **options):
    """Final pixels of a seeded run, with the scheduler's noise."""
    given = {"num_inference_steps": STEPS, "height": 8, "width": 8, "output_type": "pt", "guidance_scale": 5.0}
    return pipe(generator=torch.Generator().manual_seed(0), **{**given, **options}).images


def test_words_and_true_padding_are_suppressed(deepfloyd):
    text = deepfloyd.encode_prompt(PROMPT, False)[0]
    found = difffast.suppress(deepfloyd, PROMPT, "elk", alpha=0.5)
    rows = [*REMOVED, *range(END, 77)]
    expected = text.clone()
    expected[0, rows] = by_svd(text[0, rows], 0.5)
    assert set(found) == {"prompt_embeds"}
    assert largest(found["prompt_embeds"], expected) <= 1e-12 * text.abs().max()
    assert largest(run(deepfloyd, **found), run(deepfloyd, prompt=PROMPT)) > 1e-4


def test_words_beyond_the_encoders_rows_are_none(deepfloyd):
    long = "a ox by elk " * 8
    found = difffast.suppress(deepfloyd, long, "elk")["prompt_embeds"]  # 77 pieces of 97, the last is the end token
    text = deepfloyd.encode_prompt(long, False)[0]
    rows = [*(12 * k + i for k in range(6) for i in REMOVED), 76]
    expected = text.clone()
    expected[0, rows] = by_svd(text[0, rows])
    assert largest(found, expected) <= 1e-12 * text.abs().max()


class Seeing:
    """Attention to text and pixels in one softmax, which keeps what the pixels give the text's tokens."""

    def __init__(self):
        self.maps = None

    def __call__(self, layer, hidden, encoder_hidden_states=None, **_):
        text = encoder_hidden_states
        if layer.norm_cross is not None:
            text = layer.norm_cross(text.transpose(1, 2)).transpose(1, 2)
        pixels = layer.group_norm(hidden.flatten(2)).transpose(1, 2)
        q, k, v, text_k, text_v = (
            to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for to, x in (
                *((to, pixels) for to in (layer.to_q, layer.to_k, layer.to_v)),
                *((to, text) for to in (layer.add_k_proj, layer.add_v_proj)),
            )
        )
        maps = (q @ torch.cat([text_k, k], 2).transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        self.maps = maps[..., : text.shape[1]].mean(1)
        out = layer.to_out[0]((maps @ torch.cat([text_v, v], 2)).transpose(1, 2).flatten(2))
        return out.transpose(1, 2).reshape(hidden.shape) + hidden


def by_hand(pipe, iterations, size, weight):
    """The paper's method with optimisation at steps 2 and 3 of 8, on the stock UNet; -> (pixels, losses)."""
    names = list(pipe.unet.attn_processors)
    before = pipe.unet.attn_processors
    seeing = {name: Seeing() for name in names}
    pipe.unet.set_attn_processor(dict(seeing))
    chosen = [each for name, each in seeing.items() if not name.startswith("mid_block")]
    with torch.no_grad():
        text, nothing = pipe.encode_prompt(PROMPT, True)
    rows = [*REMOVED, *range(END, 77)]
    suppressed = text.clone()
    suppressed[0, rows] = by_svd(text[0, rows])
    noise = torch.Generator().manual_seed(0)
    z = source = torch.randn(1, 3, 8, 8, generator=noise, dtype=torch.float64)
    scheduler, losses = pipe.scheduler, []
    scheduler.set_timesteps(STEPS)

    def maps(row):
        return torch.stack([each.maps[row] for each in chosen]).mean(0)

    def step(x, t, own, state):
        out = pipe.unet(x.repeat(2, 1, 1, 1), t, torch.cat([nothing, own])).sample
        e = out[:1, :3] + 5.0 * (out[1:, :3] - out[:1, :3])
        generator = torch.Generator()
        generator.set_state(state)
        return scheduler.step(torch.cat([e, out[1:, 3:]], 1), t, x, generator=generator).prev_sample, generator

    for i, t in enumerate(scheduler.timesteps):
        now, state = (text if i < 2 else suppressed), noise.get_state()
        if 2 <= i < 4:
            with torch.no_grad():
                after, _ = step(source, t, text, state)
                wanted, source = maps(1), after
            losses.append([])
            for _ in range(iterations):
                leaf = now.detach().requires_grad_()
                pipe.unet(z, t, leaf)
                squares = ((wanted - maps(0)) ** 2).sum(0)
                loss = squares[list(KEPT)].sum() - weight * squares[list(REMOVED)].sum()
                losses[-1].append(loss.item())
                rate = size * math.sqrt(1 - 0.9 * i / (STEPS - 1))
                now = now - rate * torch.autograd.grad(loss, leaf)[0]
        with torch.no_grad():
            z, noise = step(z, t, now, state)
        source = z if i < 2 else source
    pipe.unet.set_attn_processor(before)
    return z, losses


def test_a_run_is_the_method_written_out(deepfloyd):
    method = Suppression("elk", optimise=(10, 22), iterations=2, step_size=2.0, weight=0.4)
    expected, losses = by_hand(deepfloyd, 2, 2.0, 0.4)
    plain = run(deepfloyd, prompt=PROMPT)
    with patched(deepfloyd, "exact", steering=method) as report:
        found = run(deepfloyd, prompt=PROMPT)
    ours = [report.trace.losses[step, 0] for step in (2, 3)]
    assert largest(torch.tensor(ours), torch.tensor(losses)) <= 1e-12
    assert all(each[0] > each[-1] for each in losses)
    assert largest(found, expected) <= 1e-9
    assert largest(found, plain) > 1e-4
    assert torch.equal(run(deepfloyd, prompt=PROMPT), plain)


def test_the_references_loss_needs_self_attention(deepfloyd):
    with pytest.raises(ValueError, match="attend to text and pixels in one softmax: use mode='paper'"):
        difffast.patch(deepfloyd, "exact", steering=Suppression("elk", mode="reference"))

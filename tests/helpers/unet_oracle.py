"""Encoder and decoder of UNet2DConditionModel written out by hand: the oracle for the generic split.

Covers what Stable Diffusion uses: no added conditions, no ControlNet, sizes divisible by the overall factor.
"""

import torch


def time_embedding(unet, sample, timesteps):
    return unet.time_embedding(unet.time_proj(timesteps).to(sample.dtype))


def encode(unet, sample, timestep, text):
    """-> (skip tensors in the order they are made, mid output)"""
    emb = time_embedding(unet, sample, timestep.expand(sample.shape[0]))
    hidden = unet.conv_in(sample)
    skips = [hidden]
    for block in unet.down_blocks:
        extra = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        hidden, made = block(hidden_states=hidden, temb=emb, **extra)
        skips += made
    return skips, unet.mid_block(hidden, emb, encoder_hidden_states=text)


def decode(unet, skips, mid, timestep, text):
    """One time step -> the UNet's output."""
    emb = time_embedding(unet, mid, timestep.expand(mid.shape[0]))
    skips, hidden = list(skips), mid
    for block in unet.up_blocks:
        count = len(block.resnets)
        used, skips = tuple(skips[-count:]), skips[:-count]
        extra = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        hidden = block(hidden_states=hidden, temb=emb, res_hidden_states_tuple=used, **extra)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


@torch.no_grad()
def sample_ddim(pipe, prompt, keys, *, steps, seed, guidance_scale=7.5):
    """Encoder propagation, step by step, in a loop of our own: final latents."""
    unet, scheduler = pipe.unet, pipe.scheduler
    text, empty = pipe.encode_prompt(prompt, "cpu", 1, True)
    text = torch.cat([empty, text])
    scheduler.set_timesteps(steps)
    size = unet.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((1, 4, size, size), generator=generator, dtype=unet.dtype) * scheduler.init_noise_sigma
    for order, t in enumerate(scheduler.timesteps):
        if order in keys:
            skips, mid = encode(unet, scheduler.scale_model_input(torch.cat([latents] * 2), t), t, text)
        uncond, cond = decode(unet, skips, mid, t, text).chunk(2)
        latents = scheduler.step(uncond + guidance_scale * (cond - uncond), t, latents).prev_sample
    return latents

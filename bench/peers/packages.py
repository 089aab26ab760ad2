"""Peers that come as packages: DeepCache, tomesd, and Diffusers' own Pyramid Attention Broadcast."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from .calls import Calls, forwards_left_alone


@contextlib.contextmanager
def deepcache(pipe: Any, interval: int, branch: int) -> Iterator[None]:
    """DeepCache (arXiv 2312.00858): all but the outermost layers run at every ``interval``-th step only.

    Branch 0 is the package's default.  Branch 1, with one more level of layers, is of the published tables, which its
    authors' own pipelines made: their layer l and block b is branch 3 * l + b + 1.
    """
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    with forwards_left_alone(pipe.unet):
        helper.enable()
        try:
            yield
        finally:
            helper.disable()


@contextlib.contextmanager
def token_merging(pipe: Any, ratio: float) -> Iterator[None]:
    """tomesd (arXiv 2303.17604): ``ratio`` of the tokens are merged before the outermost self-attention."""
    import tomesd

    tomesd.apply_patch(pipe, ratio=ratio)
    try:
        yield
    finally:
        tomesd.remove_patch(pipe)


@contextlib.contextmanager
def pyramid_attention_broadcast(pipe: Any, self_interval: int, cross_interval: int) -> Iterator[None]:
    """Diffusers' Pyramid Attention Broadcast (arXiv 2408.12588): attention outputs are reused for so many steps.

    Written for video transformers; on a UNet it is told here which layers are which, and which timestep it is.
    """
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=self_interval,
        cross_attention_block_skip_range=cross_interval,
        spatial_attention_block_identifiers=("attn1",),
        cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: times[index],
    )
    calls, times, index = Calls(pipe), [], 0

    def follow(unet: Any, _arguments: tuple[Any, ...]) -> None:
        nonlocal times, index
        index, _ = calls.count()
        if index == 0:  # Once a run, so that no step waits for the device.
            times = [int(time) for time in pipe.scheduler.timesteps]
            # Nobody else does so on a UNet: a run would begin with another one's outputs.
            for module in hooked(unet):
                module._diffusers_hook.reset_stateful_hooks(recurse=False)

    def hooked(unet: Any) -> list[Any]:
        return [module for module in unet.modules() if hasattr(module, "_diffusers_hook")]

    with forwards_left_alone(pipe.unet, "_diffusers_hook"):
        hook = pipe.unet.register_forward_pre_hook(follow)
        apply_pyramid_attention_broadcast(pipe.unet, config)
        try:
            yield
        finally:
            hook.remove()
            for module in hooked(pipe.unet):
                module._diffusers_hook.remove_hook("pyramid_attention_broadcast", recurse=False)


@contextlib.contextmanager
def plain_openvino(pipe: Any, precision: str) -> Iterator[None]:
    """OpenVINO as one would use it by hand: the UNet converted once for every shape, in the stock pipeline.

    Args:
        pipe: the pipeline, whose weights the models copy.
        precision: "f32" or "bf16".
    """
    import openvino
    import torch

    unet, core, requests = pipe.unet, openvino.Core(), {}
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, text: Any) -> Any:
            return stock(sample, timestep, text, return_dict=False)[0]

    def convert(inputs: tuple[Any, ...]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(Call(), example_input=inputs, input=[list(x.shape) for x in inputs])
        return core.compile_model(model, "CPU", settings).create_infer_request()

    def run(sample: Any, timestep: Any, encoder_hidden_states: Any, **rest: Any) -> Any:
        unknown = [name for name, value in rest.items() if value is not None and name != "return_dict"]
        if unknown:
            raise TypeError(f"the converted UNet takes no {', '.join(unknown)}")
        inputs = (sample, timestep, encoder_hidden_states)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in requests:
            requests[shapes] = convert(inputs)
        outputs = requests[shapes].infer([x.numpy() for x in inputs], share_inputs=True)
        return (torch.from_numpy(outputs[0].copy()),)

    stock = unet.forward
    unet.forward = run
    try:
        yield
    finally:
        del unet.forward

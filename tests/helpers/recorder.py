"""A stand-in for CUDA graphs on the CPU: it records every ATen call with its very tensors, and replays those.

Like a graph it knows no Python: what the recorded function would decide anew, and tensors that it would find elsewhere
by now, are as they were.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        # Views and results of in-place functions follow the memory of what they were made of.
        own = [t.untyped_storage().data_ptr() not in given for t in made]
        self.calls.append((function, args, kwargs or {}, made, own))
        return result


class CpuRecorder:
    """Records on the CPU; ``counts`` says how often it did what."""

    def __init__(self):
        self.counts = {"warm-ups": 0, "recordings": 0, "replays": 0}

    def refuse(self, device):
        return None

    def on(self, device):
        return contextlib.nullcontext()

    def place(self):
        return "the only one"

    def warm_up(self, function):
        self.counts["warm-ups"] += 1
        return function()

    def record(self, function, alone=False):
        self.counts["recordings"] += 1
        with _Log() as log:
            outputs = function()
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                leaf.fill_(float("nan"))  # a graph has not run when it has been recorded

        def replay():
            self.counts["replays"] += 1
            for call, args, kwargs, made, own in log.calls:
                results = [t for t in tree_leaves(call(*args, **kwargs)) if isinstance(t, torch.Tensor)]
                for ours, theirs, copies in zip(made, results, own, strict=True):
                    if copies:
                        ours.copy_(theirs)

        return outputs, replay

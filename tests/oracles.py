"""Slow, plain second implementations that the tests hold the program against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from structure import ModelGraph


@contextmanager
def masked(graph: ModelGraph, indices: dict[str, list[int]]) -> Iterator[nn.Module]:
    """The dense network while the responses of `indices` are zeroed, those of depthwise followers with them."""
    numbers = graph.channels
    gone = {numbers.find(numbers.first[layer] + i) for layer, filters in indices.items() for i in filters}

    def zero(module_filters):
        def hook(module, inputs, output):
            return output.index_fill(1, torch.tensor(module_filters, device=output.device), 0)

        return hook

    modules = dict(graph.module.named_modules())
    nodes = {node.name: node for node in graph.module.graph.nodes}
    handles = []
    for layer in graph.convs:
        own = numbers.outputs[layer]
        filters = [i for i, number in enumerate(own.tolist()) if number >= 0 and numbers.find(number) in gone]
        if filters:
            tapped = modules[nodes[graph.tap(layer).node].target]
            handles.append(tapped.register_forward_hook(zero(filters)))
    try:
        yield graph.model
    finally:
        for handle in handles:
            handle.remove()

"""Outputs put back in place: a layer that makes fewer channels than what reads it expects.

Where a residual add or another fixed order of channels keeps a filter's place, the filter can still be computed no
longer: the layer makes those that are left, and zeros stand where the others were.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from channel_numbers import SHIFTING

SOURCES = "sources"  # buffer: whole channel -> the made channel that it is, or one past the last for zeros


class _PutBack:
    """[B, made, H, W] -> [B, whole, H, W]. Moved with the channels last, which costs no copy of that layout."""

    def forward(self, x: Tensor) -> Tensor:
        made = F.pad(super().forward(x), (0, 0, 0, 0, 0, 1))
        return made.permute(0, 2, 3, 1).index_select(3, self.sources).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, put back into {len(self.sources)} channels"


# One class a kind, of the same names, parameters and options as the layer it takes the place of.
KINDS = {kind: type(f"PutBack{kind.__name__}", (_PutBack, kind), {}) for kind in (nn.Conv2d, nn.BatchNorm2d, *SHIFTING)}
globals().update({kind.__name__: kind for kind in KINDS.values()})  # under their names, or nothing could be pickled


class Tracer(fx.Tracer):
    """torch.fx's, to which a layer that puts its outputs back is one layer."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _PutBack) or super().is_leaf_module(module, name)


def put_back(layer: nn.Module, sources: Tensor) -> None:
    """Make `layer` put its outputs back in place, itself: every name in the network stays.

    Args:
        layer: a convolution, BatchNorm or activation of one of `KINDS`, that runs at one place only.
        sources: int64 [whole], for each channel of the whole output the made channel that it is, or the number of made
            channels where it is to be zero.
    """
    layer.__class__ = KINDS[type(layer)]
    layer.register_buffer(SOURCES, sources.clone())

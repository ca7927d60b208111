"""PXP, pruning by explaining revisited. Hatefi et al., eXCV workshop at ECCV 2024, arXiv 2408.12568.

Layer-wise relevance propagation as the configuration that comes with the paper sets it: the epsilon rule (1e-6) for
every layer, biases counted, relevance 1 at the true class's logit, score(f) = sum_n |sum_hw R| at the convolution's
output, ranked over all layers as it is, so that filters of relevance near zero go first; ten images a class.
"""

from __future__ import annotations

from filter_selection.base import register
from filter_selection.lrp import LRP


@register("pxp")
class PXP(LRP):
    """LRP with the options of `config/pruning/pxp.yaml`."""

"""Filter selection criteria, one a file. Importing the package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from filter_selection.base import REGISTRY, Criterion, FilterIndices, Scores, get_criterion

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["REGISTRY", "Criterion", "FilterIndices", "Scores", "get_criterion"]

"""Operations that change what they read: made visible in a graph, and run without changing anything."""

from __future__ import annotations

import copy
import inspect
import operator

from torch import Tensor, fx, nn

IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
PASSED_ON = (nn.Dropout, nn.Dropout2d, nn.Identity)  # in evaluation mode they return the very tensor they are given
PASSED_ON_CALLS = {"dropout", "dropout2d"}


def is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node changes its first operand; `module` is what it calls, None for a function."""
    if module is not None:
        return getattr(module, "inplace", False)
    if node.op == "call_method":
        return node.target.endswith("_")
    by_name = getattr(node.target, "__name__", "").endswith("_")
    return node.op == "call_function" and (
        node.target in IN_PLACE_OPERATORS or by_name or bool(node.kwargs.get("inplace"))
    )


def follow_changes(module: fx.GraphModule) -> None:
    """Rewrite the graph so that whoever reads a value after it was changed in place reads it off the node that did so.

    What the graph computes stays the same. A value that is only passed on (dropout in evaluation mode) is changed with
    the one that it is.
    """
    modules = dict(module.named_modules())
    nodes = list(module.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    same_as: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        called = modules[node.target] if node.op == "call_module" else None
        if node.op == "call_function" and len(node.args) > 1:
            _name_the_flag(node)
        passes_on = isinstance(called, PASSED_ON) or (
            node.op == "call_function" and getattr(node.target, "__name__", "") in PASSED_ON_CALLS
        )
        changes = is_in_place(node, called)
        if not (passes_on or changes) or not (node.args and isinstance(node.args[0], fx.Node)):
            continue
        operand = same_as.get(node.args[0], node.args[0])
        if changes:
            for other in [operand, *(alias for alias, root in same_as.items() if root is operand)]:
                other.replace_all_uses_with(node, lambda user, place=order[node]: order[user] > place)
        else:
            same_as[node] = operand
    module.recompile()


def _name_the_flag(node: fx.Node) -> None:
    """F.relu(x, True) becomes F.relu(x, inplace=True)."""
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # built in: such functions say by their names that they work in place
        return
    if given.get("inplace"):
        (_, first), *rest = given.items()
        node.args, node.kwargs = (first,), dict(rest)


class Unchanging(fx.Interpreter):
    """Runs a network node by node, each operation out of place: a value stays what it was when it was made."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.extra_traceback = False
        self.spared: dict[str, nn.Module] = {}  # in-place module -> its copy that is not

    def call_module(self, target, args: tuple, kwargs: dict):
        module = self.fetch_attr(target)
        if not getattr(module, "inplace", False):
            return super().call_module(target, args, kwargs)
        if target not in self.spared:
            self.spared[target] = copy.copy(module)
            self.spared[target].inplace = False
        return self.spared[target](*args, **kwargs)

    def call_function(self, target, args: tuple, kwargs: dict):
        if kwargs.get("inplace"):
            kwargs = {**kwargs, "inplace": False}
        elif target in IN_PLACE_OPERATORS or getattr(target, "__name__", "").endswith("_"):
            args = _with_copy_of_first(args)
        return super().call_function(target, args, kwargs)

    def call_method(self, target, args: tuple, kwargs: dict):
        if target.endswith("_"):
            args = _with_copy_of_first(args)
        return super().call_method(target, args, kwargs)


def _with_copy_of_first(args: tuple) -> tuple:
    return (args[0].clone(), *args[1:]) if args and isinstance(args[0], Tensor) else args

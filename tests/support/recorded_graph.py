"""What stands for CUDA graphs on the CPU: a double that repeats operators, and a check that a graph can hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """List the tensors of nested arguments or results."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph's double: repeats operators on the tensors they had, and runs no Python of the caller.

    What was read on the host while it was recorded, or chosen by it, stays as it was then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def poison(self) -> None:
        """Take the values from everything that the recorded operators made."""
        for _, args, kwargs, result in self.calls:
            for made in self._made(args, kwargs, result):
                made.fill_(float("nan") if made.is_floating_point() else False if made.dtype == torch.bool else 10**6)

    def replay(self) -> None:
        """Do the same operators again, in the memory they had."""
        for func, args, kwargs, result in self.calls:
            made = list(self._made(args, kwargs, result))
            again = func(*args, **kwargs)
            if made:
                for old, new in zip(made, tensors_of(again), strict=True):
                    old.copy_(new)

    @staticmethod
    def _made(args: Any, kwargs: Any, result: Any) -> Iterator[Tensor]:
        """List the results that are neither inputs nor views of them."""
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        return (tensor for tensor in tensors_of(result) if tensor.untyped_storage().data_ptr() not in given)


class Recorder:
    """A `Capture` by `RecordedGraph`.

    Attributes:
        graphs: captured so far.
    """

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        graph = RecordedGraph()
        with graph:
            run()
        graph.poison()
        self.graphs.append(graph)
        return graph.replay


class WithoutHost(TorchDispatchMode):
    """Refuses operators that take or make a tensor on the CPU, such as a copy to where the others are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of((args, kwargs, result)):
            assert tensor.device.type == "meta", f"{func} has a tensor on the {tensor.device}"
        return result


def without_values(*trees: Any) -> tuple[Any, ...]:
    """Move tensors to a device that keeps shapes and strides and no values: what asks for one raises."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), trees)

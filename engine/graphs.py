"""A step of fixed shape, captured once and replayed: one copy up, one launch, whatever the number of kernels.

At batch 1 the kernels of a 7B step are a few microseconds each and there are ten in a layer: launched one by one they
take longer to ask for than to run. A graph has fixed addresses and shapes, so what changes from step to step is staged:
all of a step's tensors lie in one buffer, which one copy from pinned memory fills.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Tree = TypeVar("Tree")  # a NamedTuple of tensors, other such NamedTuples, and plain values, which are part of the shape

ALIGNMENT = 16  # bytes: what Triton specialises on, and the widest access of a thread


def map_tensors(tree: Tree, change: Callable[[torch.Tensor], torch.Tensor]) -> Tree:
    """The same tree with every tensor changed, in a fixed order."""
    if isinstance(tree, torch.Tensor):
        return change(tree)  # type: ignore[return-value]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(part, change) for part in tree))
    return tree


def shape_of(tree: Any) -> Any:
    """What two trees must have in common to share a graph: shapes, dtypes and the plain values."""
    if isinstance(tree, torch.Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return tuple(shape_of(part) for part in tree)
    return tree


class Staged:
    """Places on `device` for the tensors of trees that have the shape of `example`.

    Two buffers on the host take turns: one may still be copied from while the next step is written. Whoever fills must
    have waited for the step before the last one.
    """

    def __init__(self, example: Any, device: torch.device) -> None:
        self.shape = shape_of(example)
        places: list[tuple[int, torch.Tensor]] = []
        size = 0

        def place(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            places.append((size, x))
            size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
            return x

        map_tensors(example, place)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host_views = [[_view(host, start, x) for start, x in places] for host in self._hosts]
        views = iter([_view(self._device, start, x) for start, x in places])
        self.tree = map_tensors(example, lambda _: next(views))

    def fill(self, tree: Any) -> None:
        """Copy the values of `tree`, whose tensors are on the host, to the device: asynchronous on a GPU."""
        if shape_of(tree) != self.shape:
            raise ValueError(f"the tree is {shape_of(tree)}, the places are {self.shape}")
        self._hosts.reverse()
        self._host_views.reverse()
        views = iter(self._host_views[0])
        map_tensors(tree, lambda x: next(views).copy_(x))
        self._device.copy_(self._hosts[0], non_blocking=True)


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


class Graph:
    """`compute(tree)` for trees of one shape, captured; `launch` fills the places and replays it.

    The result is the same tensors every time, overwritten by the next launch. `example` must be harmless to compute: it is
    run once, so that Triton has compiled and the libraries have taken their memory before the capture.
    """

    def __init__(
        self,
        compute: Callable[[Any], Any],
        example: Any,
        device: torch.device,
        capture: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]],
    ) -> None:
        self._staged = Staged(example, device)
        self._staged.fill(example)
        self._replay, self.result = capture(lambda: compute(self._staged.tree))

    def launch(self, tree: Any) -> Any:
        self._staged.fill(tree)
        self._replay()
        return self.result


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool: they never run at the same time, and are dropped together, this
    object with them. Warm-up and capture are on one stream, so that the libraries' workspaces for it exist once, outside
    the pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = run()
        self._pool = self._pool or graph.pool()
        return graph.replay, result

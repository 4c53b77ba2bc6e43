"""Tree attention where no kernel of ours runs: torch's SDPA over windows of a pack, with work that follows the trees.

The rule is that of `tree_attention.py`: query i sees key j <=> j <= i < end[j].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# tokens: separate trees share a window up to this many, so that a pack of short ones costs N * 128, not N * N
WINDOW = 128


@dataclass(frozen=True)
class TreeWindows:
    """A pack cut where no earlier token is visible any more, laid out as equal padded windows.

    rows [windows, width] int64: the token of each place (0 where padded); places [N] int64: the inverse;
    visible [windows, 1, width, width] bool. A padded query sees only itself, and nothing sees a padded key.
    """

    rows: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor


def tree_windows(end: torch.Tensor, window: int = WINDOW) -> TreeWindows:
    """Cut a pack at tree boundaries, neighbouring trees sharing a window of up to `window` tokens (a longer tree: its own)."""
    bounds = _window_bounds(end.tolist(), window)
    width = max(stop - start for start, stop in bounds)
    start = torch.tensor([start for start, _ in bounds], device=end.device)[:, None]
    stop = torch.tensor([stop for _, stop in bounds], device=end.device)[:, None]
    offset = torch.arange(width, device=end.device)[None, :]
    real = start + offset < stop  # [windows, width]
    rows = torch.where(real, start + offset, 0)
    places = torch.nonzero(real.flatten()).flatten()
    reach = torch.where(real, end[rows], 0)  # a padded key reaches nobody
    query, key = (start + offset)[:, :, None], (start + offset)[:, None, :]
    visible = (key <= query) & (query < reach[:, None, :]) | (~real[:, :, None] & (key == query))
    return TreeWindows(rows, places, visible[:, None])


def tree_attention_windows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: TreeWindows) -> torch.Tensor:
    """The same result with work that follows the trees: torch's SDPA over the windows of `tree_windows(end)`."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x[windows.rows].transpose(1, 2) for x in (q, k, v))  # [windows, heads, width, D]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=windows.visible)
    return out.transpose(1, 2).flatten(0, 1)[windows.places]  # [N, H, D]


def _window_bounds(end: list[int], window: int) -> list[tuple[int, int]]:
    bounds: list[tuple[int, int]] = []
    start = reach = 0
    cuts = []  # positions where no earlier token is visible any more
    for index, stop in enumerate(end):
        if index and reach <= index:
            cuts.append(index)
        reach = max(reach, stop)
    for previous, cut in zip([0, *cuts], [*cuts, len(end)], strict=True):
        if cut - start > window and previous > start:
            bounds.append((start, previous))
            start = previous
    bounds.append((start, len(end)))
    return bounds

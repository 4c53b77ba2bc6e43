"""How many prompts does it take for a difference to show? `python -m selfreward.prompts_needed` prints the table.

Two answers to a prompt are compared: one wins or both tie. Counted as +1, -1 and 0, the mean over n prompts is the win
rate minus the loss rate, d. With a share t of ties a prompt's variance is 1 - t - d^2, so a test at 5% (two-sided) finds
a true difference of d in 80% of all cases if n >= (1.96 + 0.84)^2 (1 - t - d^2) / d^2.
"""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL, POWER = 0.05, 0.8
DIFFERENCES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
TIES = (0.0, 0.2, 0.4)


def prompts_needed(difference: float, ties: float = 0.0) -> int:
    """Prompts for win rate - loss rate = `difference` (0 to 1) to show, where a share `ties` of them ties."""
    if not 0 < difference <= 1 - ties <= 1:
        raise ValueError(f"a difference of {difference} cannot be with {ties} of the prompts tied")
    z = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)
    return max(1, math.ceil(z * z * (1 - ties - difference**2) / difference**2))


def table() -> str:
    head = ["win - loss", *(f"{ties:.0%} ties" for ties in TIES)]
    rows = [[f"{d:.0%}", *(f"{prompts_needed(d, ties):,}" for ties in TIES)] for d in DIFFERENCES]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

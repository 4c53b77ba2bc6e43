import numpy as np
from numpy.typing import NDArray

def instruction_levels() -> list[str]: ...
def gumbel_noise(
    seeds: NDArray[np.uint64],
    positions: NDArray[np.uint32],
    candidates: NDArray[np.uint32],
    stream: int,
    out: NDArray[np.float32],
    level: str = "",
) -> None: ...
def dropout_mask(
    key: int,
    segments: NDArray[np.uint64],
    positions: NDArray[np.uint32],
    site: int,
    threshold: int,
    out: NDArray[np.bool_],
) -> None: ...
def philox(key: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]: ...
def linear_pack(weight: NDArray[np.float32], packed: NDArray[np.float32]) -> None: ...
def linear(
    x: NDArray[np.float32], packed: NDArray[np.float32], out: NDArray[np.float32], threads: int, level: str = ""
) -> None: ...

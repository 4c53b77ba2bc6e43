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
def rms_norm(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    out: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def swiglu(gate_up: NDArray[np.float32], out: NDArray[np.float32], threads: int, level: str = "") -> None: ...
def chunk_attention(
    q: NDArray[np.float32],
    key_pages: NDArray[np.float32],
    value_pages: NDArray[np.float32],
    items: NDArray[np.int64],
    positions: NDArray[np.int64],
    out: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def rope_write(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    key_pages: NDArray[np.float32],
    value_pages: NDArray[np.float32],
    slots: NDArray[np.int64],
    copies: NDArray[np.int64],
    out: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def sample(
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
    seeds: NDArray[np.int64],
    positions: NDArray[np.int64],
    candidates: NDArray[np.int64],
    vocab: int,
    forbidden_offsets: NDArray[np.int64],
    forbidden: NDArray[np.int64],
    label_offsets: NDArray[np.int64],
    label_ids: NDArray[np.int64],
    ids: NDArray[np.int64],
    raw: NDArray[np.float32],
    sampled: NDArray[np.float32],
    labels: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def share_little(share: bool) -> None: ...
def probe_fma(rounds: int, threads: int, level: str = "") -> float: ...
def probe_read(memory: NDArray[np.float32], threads: int, level: str = "") -> float: ...
def philox(key: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]: ...
def linear_pack(weight: NDArray[np.float32], packed: NDArray[np.float32]) -> None: ...
def linear(
    x: NDArray[np.float32], packed: NDArray[np.float32], out: NDArray[np.float32], threads: int, level: str = ""
) -> None: ...

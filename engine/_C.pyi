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
def adamw_bf16(
    weight: NDArray[np.uint16],
    grad: NDArray[np.uint16],
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    key: int,
    number: int,
    first: int,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    eps: float,
    decay: float,
    rate: float,
    root: float,
    scale: float,
    threads: int,
    level: str = "",
) -> None: ...
def rms_norm(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    out: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def add_rms_norm(
    x: NDArray[np.float32],
    branch: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    out_sum: NDArray[np.float32],
    out_norm: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def embed(
    tokens: NDArray[np.int64],
    table: NDArray[np.float32] | NDArray[np.uint16],
    out: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def swiglu(gate_up: NDArray[np.float32], out: NDArray[np.float32], threads: int, level: str = "") -> None: ...
def chunk_attention(
    q: NDArray[np.float32],
    key_pages: NDArray[np.float32] | NDArray[np.uint16],
    value_pages: NDArray[np.float32] | NDArray[np.uint16],
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
    key_pages: NDArray[np.float32] | NDArray[np.uint16],
    value_pages: NDArray[np.float32] | NDArray[np.uint16],
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

class Recording:
    def __init__(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> None: ...
    def own(self, memory: NDArray[np.float32]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def replay(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        copies: NDArray[np.int64],
        items: NDArray[np.int64],
        threads: int,
    ) -> None: ...

def share_little(share: bool) -> None: ...
def probe_fma(rounds: int, threads: int, level: str = "") -> float: ...
def probe_read(memory: NDArray[np.float32], threads: int, level: str = "") -> float: ...
def philox(key: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]: ...
def linear_pack(weight: NDArray[np.float32], packed: NDArray[np.float32], first: int = 0) -> None: ...
def linear_unpack(packed: NDArray[np.float32], weight: NDArray[np.float32], first: int = 0) -> None: ...
def linear(
    x: NDArray[np.float32], packed: NDArray[np.float32], out: NDArray[np.float32], threads: int, level: str = ""
) -> None: ...
def linear_bf16_levels() -> list[str]: ...
def linear_pack_bf16(weight: NDArray[np.uint16], packed: NDArray[np.uint16], first: int = 0) -> None: ...
def linear_unpack_bf16(packed: NDArray[np.uint16], weight: NDArray[np.uint16], first: int = 0) -> None: ...
def linear_bf16(
    x: NDArray[np.float32], packed: NDArray[np.uint16], out: NDArray[np.float32], threads: int, level: str = ""
) -> None: ...
def linear_int8_levels() -> list[str]: ...
def linear_pack_int8(
    weight: NDArray[np.float32], packed: NDArray[np.uint8], scales: NDArray[np.float32], first: int = 0
) -> None: ...
def linear_int8(
    x: NDArray[np.float32],
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    out: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def product(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    out: NDArray[np.float32],
    add: bool,
    threads: int,
    level: str = "",
) -> None: ...
def rms_norm_gradient(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    dy: NDArray[np.float32],
    dsum: NDArray[np.float32] | None,
    dx: NDArray[np.float32],
    dweight: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def swiglu_gradient(
    gate_up: NDArray[np.float32],
    dout: NDArray[np.float32],
    dgate_up: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def rope(
    x: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    out: NDArray[np.float32],
    back: bool,
    threads: int,
    level: str = "",
) -> None: ...
def logprob(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    first: int,
    best: NDArray[np.float32],
    total: NDArray[np.float64],
    hit: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def logprob_gradient(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    first: int,
    lse: NDArray[np.float32],
    grad_logp: NDArray[np.float32],
    grad_lse: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def tree_attention(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    end: NDArray[np.int64],
    bounds: NDArray[np.int64],
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def tree_attention_gradient(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    end: NDArray[np.int64],
    bounds: NDArray[np.int64],
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
    dout: NDArray[np.float32],
    dq: NDArray[np.float32],
    dk: NDArray[np.float32],
    dv: NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...

"""SwiGLU: silu(gate) * up, on the fused projection.

gate_up [..., 2 * ffn], gate first -> [..., ffn].
"""

import torch
import torch.nn.functional as F


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

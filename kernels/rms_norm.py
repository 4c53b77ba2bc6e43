"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.

x [..., dim], weight [dim] -> [..., dim] in x's dtype. Statistics in fp32 (fp64 for fp64 input); the normalised value is
rounded to x's dtype *before* the product with the weight, which is where HF's LlamaRMSNorm rounds.
"""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)

"""Device code of the engine: each file holds one operation, its reference and (as they come) its kernels.

Installed as `engine.kernels`; only `engine/ops.py` imports it. The files import torch and triton only.
"""

"""Where a run computes: on the CPU, or on the GPU that torch calls current (CUDA_VISIBLE_DEVICES chooses another one)."""

from __future__ import annotations

import gc
import platform
from typing import Any

import torch

from engine import InputError, NotBuiltError, backends
from selfreward.recipe import Recipe

GPU_BLOCKS = (8, 16, 32, 64, 128)  # tokens in a page of the GPU's kernels


def find_device(recipe: Recipe) -> str:
    """ "cpu" or "cuda". InputError: a GPU is asked for and there is none."""
    there = torch.cuda.is_available()
    if recipe.device == "cuda" and not there:
        raise InputError("device is 'cuda', and torch finds no GPU here; set device=cpu, or install a torch for CUDA")
    if recipe.device == "auto":
        return "cuda" if there else "cpu"
    return recipe.device


def sampler_dtype(recipe: Recipe) -> str:
    """Of the sampler's weights, keys and values: fp32 on a CPU and bf16 on a GPU, unless the recipe says otherwise."""
    if recipe.sampler.dtype == "auto":
        return "bfloat16" if find_device(recipe) == "cuda" else "float32"
    return recipe.sampler.dtype


def check_device(recipe: Recipe) -> None:
    """What the sampler would refuse on this device, before the first training instead of after it."""
    if find_device(recipe) == "cpu":
        return
    sampler = recipe.sampler
    if sampler.quantization:
        raise NotBuiltError(
            f"sampler.quantization is {sampler.quantization!r}; on a GPU it is not built yet: leave it out"
        )
    if sampler.block_size not in GPU_BLOCKS:
        raise InputError(f"sampler.block_size is {sampler.block_size}; on a GPU expected one of {GPU_BLOCKS}")


def device_facts(recipe: Recipe) -> dict[str, Any]:
    """What of the machine decides a run's bytes, for its manifest."""
    device = find_device(recipe)
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "backends": backends(device),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def free_memory(device: str) -> None:
    """Give back what nothing holds any more: on a GPU another size of block could not take its place."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()

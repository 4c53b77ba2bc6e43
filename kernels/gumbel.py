"""Sampling noise as a function: Gumbel noise of token v from Philox-4x32-10.

key = the request's 64-bit seed, counter = (position, candidate, v // 4, stream), token v takes word v % 4.
u = (x + 1/2) / 2^32, E = -log(1 - u), noise = -log(E). Small u wins and has full precision. The reference computes in
float64 from + - * / and exponent arithmetic, rounded to fp32 once at the end: the same bits as csrc/gumbel.cpp.

On a GPU the words are the same and the noise is computed in fp32, within 1e-6 + 2^-22 |noise| of the reference: far
below what a draw can show. `token_words` and `exponential` are for kernels that make noise where they use it
(kernels/sample_rows.py).
"""

from __future__ import annotations

import torch

from .jit import jit, tl

_LOW = 0xFFFFFFFF
_SQRT_HALF = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
_ONE = 0x3FF0000000000000


def philox_reference(key: torch.Tensor, counter: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four int64 tensors holding 32-bit words; key int64 (the bit pattern of 64 bits), counter: four of the same shape."""
    c0, c1, c2, c3 = counter
    key0, key1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def gumbel_noise_reference(
    seeds: torch.Tensor, positions: torch.Tensor, candidates: torch.Tensor, stream: int, vocab: int
) -> torch.Tensor:
    """seeds, positions, candidates [rows] int64 -> fp32 [rows, vocab]."""
    block = torch.arange((vocab + 3) // 4, device=seeds.device)[None, :]
    rows = [x[:, None].expand(-1, block.shape[1]) for x in (seeds, positions, candidates)]
    block = block.expand_as(rows[0])
    words = philox_reference(rows[0], [rows[1], rows[2], block, torch.full_like(block, stream)])
    return gumbel_of_words(torch.stack(words, dim=-1).flatten(1)[:, :vocab])


def gumbel_of_words(words: torch.Tensor) -> torch.Tensor:
    """32-bit words (int64) -> fp32 Gumbel noise."""
    one_minus_u = (4294967295.5 - words.double()) * 2.0**-32
    return (-_log(-_log(one_minus_u))).float()


def _multiply(word: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, without leaving signed 64 bits: the constant in two halves."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive float64: mantissa in [sqrt(1/2), sqrt(2)), then the series of 2 atanh(f / (2 + f))."""
    bits = x.contiguous().view(torch.int64) + (_ONE - _SQRT_HALF)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) + _SQRT_HALF).view(torch.float64)
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = torch.full_like(z, 1.0 / 17.0)
    for odd in (15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0):
        series = series * z + 1.0 / odd
    return exponent.double() * 0.6931471805599453 + (s + s) * (1.0 + z * series)


@jit
def philox(key, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
    """Four tensors of 32-bit words; key int64, counter uint32. Products in 64 bits: one instruction gives both halves."""
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def exponential(word):  # type: ignore[no-untyped-def]
    """32-bit words -> E = -log(1 - u) in fp32, relative error 5e-7, by way of z, the smaller one of u and 1 - u, which fp32
    has to half a unit: u near 0 must not pass through 1 - u."""
    signed = word.to(tl.int32, bitcast=True)
    below_half = signed >= 0
    z = ((signed ^ (signed >> 31)).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    bits = tl.where(below_half, 1.0 - z, z).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of a mantissa m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(below_half & (exponent == 0), -z, f)
    s = f / (2.0 + f)  # log(1 + f) = 2 atanh s, s^2 <= 0.0295: the first term left out is 2e-9 of the sum
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9))))
    return exponent.to(tl.float32) * -0.6931471805599453 - (s + s) * series


@jit
def token_words(seed, position, candidate, start, STREAM: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of the tokens start, ..., start + SIZE - 1; start a multiple of 4. The rest int64 scalars."""
    block = (start // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    zero = block ^ block
    c0, c1 = zero + position.to(tl.uint32), zero + candidate.to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, c0, c1, block, zero + STREAM)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@jit
def _noise(  # type: ignore[no-untyped-def]
    seeds_ptr, positions_ptr, candidates_ptr, out_ptr, vocab, STREAM: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * SIZE
    seed, position, candidate = tl.load(seeds_ptr + row), tl.load(positions_ptr + row), tl.load(candidates_ptr + row)
    noise = -tl.log(exponential(token_words(seed, position, candidate, start, STREAM, SIZE)))
    token = start + tl.arange(0, SIZE)
    tl.store(out_ptr + row * vocab + token, noise, mask=token < vocab)


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, candidates: torch.Tensor, stream: int, vocab: int
) -> torch.Tensor:
    """seeds, positions, candidates [rows] int64 -> fp32 [rows, vocab]: `gumbel_noise_reference` from a kernel."""
    out = torch.empty(len(seeds), vocab, dtype=torch.float32, device=seeds.device)
    if out.numel():
        grid = len(seeds), -(-vocab // 2048)
        _noise[grid](seeds, positions, candidates, out, vocab, STREAM=stream, SIZE=2048, num_warps=4)
    return out

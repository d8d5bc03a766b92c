"""What flash-attn would be given, checked and computed with sdpa: flash-attn itself needs a GPU.

The stand-ins take the place of the package's two functions, below transformers' own glue, so that everything above the
kernels is the real thing.
"""

from __future__ import annotations

import torch
from transformers import modeling_flash_attention_utils as glue


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """Dense rows: ``q [B, n, heads, head_dim]``; causal from the lower right corner, as in flash-attn from 2.1 on."""
    assert q.dim() == k.dim() == v.dim() == 4
    queries, keys = q.shape[1], k.shape[1]
    assert causal
    assert queries <= keys
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


class Varlen:
    """``flash_attn_varlen_func``, and a record of the bounds that it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False,
    ):  # fmt: skip
        self.calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
        out = torch.full_like(q, torch.nan)
        for tokens, bounds, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
            assert tokens.dim() == 3
            assert bounds.dtype == torch.int32, "the kernel reads 32-bit integers"
            assert bounds.is_contiguous()
            assert bounds[0] == 0
            assert bounds[-1] == tokens.shape[0], "every token is in a sequence"
            assert bounds.diff().min() >= 0
            assert bounds.diff().max() <= longest, "longer sequences would be cut"
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        for row in range(len(cu_seqlens_q) - 1):
            (a, b), (c, d) = cu_seqlens_q[row : row + 2].tolist(), cu_seqlens_k[row : row + 2].tolist()
            if b > a:
                out[a:b] = flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], 0.0, softmax_scale, causal)[0]
        assert not out.isnan().any()
        return out


def install(monkeypatch):
    """Make transformers use the stand-ins until the test ends.

    Returns
    -------
    Varlen
    """
    varlen = Varlen()
    process = glue._lazy_define_process_function(Varlen.__call__)
    functions = (flash_attn_func, varlen, None, glue._pad_input, glue._unpad_input)
    processes = (process, dict) if hasattr(glue, "_process_with_kvcache_kwargs_fn") else process  # one in 5.16
    monkeypatch.setattr(glue, "lazy_import_flash_attention", lambda *_, **__: (functions, processes))
    return varlen

"""torch.nn.MultiheadAttention with fewer heads than its width holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.errors import CompactError


class FewerHeads(nn.MultiheadAttention):
    """Attention whose heads are fewer than ``embed_dim / head_dim``.

    ``torch.nn.MultiheadAttention`` computes the width of a head from the model's width, so heads
    can't be taken out of it. This one takes it from ``head_dim``. It is made of a copied module, is
    called like it and has parameters of the same names.
    """

    _split: bool  # whether q, k and v have weights of their own

    @classmethod
    def take_over(cls, module: nn.MultiheadAttention) -> None:
        """Make ``module``, whose projections were cut, one of these.

        Raises:
            CompactError: it has ``bias_k`` or ``add_zero_attn``, or a head was cut through.
        """
        if module.bias_k is not None or module.add_zero_attn:
            raise CompactError(
                f"MultiheadAttention with add_bias_kv={module.bias_k is not None} and "
                f"add_zero_attn={module.add_zero_attn} keeps its heads; build it with neither"
            )
        width = module.out_proj.weight.shape[1]
        if width % module.head_dim:
            raise CompactError(
                f"{width} channels don't make whole heads of {module.head_dim}; mask whole heads"
            )
        module.num_heads = width // module.head_dim
        module.__class__ = cls
        assert isinstance(module, cls)
        module._qkv_same_embed_dim, module._split = False, not module._qkv_same_embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments, shapes and results as of ``torch.nn.MultiheadAttention``."""
        batched = query.dim() == 3
        inputs = [query, key, value] if batched else [t.unsqueeze(1) for t in (query, key, value)]
        if batched and self.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]  # [time, batch, width]
        q, k, v = (self._heads(t) for t in self._projected(inputs))  # [batch, heads, time, D]
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_dim**-0.5)
        out = self.out_proj(out.permute(2, 0, 1, 3).flatten(2))
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        weights: list[Tensor]
        if self._split:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = [*self.in_proj_weight.chunk(3)]
        none = [None, None, None]
        biases = none if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1).permute(1, 2, 0, 3)

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Add both masks, as numbers, to [batch or 1, heads or 1, time, time]."""
        total: Tensor | None = None
        if mask is not None:
            total = _numbers(mask, q)
            if mask.dim() == 3:
                total = total.reshape(q.shape[0], -1, *mask.shape[1:])
                if total.shape[1] != self.num_heads:
                    raise CompactError(
                        f"attn_mask holds {total.shape[1]} heads, this attention "
                        f"{self.num_heads}: pass one mask for all heads, or those that stayed"
                    )
        if padding is not None:
            more = _numbers(padding, q).view(-1, 1, 1, k.shape[2])
            total = more if total is None else total + more
        return total


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))

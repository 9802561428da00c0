"""This module defines a decoder-only transformer with the layout of GPT-2 (Radford et al., 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError


class GPT(nn.Module):
    """A decoder-only transformer: int64 tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``.

    The logits are those of the next token. The blocks are named ``blocks.0``, ``blocks.1``, …; they are good places for
    a pipeline's stages to begin.

    Args:
        vocab_size: number of different tokens.
        num_layers: number of blocks.
        width: features of a token between the blocks; a multiple of ``num_heads``.
        num_heads: attention heads of a block.
        context: the longest sequence, in tokens.
        dropout: dropout probability of the embedding, the attention weights and each residual branch.

    Raises:
        UsageError: if a number is out of range, or if ``width`` is no multiple of ``num_heads``.
        ValueError: from ``forward``, if a sequence is longer than the context.
    """

    def __init__(
        self, vocab_size: int, num_layers: int, width: int, num_heads: int, context: int, dropout: float = 0.0
    ) -> None:
        for name, size in (
            ("vocab_size", vocab_size),
            ("num_layers", num_layers),
            ("width", width),
            ("num_heads", num_heads),
            ("context", context),
        ):
            check_number(name, size, at_least=1, whole=True)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if width % num_heads:
            raise UsageError(f"the heads share the width evenly: width={width} is no multiple of num_heads={num_heads}")
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, num_heads, dropout) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise(num_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits. Those at position t depend on the tokens up to t only."""
        length = tokens.shape[1]
        if length > self.positions.num_embeddings:
            raise ValueError(f"a sequence of {length} tokens is longer than context={self.positions.num_embeddings}")
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        return self.head(self.norm(self.blocks(x)))

    def _initialise(self, num_layers: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # The sum of 2·num_layers residual branches then has the variance of one branch.
        for name, weight in self.named_parameters():
            if name.endswith("out.weight"):
                nn.init.normal_(weight, std=0.02 * (2 * num_layers) ** -0.5)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = _MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.num_heads = num_heads
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        # each (batch, heads, length, width / heads)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x)))

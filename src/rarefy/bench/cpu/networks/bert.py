"""An encoder of BERT-base's shape (Devlin et al., 2018, arXiv:1810.04805)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Bert"]


class Attention(nn.Module):
    """Self-attention of all tokens to all tokens, with its own output projection, shortcut and norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] to the same."""
        n, tokens, width = x.shape
        q, k, v = (
            p(x).view(n, tokens, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        return self.norm(x + self.o_proj(mixed))


class Block(nn.Module):
    """Attention and the two large Linears."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] to the same."""
        x = self.attention(x)
        return self.norm(x + self.mlp(x))


class Bert(nn.Module):
    """109,482,240 parameters by default. Token numbers [n, tokens] to [n, tokens, width] and a pooled [n, width]."""

    def __init__(
        self, vocabulary: int = 30522, width: int = 768, inner: int = 3072, depth: int = 12, heads: int = 12,
        positions: int = 512,
    ) -> None:  # fmt: skip
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.kinds = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.Sequential(*(Block(width, inner, heads) for _ in range(depth)))
        self.pooler = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens' states, [n, tokens, width], with the pooled first token added to the first."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(place) + self.kinds(torch.zeros_like(place)))
        x = self.blocks(x)
        return torch.cat([x[:, :1] + torch.tanh(self.pooler(x[:, :1])), x[:, 1:]], 1)

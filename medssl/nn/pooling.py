"""From a feature pyramid to one embedding of an image, from the images of a bag to one of the bag, and to scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.nn.heads import pool_pyramid

PoolName = Literal["mean", "max", "gem", "attention"]
BagPoolName = Literal["attention", "mean", "max"]

_GEM_FLOOR = 1e-6


class GeM(nn.Module):
    """Generalised mean over space, ``(mean x^p)^(1/p)``, with one learned ``p``: 1 is the mean, infinity the maximum.

    Reference: Radenović, Tolias, Chum, PAMI 2019, arXiv:1711.02512, equation 3.
    Deviations: values below 1e-6 count as 1e-6, since features need not be positive here.
    """

    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([power]))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float32[Tensor, "b c"]:
        """Pool each channel."""
        flat: Tensor = x.float().flatten(2).clamp(min=_GEM_FLOOR)
        return flat.pow(self.power).mean(dim=2).pow(1 / self.power)


class GatedAttention(nn.Module):
    """Weighted mean of instances, with weights ``softmax(w · (tanh(V h) * sigmoid(U h)))`` that the instances decide.

    Args:
        features: Size of an instance's embedding.
        hidden: Rows of V and of U.

    Reference: Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, ICML 2018, arXiv:1802.04712,
    equations 7 and 9.
    Deviations: none.
    """

    def __init__(self, features: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.value = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def weights(self, h: Float[Tensor, "b n d"], members: Bool[Tensor, "b n"] | None = None) -> Float32[Tensor, "b n"]:
        """Share of each instance in its bag; 0 where ``members`` is false."""
        scores: Tensor = self.score(self.value(h).tanh() * self.gate(h).sigmoid())[..., 0].float()
        if members is not None:
            scores = scores.masked_fill(~members, -torch.inf)
        return scores.softmax(dim=1)

    def forward(self, h: Float[Tensor, "b n d"], members: Bool[Tensor, "b n"] | None = None) -> Float32[Tensor, "b d"]:
        """Embedding of each bag."""
        return (self.weights(h, members)[..., None] * h.float()).sum(dim=1)


class PooledHead(nn.Module):
    """Scores of an image, or of a bag of images, from feature pyramids.

    Args:
        channels: Of each level of the pyramid.
        outputs: Number of scores.
        pool: From a level to an embedding: over space. ``attention`` weighs places as :class:`GatedAttention` does.
        levels: ``last`` takes the coarsest level; ``all`` the mean of every level, and then ``pool`` is the mean.
        bag_pool: From the images of a bag to one embedding.
        hidden: Width of the attentions.
        dropout: On the embedding, while training.
        is_normed: Whether embeddings are normalised (layer norm) before the last map.
        is_ordinal: One direction for all scores, with cuts that fall: "at least grade j" is never more likely than
            "at least grade j − 1".

    Reference: Cao et al., CORAL, 2020, arXiv:1901.07884, section 3.3 (one direction, a bias for each cut).
    Deviations: the biases fall by construction, where the paper shows that they do so at the optimum.
    """

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int,
        *,
        pool: PoolName = "mean",
        levels: Literal["last", "all"] = "last",
        bag_pool: BagPoolName = "attention",
        hidden: int = 64,
        dropout: float = 0.0,
        is_normed: bool = False,
        is_ordinal: bool = False,
    ) -> None:
        super().__init__()
        self._config = {
            "channels": list(channels),
            "outputs": outputs,
            "pool": pool,
            "levels": levels,
            "bag_pool": bag_pool,
            "hidden": hidden,
            "dropout": dropout,
            "is_normed": is_normed,
            "is_ordinal": is_ordinal,
        }
        self.levels = levels
        size = sum(channels) if levels == "all" else channels[-1]
        self.pool_name = "mean" if levels == "all" else pool
        self.pool: nn.Module = nn.Identity()
        if self.pool_name == "gem":
            self.pool = GeM()
        elif self.pool_name == "attention":
            self.pool = GatedAttention(size, hidden=hidden)
        self.bag_pool = bag_pool
        self.attention = GatedAttention(size, hidden=hidden) if bag_pool == "attention" else None
        self.norm = nn.LayerNorm(size) if is_normed else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(size, 1 if is_ordinal else outputs, bias=not is_ordinal)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        if not is_ordinal:
            nn.init.zeros_(self.linear.bias)
        self.first_cut = nn.Parameter(torch.zeros(1)) if is_ordinal else None
        self.steps = nn.Parameter(torch.zeros(outputs - 1)) if is_ordinal else None

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this head again, as plain data."""
        return dict(self._config)

    def embed(self, features: Sequence[Tensor]) -> Float32[Tensor, "n d"]:
        """One embedding an image."""
        if self.levels == "all":
            return pool_pyramid(features)
        last = features[-1]
        if self.pool_name == "max":
            return last.flatten(2).amax(dim=2).float()
        if self.pool_name == "mean":
            return last.flatten(2).mean(dim=2, dtype=torch.float32)
        pooled: Tensor = self.pool(last.flatten(2).mT if self.pool_name == "attention" else last)
        return pooled

    def of_bags(
        self, embeddings: Float[Tensor, "b n d"], members: Bool[Tensor, "b n"] | None = None
    ) -> Float32[Tensor, "b d"]:
        """One embedding a bag; of a bag of one image that of the image."""
        if self.attention is not None:
            pooled: Tensor = self.attention(embeddings, members)
            return pooled
        present = torch.ones_like(embeddings[..., :1]) if members is None else members[..., None].float()
        if self.bag_pool == "mean":
            return (embeddings.float() * present).sum(dim=1) / present.sum(dim=1)
        return embeddings.float().masked_fill(present == 0, -torch.inf).amax(dim=1)

    def forward(self, embeddings: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Scores before softmax or sigmoid."""
        scores: Tensor = self.linear(self.dropout(self.norm(embeddings)))
        if self.first_cut is not None and self.steps is not None:
            falls = torch.cat((self.first_cut, -F.softplus(self.steps)))
            return scores + falls.cumsum(dim=0)
        return scores

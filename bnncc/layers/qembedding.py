"""Embeddings from a quantized table, quantized again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bnncc.layers.config import config
from bnncc.quantizations import Quantization, as_quantization


class QEmbedding(nn.Embedding):
    """Rows of the quantized table: integers of any shape [...] to float [..., embedding_dim].

    Other arguments are `nn.Embedding`'s.
    weight_quantization, output_quantization: of the table and of the rows taken; a quantization or its name, None is
        the configuration's weight and input quantization.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        weight_quantization: str | Quantization | None = None,
        output_quantization: str | Quantization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.embedding_weight_quantization = as_quantization(weight_quantization or config.weight_quantization)
        self.embedding_output_quantization = as_quantization(output_quantization or config.input_quantization)

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(
            input,
            self.embedding_weight_quantization(self.weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        return self.embedding_output_quantization(rows)


class QEmbeddingBag(nn.EmbeddingBag):
    """Sums, means or maxima of rows of the quantized table: as `nn.EmbeddingBag`, whose arguments it takes.

    weight_quantization, output_quantization: of the table and of the result, as in `QEmbedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        weight_quantization: str | Quantization | None = None,
        output_quantization: str | Quantization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.embedding_weight_quantization = as_quantization(weight_quantization or config.weight_quantization)
        # The name is bitorch's, see `QuantizedWeightConv`.
        self.embedding_input_quantization = as_quantization(output_quantization or config.input_quantization)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        bags = F.embedding_bag(
            input,
            self.embedding_weight_quantization(self.weight),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
        return self.embedding_input_quantization(bags)

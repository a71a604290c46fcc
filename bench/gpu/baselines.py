"""The honest baselines: the same weights as plain modules, dense or with a fixed number of tokens, to be compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtvit_ops import Method, RaggedTokens, VisionTransformer
from mtvit_ops.methods import Dense
from mtvit_ops.ops import token_select

FIRST_PRUNED_BLOCK = 4


@dataclass(frozen=True)
class FixedKeepConfig:
    """Tokens of each image from the first pruned block on, class token included; the host knows them.

    ``ragged``: blocks run on ragged_linear all the same, as where it does not.
    """

    counts: tuple[int, ...]
    ragged: bool = False


class FixedKeep(Method):
    """Keeps random patches, so many in each image: what removal alone costs and gains, whoever chooses."""

    config_class = FixedKeepConfig
    config: FixedKeepConfig

    def attach(self, model: VisionTransformer) -> None:
        counts, device = self.config.counts, model.cls_token.device
        generator = torch.Generator().manual_seed(0)
        tokens = len(counts) * (1 + model.config.num_patches)
        # plain attributes: a buffer would be cast with the weights
        self.scores = torch.randperm(tokens, generator=generator).float().to(device)
        self.counts = torch.tensor(counts, dtype=torch.int32).to(device)

    @property
    def counts_are_dynamic(self) -> bool:
        return self.config.ragged

    def select(self, tokens: RaggedTokens) -> RaggedTokens:
        counts = self.config.counts
        equal = len(set(counts)) == 1
        selection = token_select(
            self.scores,
            None,
            tokens.cu_seqlens,
            keep=counts[0] if equal else self.counts,
            num_prefix_tokens=1,
            capacity=sum(counts),
        )
        return tokens.select(selection, max(counts))

    def before_block(self, index: int, tokens: RaggedTokens, state: Any) -> tuple[RaggedTokens, Any]:
        return (self.select(tokens) if index == FIRST_PRUNED_BLOCK else tokens), state


class RaggedDense(Dense):
    """Nothing dropped, on the kernels of those whose counts only the device knows."""

    counts_are_dynamic = True


class PlainViT(nn.Module):
    """The model as anybody would write it, (B, n, D) throughout; with ``rows``, only those from the pruned block on.

    Args:
        model: whose modules it runs.
        rows: rows of (B * N, D) to keep, equally many in each image, (B * n,), or None.
        batch: B, where there are rows.
    """

    def __init__(self, model: VisionTransformer, rows: Tensor | None = None, batch: int = 1) -> None:
        super().__init__()
        self.model, self.rows, self.batch = model, rows, batch

    def forward(self, images: Tensor) -> Tensor:
        x = embedded(self.model, images)
        for index, block in enumerate(self.model.blocks):
            if index == FIRST_PRUNED_BLOCK and self.rows is not None:
                x = x.flatten(0, 1)[self.rows].unflatten(0, (self.batch, -1))
            heads = block.attn.num_heads
            qkv = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias)
            q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = fed_forward(block, x + F.linear(out, block.attn.proj.weight, block.attn.proj.bias))
        return classified(self.model, x[:, 0])


class PackedViT(nn.Module):
    """The same with packed tokens and PyTorch's own varlen attention from the pruned block on.

    Args:
        model: whose modules it runs.
        rows, cu_seqlens: the live rows of (B * N, D) and where each image starts.
        longest: of the images' counts.
    """

    def __init__(self, model: VisionTransformer, rows: Tensor, cu_seqlens: Tensor, longest: int) -> None:
        super().__init__()
        self.model, self.rows, self.longest = model, rows, longest
        self.offsets = cu_seqlens
        self.everyone = torch.arange(len(cu_seqlens), dtype=torch.int32, device=rows.device)

    def forward(self, images: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # no kernel for the CPU

        x = embedded(self.model, images)
        longest = x.shape[1]
        offsets, x = self.everyone * longest, x.flatten(0, 1)
        for index, block in enumerate(self.model.blocks):
            if index == FIRST_PRUNED_BLOCK:
                x, offsets, longest = x[self.rows], self.offsets, self.longest
            qkv = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias)
            q, k, v = qkv.unflatten(1, (3, block.attn.num_heads, -1)).unbind(1)
            out = varlen_attn(q, k, v, offsets, offsets, longest, longest).flatten(1)
            x = fed_forward(block, x + F.linear(out, block.attn.proj.weight, block.attn.proj.bias))
        return classified(self.model, x[offsets[:-1].long()])


def embedded(model: VisionTransformer, images: Tensor) -> Tensor:
    conv = model.patch_embed.proj
    patches = F.conv2d(images, conv.weight, conv.bias, conv.stride).flatten(2).transpose(1, 2)
    return torch.cat((model.cls_token.expand(len(patches), -1, -1), patches), dim=1) + model.pos_embed


def fed_forward(block: nn.Module, x: Tensor) -> Tensor:
    first, second = block.mlp.fc1, block.mlp.fc2
    hidden = F.gelu(F.linear(block.norm2(x), first.weight, first.bias))
    return x + F.linear(hidden, second.weight, second.bias)


def classified(model: VisionTransformer, pooled: Tensor) -> Tensor:
    return F.linear(model.norm(pooled), model.head.weight, model.head.bias)

"""The LeViT of Evo-ViT: three stages of ever fewer, ever wider tokens, a class token, and no position biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_count, check_real, check_sequence, check_tensor
from ..ops import class_attention, varlen_attention
from .trace import Trace

_MLP_RATIO, _VALUE_RATIO, _SUBSAMPLE_VALUE_RATIO = 2, 2, 4


@dataclass(frozen=True)
class LeViTConfig:
    """The backbone's sizes; one entry a stage where there are several.

    Attributes:
        img_size: side of the square input, pixels; four convolutions of stride 2 make its tokens.
        embed_dim: widths; the first a multiple of 8, all but the last multiples of ``key_dim``.
        key_dim: width of a head's queries and keys; values are twice as wide, four times where tokens are subsampled.
        num_heads: attention heads.
        depth: layers.
        num_classes: outputs of each classifier.
        in_chans: image channels.
        distillation: have a second classifier, for a teacher's answers; the logits are then the mean of both.
        drop_path: probability that an image skips a residual branch in training, [0, 1).
    """

    img_size: int = 224
    embed_dim: tuple[int, ...] = (128, 256, 384)
    key_dim: int = 16
    num_heads: tuple[int, ...] = (4, 6, 8)
    depth: tuple[int, ...] = (2, 3, 4)
    num_classes: int = 1000
    in_chans: int = 3
    distillation: bool = True
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("img_size", "key_dim", "num_classes", "in_chans"):
            check_count(name, getattr(self, name), 1)
        for name in ("embed_dim", "num_heads", "depth"):
            values = getattr(self, name)
            check_sequence(name, values)
            object.__setattr__(self, name, tuple(values))  # the one way into a frozen dataclass
            for value in values:
                check_count(name, value, 1)
            if not values or len(values) != len(self.embed_dim):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.embed_dim) or 'stages'} stages of embed_dim,"
                    f" got {len(values)}"
                )
        if self.embed_dim[0] % 8:
            raise ValueError(f"embed_dim must begin with a multiple of 8, got {self.embed_dim[0]}")
        for width in self.embed_dim[:-1]:
            if width % self.key_dim:
                raise ValueError(f"embed_dim must be multiples of key_dim {self.key_dim}, got {width}")
        check_choice("distillation", self.distillation, (True, False))
        check_real("drop_path", self.drop_path, 0.0, 1.0)
        if self.drop_path == 1:
            raise ValueError("drop_path must be below 1, or nothing is left to learn from, got 1")

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Patches along one side, of each stage."""
        side = self.img_size
        for _ in range(4):
            side = _halved(side)
        sizes = [side]
        for _ in self.depth[1:]:
            sizes.append(_halved(sizes[-1]))
        return tuple(sizes)

    @property
    def stage_of_block(self) -> tuple[int, ...]:
        """The stage of each entry of ``blocks``; a subsampling block belongs to the stage that it ends."""
        last = len(self.depth) - 1
        return tuple(stage for stage, depth in enumerate(self.depth) for _ in range(depth + (stage < last)))


class LeViTMethod(nn.Module):
    """What runs a LeViT's blocks: ``config``, a frozen dataclass, and parameters, never the state of a pass."""

    config: Any

    def attach(self, model: LeViT) -> None:
        """Check the configuration against the model and create parameters."""
        raise NotImplementedError

    def run(self, model: LeViT, x: Tensor, tracing: bool) -> tuple[Tensor, Trace | None]:
        """All blocks: (B, 1 + M, C) to (B, 1 + M', C'), and on request a trace."""
        raise NotImplementedError


class LeViT(nn.Module):
    """A LeViT with a class token, run by Evo-ViT's slow-fast updates.

    Args:
        config: the backbone's sizes.
        method: which tokens go on, and when; its parameters appear as ``method.*``.
    """

    def __init__(self, config: LeViTConfig, method: LeViTMethod) -> None:
        super().__init__()
        self.config = config
        dims, sides = config.embed_dim, config.grid_sizes
        widths = (config.in_chans, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0])
        stem: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            stem += [ConvNorm(before, after), nn.Hardswish()]
        self.patch_embed = nn.Sequential(*stem[:-1])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[0]))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sides[0] ** 2, dims[0]))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        blocks: list[nn.Module] = []
        for stage, depth in enumerate(config.depth):
            blocks += [Layer(dims[stage], config.key_dim, config.num_heads[stage]) for _ in range(depth)]
            if stage + 1 < len(dims):
                blocks.append(Subsample(dims[stage], dims[stage + 1], config.key_dim, sides[stage]))
        self.blocks = nn.ModuleList(blocks)
        self.head = NormLinear(dims[-1], config.num_classes)
        if config.distillation:
            self.head_dist = NormLinear(dims[-1], config.num_classes)
        method.attach(self)
        self.method = method

    @overload
    def forward(self, images: Tensor, *, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, images: Tensor, *, return_trace: Literal[True]) -> tuple[Tensor, Trace]: ...

    def forward(self, images: Tensor, *, return_trace: bool = False) -> Tensor | tuple[Tensor, Trace]:
        """Classify.

        Args:
            images: (B, in_chans, img_size, img_size), dtype and device of the weights; B may be 0 in evaluation mode.
            return_trace: also say which tokens went through which block.

        Returns:
            Logits (B, num_classes), or logits and a ``Trace`` with an entry for each of ``blocks``.

        Raises:
            TypeError, ValueError: images of another rank, size, dtype or device.
        """
        self.check_images(images)
        x, trace = self.method.run(self, self.embed(images), return_trace)
        logits = self.classify(x)
        if trace is None:
            return logits
        return logits, trace

    def check_images(self, images: Tensor) -> None:
        """Refuse what the model cannot read, in words."""
        side = self.config.img_size
        check_tensor("images", images, ("B", self.config.in_chans, side, side), self.cls_token.dtype, self.cls_token)

    def embed(self, images: Tensor) -> Tensor:
        """Class token and patches with their positions, (B, 1 + M, C)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed

    def classify(self, x: Tensor) -> Tensor:
        """The tokens at the end, (B, 1 + M, C), to logits."""
        pooled = x[:, 1:].mean(dim=1)
        logits = self.head(pooled)
        return (logits + self.head_dist(pooled)) / 2 if self.config.distillation else logits


class Layer(nn.Module):
    """Attention and MLP, each as the branch of a residual: what is added is for the caller to add."""

    def __init__(self, dim: int, key_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, key_dim, num_heads)
        self.mlp = make_mlp(dim)


class Subsample(nn.Module):
    """Attention of every second patch of every second row, and of the class token, to all; then an MLP's branch."""

    def __init__(self, dim: int, out_dim: int, key_dim: int, side: int) -> None:
        super().__init__()
        self.attn = SubsampleAttention(dim, out_dim, key_dim, side)
        self.mlp = make_mlp(out_dim)


class Attention(nn.Module):
    def __init__(self, dim: int, key_dim: int, num_heads: int) -> None:
        super().__init__()
        self.key_dim, self.num_heads = key_dim, num_heads
        self.qkv = LinearNorm(dim, num_heads * (2 + _VALUE_RATIO) * key_dim)
        self.act = nn.Hardswish()
        self.proj = LinearNorm(num_heads * _VALUE_RATIO * key_dim, dim, scale=0.0)

    def forward(self, x: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) to the branch, (B, N, C), and on request the class token's attention, (B, N), mean over heads."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch * tokens, self.num_heads, (2 + _VALUE_RATIO) * self.key_dim)
        q, k, v = qkv.split((self.key_dim, self.key_dim, _VALUE_RATIO * self.key_dim), dim=2)
        out, received = attend(q, k, v, batch, tokens, tokens, scores)
        return self.proj(self.act(out.unflatten(0, (batch, tokens)))), received


class SubsampleAttention(nn.Module):
    def __init__(self, dim: int, out_dim: int, key_dim: int, side: int) -> None:
        super().__init__()
        self.key_dim, self.num_heads, self.side = key_dim, dim // key_dim, side
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.kv = LinearNorm(dim, self.num_heads * (1 + _SUBSAMPLE_VALUE_RATIO) * key_dim)
        self.q = LinearNorm(dim, self.num_heads * key_dim)
        self.act = nn.Hardswish()
        self.proj = LinearNorm(self.num_heads * _SUBSAMPLE_VALUE_RATIO * key_dim, out_dim)

    def forward(self, x: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
        """(B, 1 + M, C) to (B, 1 + M', C'), and on request the class token's attention to all, (B, 1 + M)."""
        x = x + self.pos_embed
        batch = len(x)
        kv = self.kv(x).flatten(0, 1).unflatten(1, (self.num_heads, (1 + _SUBSAMPLE_VALUE_RATIO) * self.key_dim))
        k, v = kv.split((self.key_dim, _SUBSAMPLE_VALUE_RATIO * self.key_dim), dim=2)
        queries = torch.cat((x[:, :1], every_second(x[:, 1:], self.side)), dim=1)
        q = self.q(queries).flatten(0, 1).unflatten(1, (self.num_heads, self.key_dim))
        out, received = attend(q, k, v, batch, queries.shape[1], x.shape[1], scores)
        return self.proj(self.act(out.unflatten(0, queries.shape[:2]))), received


def attend(
    q: Tensor, k: Tensor, v: Tensor, batch: int, queries: int, keys: int, scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of B images, (B * N, H, d), each with as many tokens, and the class tokens' to all keys, (B, N)."""
    images = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    cu_q, cu_k = queries * images, keys * images
    if not scores:
        return varlen_attention(q, k, v, cu_q, queries, cu_k, keys).flatten(1), None
    if torch.is_grad_enabled():  # the scores' gradient reaches the trade-offs, and what was attended
        out = varlen_attention(q, k, v, cu_q, queries, cu_k, keys)
        received = class_attention(q[cu_q[:-1].long()], k, cu_k, keys)
    else:
        out, received = varlen_attention(q, k, v, cu_q, queries, cu_k, keys, scores="class")
    return out.flatten(1), received.mean(dim=1).view(batch, keys)


def every_second(patches: Tensor, side: int) -> Tensor:
    """Every second patch of every second row, (B, side * side, ...) to (B, M', ...)."""
    return patches.unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)


class ConvNorm(nn.Module):
    """3 x 3 convolution of stride 2 and batch norm."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_chans, out_chans, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def folded(self) -> nn.Conv2d:
        scale, shift = _affine(self.bn)
        conv = nn.Conv2d(self.c.in_channels, self.c.out_channels, 3, 2, 1).to(scale)
        conv.weight.copy_(self.c.weight * scale[:, None, None, None])
        _bias(conv).copy_(shift)
        return conv


class LinearNorm(nn.Module):
    """Linear layer and batch norm over all tokens; ``scale`` is the norm's first weight."""

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Linear(in_features, out_features, bias=False)
        nn.init.trunc_normal_(self.c.weight, std=0.02)
        self.bn = nn.BatchNorm1d(out_features)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.bn(y.flatten(0, -2)).view_as(y)

    def folded(self) -> nn.Linear:
        scale, shift = _affine(self.bn)
        linear = nn.Linear(self.c.in_features, self.c.out_features).to(scale)
        linear.weight.copy_(self.c.weight * scale[:, None])
        _bias(linear).copy_(shift)
        return linear


class NormLinear(nn.Module):
    """Batch norm and linear layer: a classifier."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.l = nn.Linear(in_features, out_features)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    def folded(self) -> nn.Linear:
        scale, shift = _affine(self.bn)
        linear = nn.Linear(self.l.in_features, self.l.out_features).to(scale)
        linear.weight.copy_(self.l.weight * scale)
        _bias(linear).copy_(self.l.weight @ shift + self.l.bias)
        return linear


def make_mlp(dim: int) -> nn.Sequential:
    hidden = _MLP_RATIO * dim
    return nn.Sequential(LinearNorm(dim, hidden), nn.Hardswish(), LinearNorm(hidden, dim, scale=0.0))


@torch.no_grad()
def fold_norms(model: LeViT) -> LeViT:
    """For inference: every batch norm goes into the layer beside it, in place.

    Args:
        model: any LeViT of this package, in evaluation mode.

    Returns:
        The model, whose layers are plain convolutions and linear layers now, so that ``pack_weights`` serves them; it
        can be trained no more as its recipe says, and its state dict has other names. Folding again changes nothing.

    Raises:
        TypeError: no LeViT.
        ValueError: a model in training mode, whose norms are still moving.

    Results equal those before to rounding.
    """
    if not isinstance(model, LeViT):
        raise TypeError(f"model must be a LeViT, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (ConvNorm, LinearNorm, NormLinear)):
                setattr(parent, name, child.folded().eval())
    return model


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm in evaluation mode multiplies with and adds."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _halved(side: int) -> int:
    return (side - 1) // 2 + 1

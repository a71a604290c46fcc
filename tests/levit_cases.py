"""Small Evo-LeViTs with lively weights, and the method as the paper tells it: sorted, concatenated, put back."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import Case
from torch import Tensor, nn

from mtvit_ops import create_model
from mtvit_ops.nn import LeViT

SIZES: dict[str, Any] = {
    "img_size": 112,
    "num_classes": 10,
    "embed_dim": (32, 48, 64),
    "key_dim": 8,
    "num_heads": (2, 3, 4),
    "depth": (3, 2, 2),
}


def build_levit(seed: int = 0, **options: Any) -> LeViT:
    """In evaluation mode; every norm, table and trade-off is somewhere else than where it began."""
    torch.manual_seed(seed)
    model = create_model("evolevit_128s_224", **SIZES | options)
    assert isinstance(model, LeViT)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0.0, 0.3)
                part.running_mean.normal_(0.0, 0.3)
                part.running_var.uniform_(0.5, 2.0)
            elif isinstance(part, nn.Linear):
                part.weight.mul_(5.0)
        model.cls_token.normal_()
        model.method.tradeoffs.normal_()
    return model.eval()


def from_case(case: Case, **options: Any) -> LeViT:
    """The model of a recorded run, with random weights."""
    config = case.config
    sizes = {name: config[name] for name in SIZES}
    layers, stages = config["prune_ratio"]
    model = create_model(
        "evolevit_128s_224",
        **sizes,
        keep_ratios=layers,
        stage_keep_ratios=tuple(stages),
        mode="stage" if config["stage_wise"] else "layer",
        learn_tradeoff=config["learn_tradeoff"],
        **options,
    )
    assert isinstance(model, LeViT)
    return model


def by_sorting(model: LeViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and scores at the end; the patches lie as the last selection left them."""
    method, config = model.method, model.config
    x = model.embed(images)
    score = order = None
    learned = method.config.learn_tradeoff
    learned = method.config.mode == "stage" if learned is None else learned

    def evolve(old: Tensor, new: Tensor, index: int) -> Tensor:
        weight = method.tradeoffs[index].sigmoid() if learned else 0.5
        return (1 - weight) * old + weight * new

    index = 0
    for stage, groups in enumerate(method.groups):
        side = config.grid_sizes[stage]
        if order is None:
            order = torch.arange(side**2).expand(len(x), -1)
        for group in groups:
            if group.keep is None:
                for block in (model.blocks[i] for i in group.blocks):
                    branch, received = attention(block.attn, x)
                    x = x + branch
                    x = x + block.mlp(x)
                    score = received[:, 1:] if score is None else evolve(score, received[:, 1:], index)
                    index += 1
                continue
            best = score.argsort(dim=1, descending=True, stable=True)
            patches = x[:, 1:].gather(1, best[:, :, None].expand(-1, -1, x.shape[2]))
            score, order = score.gather(1, best), order.gather(1, best)
            n = group.keep
            weights = score[:, n:] / score[:, n:].sum(dim=1, keepdim=True)
            stands = (weights[:, :, None] * patches[:, n:]).sum(dim=1, keepdim=True)
            z, gained = torch.cat((x[:, :1], patches[:, :n], stands), dim=1), 0
            for block in (model.blocks[i] for i in group.blocks):
                branch, received = attention(block.attn, z)
                z, gained = z + branch, gained + branch[:, -1:]
                score = torch.cat((evolve(score[:, :n], received[:, 1:-1], index), score[:, n:]), dim=1)
                branch = block.mlp(z)
                z, gained = z + branch, gained + branch[:, -1:]
                index += 1
            x = torch.cat((z[:, :-1], patches[:, n:] + gained), dim=1)
        if stage + 1 == len(method.groups):
            break
        total = score.sum(dim=1, keepdim=True)
        back = order.argsort(dim=1)
        patches = x[:, 1:].gather(1, back[:, :, None].expand(-1, -1, x.shape[2]))
        score, order = score.gather(1, back), order.gather(1, back)
        block = model.blocks[index]
        x = torch.cat((x[:, :1], patches), dim=1) + block.attn.pos_embed
        x, received = subsampling(block.attn, x)

        def strided(t: Tensor, side: int = side) -> Tensor:
            return t.reshape(len(t), side, side)[:, ::2, ::2].flatten(1)

        score, order = evolve(strided(score), strided(received[:, 1:]), index), strided(order)
        score = score * total / score.sum(dim=1, keepdim=True)
        x = x + block.mlp(x)
        index += 1
    return x, score


def attention(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    qkv = layer.qkv(x).unflatten(2, (layer.num_heads, 4 * layer.key_dim))
    q, k, v = (t.transpose(1, 2) for t in qkv.split((layer.key_dim, layer.key_dim, 2 * layer.key_dim), dim=3))
    return _weighted(layer, q, k, v)


def subsampling(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    kv = layer.kv(x).unflatten(2, (layer.num_heads, 5 * layer.key_dim))
    k, v = (t.transpose(1, 2) for t in kv.split((layer.key_dim, 4 * layer.key_dim), dim=3))
    seen = x[:, 1:].reshape(len(x), layer.side, layer.side, -1)[:, ::2, ::2].flatten(1, 2)
    q = layer.q(torch.cat((x[:, :1], seen), dim=1)).unflatten(2, (layer.num_heads, layer.key_dim)).transpose(1, 2)
    return _weighted(layer, q, k, v)


def _weighted(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shares = (q @ k.transpose(2, 3) * layer.key_dim**-0.5).softmax(dim=3)
    out = (shares @ v).transpose(1, 2).flatten(2)
    return layer.proj(layer.act(out)), shares[:, :, 0].mean(dim=1)

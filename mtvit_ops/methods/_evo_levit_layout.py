"""The authors' names of an Evo-LeViT's weights, and ours."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_RENAMED = (
    (r"m1\.m\.(qkv\..+)", r"attn.\1"),
    (r"m1\.m\.proj\.1\.(.+)", r"attn.proj.\1"),
    (r"m2\.m\.([02]\..+)", r"mlp.\1"),
    (r"poss", "attn.pos_embed"),
    (r"kv\.(.+)", r"attn.kv.\1"),
    (r"(q|proj)\.1\.(.+)", r"attn.\1.\2"),
)


def from_evo_levit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors under our names.

    Their ``blocks`` count a subsampling attention and the MLP behind it as two, ours as one; ``stage_blocks`` are the
    same tensors once more. What has another name than theirs keeps it, for the caller to refuse.
    """
    entries = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    behind = {entry for entry in entries if any(name.startswith(f"blocks.{entry}.m.") for name in state)}
    place = {entry: entry - sum(other <= entry for other in behind) for entry in entries}
    out: dict[str, Tensor] = {}
    tradeoffs: dict[int, Tensor] = {}
    for name, value in state.items():
        if name.startswith("stage_blocks."):
            continue
        if name == "poss":
            out["pos_embed"] = value
        elif name.startswith(("head_cls.", "head_cls_dist.")):
            out[f"method.{name}"] = value
        elif found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            entry, part = int(found[1]), found[2]
            if part in ("m1.m.learn_tradeoff", "learn_tradeoff"):
                tradeoffs[place[entry]] = value.reshape(-1)
            elif entry in behind:
                out[f"blocks.{place[entry]}.mlp.{part.removeprefix('m.')}"] = value
            else:
                out[f"blocks.{place[entry]}.{_renamed(part)}"] = value
        else:
            out[name] = value
    if tradeoffs:
        out["method.tradeoffs"] = torch.cat([tradeoffs[index] for index in sorted(tradeoffs)])
    return out


def _renamed(part: str) -> str:
    for pattern, own in _RENAMED:
        if re.fullmatch(pattern, part):
            return re.sub(pattern, own, part)
    return part

"""Recorded runs of the authors' own code; the folder's README gives the tolerances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import HALTING_SCORES, LIFE, LOGITS, Case, assert_close, cases, load, sizes
from model_cases import Run, run_blocks
from torch import Tensor

import mtvit_ops


def run(method: str, case: Case, device: str, **options: Any) -> tuple[Run, Any]:
    model = mtvit_ops.create_model(f"{method}_tiny_patch16_224", **sizes(case.config), **options).eval()
    mtvit_ops.load_checkpoint(model, case.weights)
    result = run_blocks(model.to(device), case.tensors["image"].to(device))
    with torch.inference_mode():  # in place, as inference runs
        logits = model(case.tensors["image"].to(device))
    assert_close(logits, case.tensors["logits"], LOGITS)
    assert_close(result.logits, case.tensors["logits"], LOGITS)
    return result, model.method


def block_outputs(result: Run, batch: int) -> Tensor:
    return torch.stack([tokens.x.reshape(batch, -1, tokens.x.shape[1]) for tokens in result.outputs]).cpu()


@pytest.mark.parametrize("name", cases("avit_eval"))
def test_a_vit(name: str, golden: Path, backend: str, device: str) -> None:
    case = load(golden, name)
    gates = {key: case.config[key] for key in ("gate_scale", "gate_center", "eps")}
    result, _ = run("avit", case, device, **gates)
    want, extras = case.tensors, result.trace.extras
    alive = want["mask_halted"] == 0  # (L, B, K)

    assert torch.equal(result.trace.tokens_per_block.cpu(), want["alive_per_layer"])
    for layer, image in np.ndindex(*alive.shape[:2]):
        kept = result.trace.kept(layer, image).cpu()
        assert torch.equal(kept, alive[layer, image].nonzero()[:, 0])
    assert torch.equal(extras["counters"].cpu().float(), want["counter_token"])
    assert_close(extras["halting_scores"], want["h"] * alive, HALTING_SCORES)
    # sums of at most 12 scores
    assert_close(extras["ponder"], want["rho_token"], 12 * HALTING_SCORES)
    for layer, state in enumerate(result.states):
        gathered = state.halting.cumulative.reshape(alive.shape[1:]).cpu()
        assert_close(gathered[alive[layer]], want["cum_halt"][layer][alive[layer]], 12 * HALTING_SCORES)
    outputs = block_outputs(result, alive.shape[1])
    assert_close(outputs[alive], want["block_out"][alive], LOGITS)
    # halted tokens keep the value they halted with
    halted = (~alive).nonzero().tolist()
    for layer, image, token in halted:
        assert torch.equal(outputs[layer, image, token], outputs[layer - 1, image, token])


@pytest.mark.parametrize("name", cases("evo_deit_eval"))
def test_evo_vit(name: str, golden: Path, backend: str, device: str) -> None:
    case = load(golden, name)
    config = case.config
    result, _ = run(
        "evovit",
        case,
        device,
        keep_ratios=config["prune_ratio"],
        tradeoffs=config["tradeoff"],
        mode="stage" if config["stage_wise"] else "layer",
        prune_cls=config.get("prunecls", config.get("prune_cls", False)),
    )
    batch, patches = case.tensors["final_original_idx"].shape
    counts, attentions = case.numbered("attn_in_tokens"), case.numbered("cls_attn_headsum")
    scores, sorts, kept_sets = (case.numbered(key) for key in ("global_attn_after", "perm", "kept_original_idx"))
    slow, outputs = case.numbered("slow_out"), block_outputs(result, batch)

    order = torch.arange(patches).expand(batch, -1)  # original number of the patch in each slot
    for layer in range(config["depth"]):
        if layer in sorts:
            order = order.gather(1, sorts[layer])
        processed = order[:, : attentions[layer].shape[1]]
        assert result.trace.tokens_per_block[layer].tolist() == [int(counts[layer])] * batch
        for image in range(batch):
            kept = result.trace.kept(layer, image).cpu() - 1
            assert torch.equal(kept[1:], processed[image].sort().values)
            if layer in kept_sets:
                assert torch.equal(kept[1:], kept_sets[layer][image].sort().values)
        attention = result.trace.extras["class_attention"][layer].cpu()
        assert_close(attention.gather(1, processed), attentions[layer], LOGITS)
        assert int((attention != 0).sum()) == processed.numel()
        assert_close(result.trace.extras["score"][layer].cpu().gather(1, order), scores[layer], LOGITS)
        live = torch.cat((torch.zeros(batch, 1, dtype=torch.int64), processed + 1), dim=1)
        assert_close(outputs[layer].gather(1, live[..., None].expand(-1, -1, outputs.shape[-1])), slow[layer], LOGITS)
    assert torch.equal(order.sort().values, torch.arange(patches).expand(batch, -1))
    if not config.get("prunecls", config.get("prune_cls", False)):
        assert_close(outputs[-1][:, 1:].mean(dim=1), case.tensors["pooled_before_norm"], LOGITS)


@pytest.mark.parametrize("name", cases("life_eval"))
def test_life(name: str, golden: Path, backend: str, device: str) -> None:
    case = load(golden, name)
    config, want = case.config, case.tensors
    hard = config["mode"] == "eval_hard"
    result, method = run(
        "lifevit",
        case,
        device,
        budgets=config["num_patches_reserved"],
        base_block=config["layer_indices"][0],
        mode="budget" if hard else "threshold",
        temperature=config["temperature"],
    )
    batch, base = len(want["image"]), config["layer_indices"][0]
    outputs = block_outputs(result, batch)
    lives = result.trace.extras["lives"].cpu()

    assert method.starts == tuple(config["layer_indices"])
    # float64 on both sides
    assert (method.mean, method.std) == pytest.approx(want["mu_sigma"].tolist(), rel=1e-12)
    assert_life(outputs[base - 1], want["x_before_tail"])
    assert_life(lives, want["life"][:, 1:])
    assert_life((lives - base) / (config["depth"] - base), want["life_normed"][:, 1:])
    assert_life(result.logits.cpu(), want["logits"])
    slots, recorded = case.numbered("kept"), case.numbered("block_out")
    for layer in range(base, config["depth"]):
        kept = [result.trace.kept(layer, image).cpu() for image in range(batch)]
        if hard:
            assert (
                result.trace.tokens_per_block[layer].tolist()
                == [int(want["tokens_per_tail_block"][layer - base])] * batch
            )
            # token by token in the order of lives: one sort serves all blocks
            rows = result.outputs[layer].rows.reshape(batch, -1).cpu() - torch.arange(batch)[:, None] * outputs.shape[2]
            assert torch.equal(rows.long(), slots[layer])
            assert torch.equal(rows.long(), want["order"][:, : rows.shape[1]])
            assert all(torch.equal(have, slot.sort().values) for have, slot in zip(kept, slots[layer], strict=True))
            got = outputs[layer].gather(1, slots[layer][..., None].expand(-1, -1, outputs.shape[-1]))
            assert_life(got, recorded[layer])
        else:
            mask = want["keep_mask"][layer - base]
            assert all(torch.equal(have, row.nonzero()[:, 0]) for have, row in zip(kept, mask, strict=True))
            assert_life(outputs[layer][mask], recorded[layer][mask])


def assert_life(got: Tensor, want: Tensor) -> None:
    assert_close(got, want, LIFE * want.abs().max().item())

"""A-ViT: every token halts on its own (arXiv 2112.07658)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_real
from .._register import in_inference
from ..nn.block_run import BlockRun, halting_blocks_
from ..nn.method import Method
from ..nn.vision_transformer import VisionTransformer
from ..ops import HaltingState, initial_halting_state, token_select
from ..ops.halting_step import HALTING_STEP
from ..ragged import RaggedTokens

_halting_step = in_inference(HALTING_STEP)


@dataclass(frozen=True)
class AViTConfig:
    """
    Attributes:
        gate_scale: slope of the gate on channel 0 of a token (the paper's gamma); 10 in the authors' checkpoints.
        gate_center: shift of the gate (minus the paper's beta); 30 in the authors' tiny, 75 in their small checkpoint.
            Larger: tokens live longer.
        eps: a token halts once its scores reach 1 - eps, in (0, 1].
        stop_with_class: drop a whole image once its class token has halted. The logits are the same; counters and
            ponder of the image's other tokens then stand where they stood.
    """

    gate_scale: float = 10.0
    gate_center: float = 30.0
    eps: float = 0.01
    stop_with_class: bool = False

    def __post_init__(self) -> None:
        check_real("gate_scale", self.gate_scale, -1e9, 1e9)
        check_real("gate_center", self.gate_center, -1e9, 1e9)
        check_real("eps", self.eps, 0.0, 1.0, open_low=True)
        check_choice("stop_with_class", self.stop_with_class, (True, False))


class AViTState(NamedTuple):
    """Between two blocks."""

    halting: HaltingState
    scores: Tensor  # (R,) of the last block
    readout_rows: Tensor  # (B,) the class tokens' rows
    depth: int


class AViT(Method):
    """Halted tokens leave the list; the class tokens' outputs are averaged over the layers they lived.

    Trace extras: ``halting_scores`` (L, B, K), 0 where a token no longer lived; ``counters`` (B, K), layers lived;
    ``ponder`` (B, K), layers lived plus the remainder.
    """

    config_class = AViTConfig
    cost_field = "gate_center"
    config: AViTConfig

    @property
    def counts_are_dynamic(self) -> bool:
        return True

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, None]:
        return model.embed(images), None  # the blocks' operator begins its own state

    def run_blocks_(
        self, index: int, run: BlockRun, tokens: RaggedTokens, state: AViTState | None
    ) -> tuple[int, RaggedTokens, AViTState] | None:
        config = self.config
        if config.stop_with_class or state is not None or tokens.rows is not None:
            return None
        gate = float(config.gate_scale), float(config.gate_center), float(config.eps)
        done = halting_blocks_(run, tokens, *gate)
        if done is None:
            return None
        *sums, scores, rows, offsets = done
        state = AViTState(HaltingState(*sums), scores, tokens.cu_seqlens[:-1], len(run.blocks))
        tokens = RaggedTokens(tokens.x, rows, offsets, tokens.max_seqlen, tokens.num_prefix_tokens)
        return len(run.blocks), tokens, state

    def after_block(self, index: int, tokens: RaggedTokens, state: AViTState | None) -> tuple[RaggedTokens, AViTState]:
        config = self.config
        if state is None:  # everyone lives yet
            assert self.model_config is not None
            readout_rows = tokens.cu_seqlens[:-1]
            halting = initial_halting_state(tokens.x, readout_rows)
            state = AViTState(halting, halting.cumulative, readout_rows, self.model_config.depth)
        # the operator itself, not its door: the state is its own
        *sums, scores, rows, offsets = _halting_step(
            *(tokens.x, tokens.rows, tokens.cu_seqlens, state.readout_rows, *state.halting),
            *(float(config.gate_scale), float(config.gate_center), float(config.eps), index == state.depth - 1),
        )
        tokens = RaggedTokens(tokens.x, rows, offsets, tokens.max_seqlen, tokens.num_prefix_tokens)
        if config.stop_with_class:
            tokens = _drop_finished(tokens, state.readout_rows)
        return tokens.trimmed(), state._replace(halting=HaltingState(*sums), scores=scores)

    def readout(self, first_rows: Tensor, tokens: RaggedTokens, state: AViTState) -> Tensor:
        return state.halting.output

    def extras(self, first_rows: Tensor, states: list[AViTState]) -> dict[str, Tensor]:
        batch, last = len(first_rows), states[-1].halting
        length = len(last.counters) // max(batch, 1)
        return {
            "halting_scores": torch.stack([state.scores for state in states]).reshape(len(states), batch, length),
            "counters": last.counters.reshape(batch, length),
            "ponder": last.ponder.reshape(batch, length),
        }


def _drop_finished(tokens: RaggedTokens, class_rows: Tensor) -> RaggedTokens:
    """Without the images whose class token is no longer alive."""
    rows, offsets = tokens.rows, tokens.cu_seqlens
    assert rows is not None
    # a living class token heads its image's list
    padded = torch.cat((rows, rows.new_full((1,), -1)))
    finished = padded[offsets[:-1].long()] != class_rows
    counts = offsets.diff().where(~finished, 0).to(torch.int32)
    # any score will do: an image keeps all or nothing
    return tokens.select(token_select(rows.float(), rows, offsets, keep=counts, max_seqlen=tokens.max_seqlen))

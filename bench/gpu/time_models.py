"""Stage: whole models in bfloat16, every honest baseline beside them, equality first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from baselines import FixedKeep, FixedKeepConfig, PackedViT, PlainViT, RaggedDense
from measure import best, compare
from stage import Stage, in_words
from torch import Tensor

from mtvit_ops import VisionTransformer, calibrate, capture, create_method, create_model
from mtvit_ops.equality import rounding_tolerance
from mtvit_ops.flops import count_batch_macs
from mtvit_ops.nn import masked_twin

# model and batch, in order of worth
CASES = (("small", 256), ("small", 8), ("base", 256), ("tiny", 256), ("small", 32), ("tiny", 32))
METHODS = {"A-ViT": "avit", "Evo-ViT": "evovit", "Life": "lifevit", "MT-ViT": "mtvit"}
MAC_RATIO, ROUNDS, CALIBRATION_IMAGES = 0.65, 15, 8
Run = Callable[[], Tensor]


class Bench:
    """One model size and batch."""

    def __init__(self, stage: Stage, size: str, batch: int) -> None:
        self.stage, self.size, self.batch = stage, size, batch
        sizes = {"img_size": 64, "embed_dim": 64, "depth": 6, "num_heads": 2} if stage.smoke else {}
        dense = create_model(f"vit_{size}_patch16_224", **sizes).eval()
        self.dense = dense.to(stage.device, torch.bfloat16)
        side = dense.config.img_size
        self.images = torch.randn(batch, 3, side, side).to(stage.device, torch.bfloat16)
        self.tolerance = rounding_tolerance(self.dense, self.images[:8])
        self.macs = count_batch_macs(self.dense, self.images)
        known = [row for row in stage.emitted() if (row.get("size"), row.get("batch")) == (size, batch)]
        self.fastest_dense = next((fastest(row["times"]) for row in known if row["title"] == "dense"), None)

    def compiled(self, make: Callable[[], torch.nn.Module]) -> Run:
        # without a CUDA graph of its own: each candidate is timed in one anyway
        backend = "eager" if self.stage.smoke else "inductor"
        return self.late(lambda: torch.compile(make(), dynamic=False, backend=backend))

    def eager(self, model: torch.nn.Module) -> Run:
        return lambda: model(self.images)

    def captured(self, model: VisionTransformer) -> Run:
        return self.late(lambda: capture(model, self.images))

    def late(self, make: Callable[[], Callable[[Tensor], Tensor]]) -> Run:
        """Made at the first call, so that what cannot be made is one candidate's trouble."""
        made = cache(make)
        return lambda: made()(self.images)

    def row(self, title: str, macs: float, wanted: Run, runs: dict[str, Run]) -> None:
        """Check that all compute what ``wanted`` does, time them, and say how much of the saving arrived."""
        truth, wrong = wanted().double(), {}
        for name, run in runs.items():
            try:
                error = float((run().double() - truth).abs().max() / truth.abs().max())
                if not error <= self.tolerance:
                    wrong[name] = f"differs by {error:.2e} of the largest logit, rounding explains {self.tolerance:.2e}"
            except Exception as error:
                wrong[name] = in_words(error)
        live = {name: run for name, run in runs.items() if name not in wrong}
        whole = [name for name in live if "captured" in name]
        times = compare(live, self.stage.device, 2 if self.stage.smoke else ROUNDS, whole)
        if title == "dense":
            self.fastest_dense = fastest(times)
        for found in times.values():
            if (value := best(found)) is None:
                continue
            found["images_a_second"] = 1e3 * self.batch / value
            if self.fastest_dense is not None:
                found["realised"] = self.fastest_dense / value * (macs / self.macs)
        failed = {name: {"error": why} for name, why in wrong.items()}
        self.stage.emit(
            table="models",
            size=self.size,
            batch=self.batch,
            title=title,
            mac_ratio=macs / self.macs,
            times={**times, **failed},
        )

    def dense_row(self) -> None:
        runs = {
            "ours": self.eager(self.dense),
            "ours, captured": self.captured(self.dense),
            "ours on ragged_linear, captured": self.captured(
                self.dense.with_method(RaggedDense(self.dense.method.config))
            ),
            "plain, compiled": self.compiled(lambda: PlainViT(self.dense)),
            "timm, compiled": self.compiled(lambda: timm_twin(self.dense)),
            "timm, eager": self.late(lambda: timm_twin(self.dense)),
        }
        self.row("dense", self.macs, self.eager(self.dense), runs)

    def fixed_row(self, title: str, counts: list[int]) -> None:
        model, ragged = (
            self.dense.with_method(FixedKeep(FixedKeepConfig(tuple(counts), ragged))) for ragged in (False, True)
        )
        kept = model.method.select(self.dense.embed(self.images))
        rows = kept.rows.long()
        masked = masked_twin(model)
        runs = {
            "ours": self.eager(model),
            "ours, captured": self.captured(model),
            "ours on ragged_linear, captured": self.captured(ragged),
            "varlen_attn, compiled": self.compiled(lambda: PackedViT(self.dense, rows, kept.cu_seqlens, max(counts))),
            "masked": self.eager(masked),
        }
        if len(set(counts)) == 1:
            runs["static, compiled"] = self.compiled(lambda: PlainViT(self.dense, rows, self.batch))
        self.row(title, count_batch_macs(model, self.images), self.eager(masked), runs)

    def method_row(self, title: str, name: str) -> None:
        grid = self.dense.config.grid_size
        options = {"grids": (grid // 2, round(grid * 10 / 14), grid)} if name == "mtvit" else {}
        model = self.dense.with_method(create_method(name, **options))
        if name == "mtvit":  # an untrained predictor sends every image to one tail
            weight = model.method.predictor.head.weight
            weight.copy_(torch.randn(weight.shape))  # drawn on the host: see promises.filled
        model.eval()
        calibrate(model, self.images[:CALIBRATION_IMAGES], MAC_RATIO)
        runs = {"ours": self.eager(model), "ours, captured": self.captured(model)}
        self.row(title, count_batch_macs(model, self.images), self.eager(model), runs)


def fastest(times: dict[str, Any]) -> float | None:
    return min((value for found in times.values() if (value := best(found)) is not None), default=None)


def timm_twin(dense: VisionTransformer) -> torch.nn.Module:
    import timm

    sizes = dense.config
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    twin = timm.models.VisionTransformer(**{name: getattr(sizes, name) for name in names})
    twin.load_state_dict(dense.state_dict(), strict=True)
    return twin.to(dense.cls_token).eval()


def jobs(bench: Bench) -> list[Callable[[], None]]:
    """Rows of a size and batch: the dense one first, which the others are held to."""
    tokens, batch = 1 + bench.dense.config.num_patches, bench.batch
    equal = [round(99 / 197 * tokens)] * batch
    generator = torch.Generator().manual_seed(0)
    low, high = round(60 / 197 * tokens), round(140 / 197 * tokens)
    ragged = torch.randint(low, high + 1, (batch,), generator=generator).tolist()
    return [
        bench.dense_row,
        lambda: bench.fixed_row("equal counts", equal),
        lambda: bench.fixed_row("counts an image", ragged),
        *(lambda title=title, name=name: bench.method_row(title, name) for title, name in METHODS.items()),
    ]


def work(stage: Stage) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Every row of every size and batch; the first of a batch makes its model."""
    for size, batch in [("small", 4)] if stage.smoke else CASES:
        if stage.time_left() < 20:
            return
        torch._dynamo.reset()
        made = cache(lambda size=size, batch=batch: jobs(Bench(stage, size, batch)))
        for place in range(3 + len(METHODS)):
            yield size, batch, lambda made=made, place=place: made()[place]()


if __name__ == "__main__":
    stage = Stage(__doc__)
    with torch.no_grad():
        for size, batch, job in stage.todo(work(stage)):
            if stage.time_left() < 8:
                break
            try:
                job()
            except Exception as error:  # one row's trouble is not the next one's
                stage.emit(table="models", size=size, batch=batch, title="?", error=in_words(error), times={})

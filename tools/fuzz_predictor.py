"""Drawn calls of MT-ViT's tail predictor."""

from __future__ import annotations

from typing import Any

import torch
from fuzz_blocks import dense, opaque
from fuzz_draw import Draw
from torch import Tensor
from torch.nn import functional as F

native = torch.ops.mtvit_ops_cpp


def case_tail_predictor(draw: Draw) -> tuple[Any, Any]:
    channels, tails = 1 + draw.size(3), draw.size(4)
    size = 1 + draw.size(40) if not draw.spoilt() else draw.random.choice((0, -1, 4097, 2**62))
    images = draw.tensor(draw.size(3), channels, 1 + draw.size(40), 1 + draw.size(40))
    shapes, width = [(1 + draw.size(20), channels, 3, 3)], 0
    for _ in range(draw.random.randint(0, 3)):
        width = shapes[-1][0]
        shapes += [(width, 1, 3, 3), (1 + draw.size(20), width, 1, 1)]
    layers = []
    for shape in shapes:
        layers += [opaque(draw, draw.tensor(*shape) * 0.2)]
        layers += [opaque(draw, draw.tensor(shape[0]) * 0.2) for _ in range(3)]
        layers += [opaque(draw, draw.tensor(shape[0]).abs() + 1)]
    if draw.spoilt():
        layers = layers[:-1]
    means, classes = shapes[-1][0], draw.size(5)
    head = draw.tensor(tails, means + (classes > 0)), draw.tensor(tails)
    classifier = (draw.tensor(classes, means), draw.tensor(classes)) if classes else ()
    if classifier and draw.spoilt():
        classifier = classifier[:1]
    if draw.random.random() < 0.5:
        got = native.tail_predictor(images, size, layers, 1e-5, *head, *classifier)
    else:
        folded = native.fold_tail_predictor(layers, 1e-5, *head, *classifier)
        numbers = [shape[0] for shape in shapes[::2]] + [channels, tails, classes]
        if draw.spoilt():
            numbers[draw.random.randrange(len(numbers))] = draw.random.choice((-1, 0, 7, 2**62))
        costs = [draw.random.random() for _ in range(tails)] if tails else []
        got, chosen = native.predict_tails(images, size, folded, numbers, costs, 0.5)
        assert chosen.shape == (len(images) if costs else 0,)
        assert bool(((chosen >= 0) & (chosen < max(tails, 1))).all())

    def expected() -> Tensor:
        x = F.interpolate(images.double(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        for index, shape in enumerate(shapes):
            weight, gamma, beta, mean, var = (dense(t).double() for t in layers[5 * index : 5 * index + 5])
            depthwise = index % 2 == 1
            stride = 4 if index == 0 else 1 + depthwise
            x = F.conv2d(x, weight, None, stride, shape[2] // 2, 1, shape[0] if depthwise else 1)
            x = F.batch_norm(x, mean, var, gamma, beta, eps=1e-5).relu()
        features = x.mean(dim=(2, 3))
        if classifier:
            log_shares = F.linear(features, *(t.double() for t in classifier)).log_softmax(dim=1)
            features = torch.cat([features, -(log_shares.exp() * log_shares).sum(dim=1, keepdim=True)], dim=1)
        return F.linear(features, *(t.double() for t in head)).to(images.dtype)

    return got, expected

"""Parameter shapes of what the updates are timed on."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """torchvision's ResNet-50: 161 tensors, 25.56M elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for shape in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def bert_base() -> Shapes:
    """BERT-base with its pooler: 199 tensors, 109.5M elements."""
    h, wide = 768, 3072
    shapes: Shapes = [(30522, h), (512, h), (2, h), (h,), (h,)]
    for _ in range(12):
        shapes += [(h, h), (h,)] * 4 + [(h,), (h,)]
        shapes += [(wide, h), (wide,), (h, wide), (h,), (h,), (h,)]
    return [*shapes, (h, h), (h,)]


SETS = {
    "resnet50": resnet50,
    "one_25m": lambda: [(25_000_000,)],
    "small_2000": lambda: [(1024,)] * 2000,
    "bert_base": bert_base,
}

"""What an image costs: the operations of the image encoder, counted from its sizes alone."""

from __future__ import annotations


def image_encoder_flops(config: dict) -> int:
    """Floating-point operations of one image through `lseg.model.LSegImageEncoder`, a multiply and an add counted as 2.

    Counted are the matrix products and convolutions, as `torch.utils.flop_counter` does.

    Args:
        config: the sizes, as `LSegConfig.to_dict` and an exported file's metadata have them.
    """
    grid = config["image_size"] // config["patch_size"]
    width, features, patches = config["width"], config["features"], grid * grid
    tokens = patches + 1
    block = 12 * tokens * width * width + 2 * tokens * tokens * width  # qkv, projection and MLP; then q k^T and p v
    macs = patches * 3 * config["patch_size"] ** 2 * width + config["depth"] * block
    unit = 2 * 9 * features * features  # a residual unit, per pixel
    for level, channels in enumerate(config["reassemble"]):
        side = (4 * grid, 2 * grid, grid, (grid + 1) // 2)[level]
        macs += patches * width * width + width * width  # readout: patches, and the class token once
        macs += patches * width * channels  # projection
        resize = (patches * 16, patches * 4, 0, 9 * side * side)[level]
        macs += resize * channels * channels
        macs += side * side * 9 * channels * features  # to the decoder's channels
        macs += side * side * (unit * (2 if level < 3 else 1) + features * features)
    macs += (4 * grid) ** 2 * features * config["embedding"]  # the head
    return 2 * macs

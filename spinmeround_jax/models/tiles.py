"""Tile sizes of the TPU attention kernels."""

LANES = 128  # of a TPU: its kernels take whole multiples of tokens


def tile(tokens: int) -> int:
    """How many of a multiple of 128 tokens are computed at once: 2048 do not fit a TPU's vector memory."""
    return next(size for size in (512, 384, 256, LANES) if tokens % size == 0)

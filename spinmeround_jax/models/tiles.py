"""Tile sizes of the TPU attention kernels."""

LANES = 128  # of a TPU; its kernels need multiples of this many tokens


def tile(tokens: int) -> int:
    """Tokens computed at once, of a multiple of 128; 2048 do not fit a TPU's vector memory."""
    return next(size for size in (512, 384, 256, LANES) if tokens % size == 0)

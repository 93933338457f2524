"""Data sets of rendered views: records, shards, latents, and the loader."""

"""Textured meshes and their alignment to the canonical frame."""

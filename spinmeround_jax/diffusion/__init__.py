"""Denoiser, noise levels, loss, samplers, and the pipeline from a portrait to views."""

"""Turntables as MP4."""

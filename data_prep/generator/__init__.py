"""Heads from PanoHead's generator: network, surface, screening."""

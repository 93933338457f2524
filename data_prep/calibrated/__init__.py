"""Calibrated photographs: readers of their formats, canonical views."""

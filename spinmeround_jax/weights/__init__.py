"""Pretrained weights -> our networks: tables of names, strict both ways."""

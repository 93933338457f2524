"""Pretrained weights -> our modules: tables of names, strict both ways."""

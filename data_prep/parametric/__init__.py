"""Parametric people: MakeHuman meshes with hair, clothes and skin."""

"""Ray-cast views of meshes, viewpoints, contact sheets."""

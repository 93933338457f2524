"""SpinMeRound in JAX: one portrait in, 360 degrees of views and normals out."""

__version__ = "0.1.0"

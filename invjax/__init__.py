"""invjax: reconstruction of private data from shared gradients, as an inverse problem, in JAX."""

__version__ = "0.1.0"

"""The network: layers, heads, and the VAE that they make."""

"""A Diffusers UNet run in parts: encoder and decoder halves, outer layers, shared skips.  It knows no plan."""

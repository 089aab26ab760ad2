"""How the embedded model is trained: a CLIP on drawn scenes, then a UNet on what its frozen text tower says."""

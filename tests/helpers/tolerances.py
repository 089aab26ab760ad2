"""The one place for tolerances."""

# Latents, look-ahead against step-by-step decoding.
LATENTS_FLOAT32 = 1e-4
LATENTS_FLOAT64 = 1e-9

# One UNet output, a batch of decoders against one at a time.
OUTPUT_FLOAT32 = 5e-6
OUTPUT_FLOAT64 = 1e-12

# Latents of a whole run, preset "exact" against stock: fused layers round differently, and steps amplify it.
EXACT_FLOAT32 = 1e-4
EXACT_FLOAT64 = 1e-9

# Latents after 20 steps, an engine in float32 against stock, of the largest latent (issue 20).
ENGINE_RELATIVE = 2e-5

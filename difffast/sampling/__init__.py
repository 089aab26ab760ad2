"""One pass of Diffusers' own sampling loop: who answers its UNet calls, how, and what is kept in between."""

"""Take concepts out of a pipeline's weights: in seconds by a closed form, or by training that makes them stay out."""

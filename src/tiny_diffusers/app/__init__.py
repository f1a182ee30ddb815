"""`tiny-diffusers app`: everything that checkpoints can do, in a browser."""

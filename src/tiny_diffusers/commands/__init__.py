"""The commands of `tiny-diffusers` that take more than a page, and what all commands share."""

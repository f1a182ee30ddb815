"""The families of models: for each its arguments, the builder of its network, and its loss."""

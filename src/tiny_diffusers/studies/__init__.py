"""Many runs of one recipe, and what they say together: grids of experiments, and searches for settings."""

"""The train scripts, one a family."""

SCRIPTS = ("unconditional", "conditional", "pixelcnn", "vae", "dcgan")  # train_SCRIPT.py

import os


# On tensors of a few kilobytes threads only wait for each other: here, and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

"""Image classifiers of convolutions, from folder to folder: opened, pruned, measured, written and loaded."""

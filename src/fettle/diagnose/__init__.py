"""Where a model is sensitive: what each linear costs in each scheme, measured and estimated, and why."""

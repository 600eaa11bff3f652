"""Budget in, recipe out: which scheme each linear gets so that the whole fits; an outer caller of the pipeline."""

"""The literature, a file a method: what chooses codes. A method sees a weight and its statistics, never a model."""

"""Where the windows of a training come from, beside the text and a replayed one: each source a file of its own."""

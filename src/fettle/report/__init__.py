"""Result files in, one self-contained HTML page out; never touches a model."""

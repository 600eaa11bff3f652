"""Tokens out: completing a prompt with a loaded model."""

"""The command line: one verb a file, loaded only when it is called.

Typer parses and writes the help; `main` runs the parsed verb, so that every error of every verb ends in one place, as
one line and an exit code. Flags of methods and of the calibration are made from their dataclasses (`flags.py`).
"""

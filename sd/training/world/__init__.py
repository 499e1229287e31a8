"""The toy world that the tiny model is trained on: captioned scenes, drawn by a program."""

"""The toy world that the tiny model is trained on: captioned scenes, drawn by a program.

Reading order: scenes (what a scene is, and its captions), render (a scene -> its image), things (house, tree, ...),
canvas (shapes), vocabulary (the words of the captions).
"""

"""How the tiny model was trained, and how to train your own. The guide is README.md in this folder.

Reading order: world/ (the images and captions), data, losses, vae, text, diffusion (the networks' training stages),
loop (what all stages share), stages (all of them in order), evaluation. muon, precision and record can wait.
"""

"""How the weights come to be: captioned scenes, losses, the three training stages, evaluation."""

"""Training objectives: what a network is trained to do, and how its predictions are read."""

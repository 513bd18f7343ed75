"""A world small enough to train everything on a laptop: its simulation, drawing, and the stand-ins for UMT and Vicuna.

May import everything but bench. Nothing imports the toy: with real data and weights none of it runs."""

"""Find scales and roundings: a session on a network, and the stages of methods."""

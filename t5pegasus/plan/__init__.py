"""What a run would take on hardware that is not here: the real train step compiled ahead of time, and a roofline."""

"""What spans several rooms: calibrate with a budget, the demo, inspect."""

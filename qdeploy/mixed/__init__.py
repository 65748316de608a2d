"""Mixed precision: how much each layer suffers from each number format, and which to give it."""

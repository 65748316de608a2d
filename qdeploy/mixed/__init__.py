"""Mixed precision: how sensitive each layer is to each number format, and which format to choose for it."""

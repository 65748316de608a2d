"""How each small model of the package was trained."""

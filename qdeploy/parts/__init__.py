"""Long work in numbered parts: a plan, parts that may be made anywhere, twice or in any order, and a finish."""

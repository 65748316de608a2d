"""The methods held against their authors' own code, given a checkout; none of it is in this repository."""

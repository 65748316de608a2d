"""Pictures of what changes with the timestep."""

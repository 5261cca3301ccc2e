"""Flow matching: noise, timestep densities, losses, guidance and solvers."""

//! Prepares prompts, collects Jacobi trajectories, augments and cleans them.

//! Measures speed-up and accuracy of checkpoints and draws reports.

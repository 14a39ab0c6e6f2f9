//! Trains teachers and consistency models.

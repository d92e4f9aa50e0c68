"""Speech token generators behind one protocol."""

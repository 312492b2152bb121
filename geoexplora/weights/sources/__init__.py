"""What source weights may be called, and how they come onto this machine."""

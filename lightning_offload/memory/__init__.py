"""Where bytes live and how they move."""

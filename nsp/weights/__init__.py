"""Weight files of any origin, and what their names mean."""

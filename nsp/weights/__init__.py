"""Weight files of any origin, and the meaning of their tensor names."""

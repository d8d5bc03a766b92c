"""Speed: what it can be at best, computed from shapes, and what it is, measured on the machine at hand."""

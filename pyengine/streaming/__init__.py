"""What obeys schedules: running generations, and what callers hold of them."""

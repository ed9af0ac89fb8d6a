"""What refuses a user's misuse or warns of it. The room can be removed: ``optional_guards.py`` is the seam to it."""

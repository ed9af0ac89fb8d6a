"""What one step did, over all ranks: looks on, and changes no bit of what it sees."""

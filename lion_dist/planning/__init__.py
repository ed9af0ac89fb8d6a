"""What a job will hold and send, before it runs."""

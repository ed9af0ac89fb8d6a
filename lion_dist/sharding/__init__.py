"""Who owns which elements, and how they move between ranks: without Lion."""

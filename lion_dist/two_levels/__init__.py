"""State sharded over all data-parallel ranks, and two levels of links between them: inside a node, and across nodes."""
